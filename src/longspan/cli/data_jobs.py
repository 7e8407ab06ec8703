"""Options of the `data` commands whose work may be shared: here, on a Slurm array or on Ray."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from longspan.data.jobs import ArrayJob, Executor


class ExecutorName(StrEnum):
    """Where the work runs."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


Workers = Annotated[int, typer.Option(min=1, help="Processes; the result does not depend on it.")]
ExecutorOption = Annotated[
    ExecutorName, typer.Option(help="Where the work runs; the result does not depend on it.")
]
NumJobs = Annotated[
    int | None, typer.Option(min=1, help="Jobs that share the work. Default with slurm: the array's.")
]
JobId = Annotated[int | None, typer.Option(min=0, help="Which of the jobs this is, from 0.")]
RayAddress = Annotated[
    str | None, typer.Option(help="With ray: a running cluster. Default: RAY_ADDRESS, else this machine.")
]
PrintSbatch = Annotated[
    bool,
    typer.Option("--print-sbatch", help="Print a file for sbatch with --num-jobs jobs, do nothing else."),
]


class Jobs(NamedTuple):
    """Who does the work, as the options say."""

    executor: ExecutorName
    workers: int
    num_jobs: int | None
    job_id: int | None
    ray_address: str | None

    @property
    def is_shared(self) -> bool:
        """Whether more is asked for than processes of this machine."""
        return self.executor is not ExecutorName.local or self.num_jobs is not None or self.job_id is not None

    def share(self) -> ArrayJob:
        """Return which job of how many this process is. Raises ArgumentError where the options do not say."""
        from longspan.core.errors import ArgumentError
        from longspan.data.jobs import ArrayJob, array_job

        if (self.num_jobs is None) != (self.job_id is None):
            raise ArgumentError("--num-jobs and --job-id are given together")
        if self.num_jobs is not None and self.job_id is not None:
            return ArrayJob(self.job_id, self.num_jobs)
        return array_job() if self.executor is ExecutorName.slurm else ArrayJob()

    def start(self, *, use_gpus: bool = False) -> Executor:
        """Return what runs the units of work, to be used in a `with` block; on Ray with a GPU each where asked."""
        from longspan.data.jobs import LocalExecutor, RayExecutor

        if self.executor is ExecutorName.ray:
            workers = self.workers if self.workers > 1 else None
            return RayExecutor(self.ray_address, num_workers=workers, use_gpus=use_gpus)
        return LocalExecutor(self.workers)

    def print_sbatch(self, name: str) -> None:
        """Print the file that runs this very command line as jobs of an array."""
        from longspan.core.errors import ArgumentError
        from longspan.data.jobs import sbatch_script

        if self.num_jobs is None:
            raise ArgumentError("how many jobs shall share the work?", fix="give --num-jobs")
        command, skip = ["longspan"], False
        for word in sys.argv[1:]:
            option = word.partition("=")[0]
            if not skip and option not in ("--print-sbatch", "--num-jobs", "--executor"):
                command.append(word)
            skip = not skip and option in ("--num-jobs", "--executor") and "=" not in word
        command += ["--executor", "slurm"]
        typer.echo(sbatch_script(command, num_jobs=self.num_jobs, workers=self.workers, name=name), nl=False)


def missing_words(share: ArrayJob, pieces: int, missing: int, what: str) -> str:
    """Return what to say after a job of an array while others have not ended; `what` the last one makes."""
    return (
        f"job {share.index} of {share.count} is done; {missing} of {pieces} pieces are still missing, and the "
        f"last job to end makes {what}"
    )
