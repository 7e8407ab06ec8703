"""The folder beside a store in which its pieces are made, one job or many at a time.

    .STORE.pieces/plan.json             settings and inputs; other settings do not go on with it
    .STORE.pieces/000017/               unit 17: shards, documents.npy, piece.json; appears whole
    .STORE.pieces/job-0-of-1.lock       held by a job while it works

A piece that is there is not made again, so a killed job goes on where it was. When all are there the store is
put together from them without copying a byte, and the folder is removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import DataError
from longspan.core.files import atomic_dir, disk_errors, read_json, remove_leftovers, write_json
from longspan.data.readers import ReadReport, RecordPlace
from longspan.data.readers.base import Example
from longspan.data.store.assemble import ShardFolder, load_rows, save_rows
from longspan.data.store.document_columns import DocumentColumns, DocumentWriter
from longspan.data.tokenize.sampling import SourceCounts

FORMAT = "longspan piece of a token store 1"
PLAN, PIECE, ROWS = "plan.json", "piece.json", "documents.npy"


class PieceSummary(NamedTuple):
    """Content of `piece.json`."""

    plan: str
    """Fingerprint of the plan that it belongs to."""
    inputs: list[dict[str, Any]]
    """Identities of the files that it was made of."""
    size: int
    """About how many bytes of input it stands for."""
    documents: int
    tokens: int
    has_mask: bool
    source_names: list[str]
    report: ReadReport
    seen: dict[str, SourceCounts]
    """What was read and taken of each source; only where documents are sampled while reading."""


class Workspace:
    """The pieces of one store.

    Args:
        out: where the store is to stand.
        config: everything that decides the pieces.
    """

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        self.out, self.config = out, dict(config)
        self.folder = out.with_name(f".{out.name}.pieces")
        self.fingerprint = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]

    def open(self) -> None:
        """Make the folder, or go on with the one that is there.

        Raises:
            DataError: it was begun with other settings or inputs.
        """
        plan = self.folder / PLAN
        if plan.is_file():
            begun = read_json(plan)
            if begun != self.config:
                known = begun if isinstance(begun, dict) else {}
                names = [
                    name for name in {**self.config, **known} if known.get(name) != self.config.get(name)
                ]
                raise DataError(
                    f"{self.folder} holds unfinished work made otherwise",
                    found=f"other {', '.join(names) or 'settings'}",
                    fix="go on with the same settings and inputs, or remove that folder",
                )
            return
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_json(plan, self.config)

    def path(self, number: int) -> Path:
        """Return the folder of a piece."""
        return self.folder / f"{number:06}"

    def read(self, number: int) -> PieceSummary | None:
        """Return the summary of a finished piece, or None. Raises DataError when it is damaged."""
        file = self.path(number) / PIECE
        return read_summary(file, plan=self.fingerprint) if file.is_file() else None

    def shard_folder(self, number: int, summary: PieceSummary) -> ShardFolder:
        """Return the shards of a finished piece and where its documents stand."""
        path = self.path(number)
        columns = DocumentColumns(load_rows(path / ROWS), tuple(summary.source_names), summary.has_mask)
        return ShardFolder(path, columns)

    def remove(self) -> None:
        """Remove the folder and all pieces in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read_summary(file: Path, *, plan: str) -> PieceSummary:
    """Read a `piece.json`. Raises DataError when it is damaged or belongs to another plan."""
    content = read_json(file)
    try:
        if content.pop("format") != FORMAT:
            raise ValueError("written by another version")
        report = content.pop("report")
        examples = [
            Example(RecordPlace(*place) if isinstance(place, list) else place, *rest)
            for place, *rest in report.pop("examples")
        ]
        seen = {source: SourceCounts(*counts) for source, counts in content.pop("seen").items()}
        summary = PieceSummary(report=ReadReport(**report, examples=examples), seen=seen, **content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is damaged", found=str(error), fix="remove its folder") from None
    if summary.plan != plan:
        raise DataError(f"{file} belongs to other settings", fix=f"remove {file.parent.parent}")
    return summary


class PieceWriter:
    """Collects the documents of one unit; `finish` writes what belongs beside their shards."""

    def __init__(self, folder: Path, *, vocab_size: int, shard_bytes: int) -> None:
        self._folder = folder
        self._documents = DocumentWriter(folder, vocab_size=vocab_size, shard_bytes=shard_bytes)
        self.add = self._documents.add

    def finish(
        self,
        *,
        plan: str,
        inputs: list[dict[str, Any]],
        size: int,
        report: ReadReport,
        seen: dict[str, SourceCounts],
    ) -> PieceSummary:
        """Write index, rows and summary."""
        columns = self._documents.finish()
        save_rows(self._folder / ROWS, columns)
        summary = PieceSummary(
            plan=plan,
            inputs=inputs,
            size=size,
            documents=len(columns.rows),
            tokens=int(columns.rows["tokens"].sum(dtype="u8")),
            has_mask=columns.has_mask,
            source_names=list(columns.source_names),
            report=report,
            seen=seen,
        )
        content = {**summary._asdict(), "report": dataclasses.asdict(report), "format": FORMAT}
        write_json(self._folder / PIECE, content)
        return summary


def piece_folder(path: Path) -> Any:
    """Return a context manager: a folder that becomes the piece at `path`; what a killed job left is removed."""
    remove_leftovers(path.parent, path.name)
    return atomic_dir(path)
