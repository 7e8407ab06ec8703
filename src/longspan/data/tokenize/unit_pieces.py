"""The folder beside a store in which its pieces are made, one job or many at a time.

    .STORE.pieces/plan.json             settings and inputs; other settings do not go on with it
    .STORE.pieces/000017/               unit 17: shards, documents.npy, piece.json; appears whole
    .STORE.pieces/job-0-of-1.lock       held by a job while it works

A piece that is there is not made again, so a killed job goes on where it was. When all are there the store is
put together from them without copying a byte, and the folder is removed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longspan.core.errors import DataError
from longspan.core.log import get_logger
from longspan.core.progress import progress
from longspan.core.units import format_count
from longspan.data.jobs import Executor
from longspan.data.jobs.piece_folder import begin_work
from longspan.data.store.assemble import ShardFolder, load_rows
from longspan.data.store.document_columns import DocumentColumns
from longspan.data.tokenize.groups import GroupUnit, dealt_path
from longspan.data.tokenize.pieces import PIECE, ROWS, PieceSummary, read_summary
from longspan.data.tokenize.units import Unit, file_identity

PLAN = "plan.json"


class UnitPieces:
    """The pieces of one store by unit; of a grouped corpus, input units are dealt and buckets are pieces.

    Args:
        out: where the store is to stand.
        plan: everything that decides the pieces.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any], *, grouped: bool) -> None:
        self.folder = out.with_name(f".{out.name}.pieces")
        self.fingerprint = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
        self._plan, self._grouped = plan, grouped

    def open(self) -> None:
        """Make the folder, or go on with the one that is there.

        Raises:
            DataError: it was begun with other settings or inputs.
        """
        begin_work(
            self.folder / PLAN,
            self._plan,
            how="made otherwise",
            fix="go on with the same settings and inputs, or remove that folder",
        )

    def remove(self) -> None:
        """Remove the folder and all pieces in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, unit: Unit | GroupUnit) -> Path:
        """Return the folder of what is made of a unit."""
        if self._grouped and isinstance(unit, Unit):
            return dealt_path(self.folder, unit.number)
        return self.folder / f"{unit.number:06}"

    def shards(self, unit: Unit | GroupUnit, summary: PieceSummary) -> ShardFolder:
        """Return the shards of a finished piece and where its documents stand."""
        path = self.path(unit)
        rows, parts = load_rows(path / ROWS)
        columns = DocumentColumns(rows, tuple(summary.source_names), summary.has_mask, parts)
        return ShardFolder(path, columns)

    def read(self, unit: Unit | GroupUnit) -> PieceSummary | None:
        """Return the summary of what is made of a unit, or None. Raises DataError when it is damaged."""
        file = self.path(unit) / PIECE
        return read_summary(file, plan=self.fingerprint) if file.is_file() else None

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
                f"{self.folder} holds unfinished work made of other inputs",
                found=", ".join(file.path for file in unit.files[:3]),
                fix="remove that folder",
            )
        return summary
