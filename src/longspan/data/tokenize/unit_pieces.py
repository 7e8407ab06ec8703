"""What is made of each unit of work: which pieces are there, and making those that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longspan.core.errors import DataError
from longspan.core.log import get_logger
from longspan.core.progress import progress
from longspan.core.units import format_count
from longspan.data.jobs import Executor
from longspan.data.tokenize.groups import GroupUnit, dealt_path
from longspan.data.tokenize.pieces import PIECE, PieceSummary, Workspace, read_summary
from longspan.data.tokenize.units import Unit, file_identity


class UnitPieces:
    """The pieces of a workspace by unit; of a grouped corpus, input units are dealt and buckets are pieces."""

    def __init__(self, space: Workspace, *, grouped: bool) -> None:
        self._space, self._grouped = space, grouped

    def path(self, unit: Unit | GroupUnit) -> Path:
        """Return the folder of what is made of a unit."""
        if self._grouped and isinstance(unit, Unit):
            return dealt_path(self._space.folder, unit.number)
        return self._space.path(unit.number)

    def read(self, unit: Unit | GroupUnit) -> PieceSummary | None:
        """Return the summary of what is made of a unit, or None. Raises DataError when it is damaged."""
        file = self.path(unit) / PIECE
        return read_summary(file, plan=self._space.fingerprint) if file.is_file() else None

    def make(
        self,
        executor: Executor,
        function: Callable[[Any], PieceSummary],
        units: Sequence[Unit | GroupUnit],
        *,
        total: int | None,
        title: str = "tokenize",
    ) -> Iterator[PieceSummary]:
        """Yield the summaries of units, in their order, after making those that are missing.

        Raises:
            DataError: a piece was made of files that have changed since.
        """
        there = {unit.number: summary for unit in units if (summary := self._checked(unit)) is not None}
        todo = [unit for unit in units if unit.number not in there]
        if there and todo:
            get_logger("data.tokenize").info("%d of %d pieces are there already", len(there), len(units))
        done = sum(summary.size for summary in there.values())
        made = executor.run(function, todo)
        tokens = sum(summary.tokens for summary in there.values())
        with progress(title, total=total, unit="bytes", done=done) as bar:
            for unit in units:
                summary = there.get(unit.number)
                if summary is None:
                    summary = next(made)
                    tokens += summary.tokens
                    if tokens:
                        bar.note(f"{format_count(tokens)} tokens")
                    bar.advance(summary.size)
                yield summary

    def _checked(self, unit: Unit | GroupUnit) -> PieceSummary | None:
        summary = self.read(unit)
        if summary is not None and summary.inputs != [file_identity(file) for file in unit.files]:
            raise DataError(
                f"{self._space.folder} holds unfinished work made of other inputs",
                found=", ".join(file.path for file in unit.files[:3]),
                fix="remove that folder",
            )
        return summary
