"""Jobs of a Slurm array: which of them this process is, and the file that submits them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from longspan.core.errors import ArgumentError
from longspan.data.jobs.base import ArrayJob


def array_job(environment: Mapping[str, str] | None = None) -> ArrayJob:
    """Return the job that SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT name; arrays may start at any number.

    Raises:
        ArgumentError: this process is not a job of an array.
    """
    environment = os.environ if environment is None else environment
    try:
        index = int(environment["SLURM_ARRAY_TASK_ID"]) - int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
        return ArrayJob(index, int(environment["SLURM_ARRAY_TASK_COUNT"]))
    except (KeyError, ValueError) as error:
        raise ArgumentError(
            "this process is not a job of a Slurm array",
            found=f"no usable {error}" if isinstance(error, KeyError) else str(error),
            fix="submit it with the file that --print-sbatch prints, or give --num-jobs and --job-id",
        ) from None


def sbatch_script(command: Sequence[str], *, num_jobs: int, workers: int, name: str = "longspan") -> str:
    """Return a file for sbatch that runs `command` as an array of jobs with `workers` CPUs each."""
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{num_jobs - 1}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={workers}
#SBATCH --mem-per-cpu=4G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output={name}-%A-%a.log

# The last job to end makes the store. After a lost job, submit this file again: finished pieces are kept.
export OMP_NUM_THREADS=1
srun {shlex.join(command)}
"""
