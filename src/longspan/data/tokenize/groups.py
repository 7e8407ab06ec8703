"""Groups of records as units of work: every job deals a share of the input into buckets on disk, then every
bucket is a unit of its own.

    .STORE.pieces/dealt/000017/     records of input unit 17, sorted by bucket, and piece.json; appears whole

Input units and buckets depend on the files alone, so the store does too. A killed job goes on with what is dealt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from longspan.data.readers import Document, Fields, Grouping, InputFile, ReadReport, deal, read_bucket
from longspan.data.tokenize.pieces import PIECE, PieceSummary, piece_folder, read_summary, write_summary
from longspan.data.tokenize.units import Unit, file_identity

DEALT = "dealt"
MAX_BUCKETS = 1024
"""Of input units and of buckets: every bucket is read from every input unit."""


class DealJob(NamedTuple):
    """What the dealing of all input units has in common; can be sent to another process."""

    folder: str
    plan: str
    fields: Fields
    grouping: Grouping
    num_buckets: int
    strict: bool


class GroupUnit(NamedTuple):
    """One bucket of groups: a task that needs all input units dealt."""

    number: int
    size: int
    """About how many bytes of input it stands for."""
    job: DealJob
    num_dealt: int

    @property
    def files(self) -> list[InputFile]:
        """Input files that the task itself reads: none."""
        return []

    def documents(self, report: ReadReport) -> Iterator[Document]:
        """Yield one document per group, and count them in `report`."""
        folders = [dealt_path(self.job.folder, number) for number in range(self.num_dealt)]
        grouping, count = self.job.grouping, self.job.num_buckets
        yield from read_bucket(folders, self.number, grouping, num_buckets=count, report=report)


def num_buckets_of(files: Sequence[InputFile], unit_bytes: int) -> int:
    """Return how many buckets there are; also files that cannot be cut are shared out in many."""
    return min(MAX_BUCKETS, max(1, -(-sum(file.size for file in files) // unit_bytes)))


def group_units(job: DealJob, dealt: Sequence[Unit]) -> list[GroupUnit]:
    """Return the buckets as units of work."""
    size = sum(unit.size for unit in dealt)
    ends = [size * number // job.num_buckets for number in range(job.num_buckets + 1)]
    return [GroupUnit(n, ends[n + 1] - ends[n], job, len(dealt)) for n in range(job.num_buckets)]


def dealt_path(folder: str | Path, number: int) -> Path:
    """Return the folder of the records of an input unit."""
    return Path(folder, DEALT, f"{number:06}")


def deal_unit(job: DealJob, unit: Unit) -> PieceSummary:
    """Read the records of one input unit and deal them; what is dealt already is left alone.

    The summary counts what was left out; documents are counted where groups become documents.
    """
    path = dealt_path(job.folder, unit.number)
    if (path / PIECE).is_file():
        return read_summary(path / PIECE, plan=job.plan)
    report = ReadReport()
    inputs = [file_identity(file) for file in unit.files]
    with piece_folder(path) as folder:
        deal(
            unit.parts,
            job.fields,
            job.grouping,
            folder,
            num_buckets=job.num_buckets,
            strict=job.strict,
            report=report,
        )
        report.documents = 0
        summary = PieceSummary(job.plan, inputs, unit.size, report)
        write_summary(folder, summary)
    return summary
