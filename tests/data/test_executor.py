"""Executors: results in the order of the units, the first error in that order, shares without a gap."""

from __future__ import annotations

import os
import subprocess

import pytest

from longspan.core.errors import ArgumentError, DataError
from longspan.data.jobs import ArrayJob, LocalExecutor, array_job, sbatch_script


def square(unit: int) -> int:
    if unit < 0:
        raise DataError(f"unit {unit}")
    return unit * unit


def process(unit: int) -> int:
    return os.getpid()


def test_local_executor() -> None:
    """Guards against results in the order of completion, and against one worker costing a process."""
    with LocalExecutor(2) as executor:
        assert list(executor.run(square, range(9))) == [unit * unit for unit in range(9)]
        with pytest.raises(DataError, match="unit -1"):
            list(executor.run(square, [3, -1, 2, -2, 1]))
        assert list(executor.run(square, [4])) == [16], "an error leaves the executor usable"
        assert os.getpid() not in executor.run(process, [1, 2])
    with LocalExecutor() as executor:
        assert set(executor.run(process, [1, 2])) == {os.getpid()}
    with pytest.raises(ArgumentError, match="num_workers=0"):
        LocalExecutor(0)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_shares_are_a_partition(count: int) -> None:
    """Guards against units that no job of an array takes, or two."""
    shares = [ArrayJob(index, count).share(range(7)) for index in range(count)]
    assert sorted(unit for share in shares for unit in share) == list(range(7))


def test_array_job_from_the_environment() -> None:
    """Guards against arrays that do not start at 0, and against a job that runs outside of one."""
    variables = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "4"}
    assert array_job(variables) == ArrayJob(1, 3)
    for missing in ({}, {**variables, "SLURM_ARRAY_TASK_ID": "x"}):
        with pytest.raises(ArgumentError, match="not a job of a Slurm array"):
            array_job(missing)
    for index, count in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ArgumentError, match="no such job"):
            ArrayJob(index, count)


def test_sbatch_script_is_a_script() -> None:
    """Guards against arguments with spaces falling apart, and against an array of the wrong size."""
    script = sbatch_script(["echo", "a b", "$HOME"], num_jobs=8, workers=4)
    assert "#SBATCH --array=0-7\n" in script and "#SBATCH --cpus-per-task=4\n" in script
    done = subprocess.run(
        ["bash", "-c", script.replace("srun ", "")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "a b $HOME\n"
