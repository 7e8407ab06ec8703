"""Who does the work of a command: processes here, jobs of a Slurm array, or Ray."""

from __future__ import annotations

from typing import Literal

import pydantic
import typer

from longspan.cli.output import command_line
from longspan.core.config import Config
from longspan.core.errors import ArgumentError
from longspan.data.jobs import ArrayJob, Executor, LocalExecutor, RayExecutor, array_job, sbatch_script


class JobsConfig(Config):
    """Where the work runs; the result does not depend on it."""

    workers: int = pydantic.Field(1, ge=1)
    """Processes; the result does not depend on it."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Where the work runs; the result does not depend on it."""
    num_jobs: int | None = pydantic.Field(None, ge=1)
    """Jobs that share the work. None: with slurm the array's, else one."""
    job_id: int | None = pydantic.Field(None, ge=0)
    """Which of the jobs this is, from 0."""
    ray_address: str | None = None
    """With ray: a running cluster. None: RAY_ADDRESS, else this machine."""

    @property
    def is_shared(self) -> bool:
        """Whether more is asked for than processes of this machine."""
        return self.executor != "local" or self.num_jobs is not None or self.job_id is not None

    def share(self) -> ArrayJob:
        """Return which job of how many this process is. Raises ArgumentError where the options do not say."""
        if (self.num_jobs is None) != (self.job_id is None):
            raise ArgumentError("--num-jobs and --job-id are given together")
        if self.num_jobs is not None and self.job_id is not None:
            return ArrayJob(self.job_id, self.num_jobs)
        return array_job() if self.executor == "slurm" else ArrayJob()

    def start(self, *, use_gpus: bool = False) -> Executor:
        """Return what runs the units of work, to be used in a `with` block; on Ray with a GPU each where asked."""
        if self.executor == "ray":
            workers = self.workers if self.workers > 1 else None
            return RayExecutor(self.ray_address, num_workers=workers, use_gpus=use_gpus)
        return LocalExecutor(self.workers)

    def print_sbatch(self, name: str) -> None:
        """Print the file that runs this very command line as jobs of an array."""
        if self.num_jobs is None:
            raise ArgumentError("how many jobs shall share the work?", fix="give --num-jobs")
        command = ["longspan", *command_line("--num-jobs", "--executor"), "--executor", "slurm"]
        typer.echo(sbatch_script(command, num_jobs=self.num_jobs, workers=self.workers, name=name), nl=False)
