"""What commands share whose work may be shared: here, on a Slurm array or on Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.from_settings import Part, write_used

if TYPE_CHECKING:
    from longspan.data.jobs import ArrayJob

JOBS = Part("longspan.cli.jobs_config:JobsConfig")
PrintSbatch = Annotated[
    bool,
    typer.Option("--print-sbatch", help="Print a file for sbatch with --num-jobs jobs, do nothing else."),
]


def write_settings(used: Mapping[str, Any], folder: Path) -> None:
    """Write what a command ran with into the folder that it wrote, without who did the work: bytes do not tell."""
    jobs = JOBS.load().model_fields
    write_used({name: value for name, value in used.items() if name not in jobs}, folder)


def missing_words(share: ArrayJob, pieces: int, missing: int, what: str) -> str:
    """Return what to say after a job of an array while others have not ended; `what` the last one makes."""
    return (
        f"job {share.index} of {share.count} is done; {missing} of {pieces} pieces are still missing, and the "
        f"last job to end makes {what}"
    )
