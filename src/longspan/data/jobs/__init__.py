"""Where work runs: in processes of this machine, on a Ray cluster, or as one job of a Slurm array.

    with LocalExecutor(num_workers=8) as executor:
        for result in executor.run(function, units):      # results in the order of the units
            ...

An executor knows nothing of what it runs: a function that can be sent to another process, and units of work
whose results do not depend on where or when they run. An array of jobs shares units out without talking to
one another: job k of n takes units k, k + n, k + 2n, ...
"""

from longspan.data.jobs.base import ArrayJob, Executor
from longspan.data.jobs.local import LocalExecutor
from longspan.data.jobs.ray import RayExecutor
from longspan.data.jobs.slurm import array_job, sbatch_script

__all__ = ["ArrayJob", "Executor", "LocalExecutor", "RayExecutor", "array_job", "sbatch_script"]
