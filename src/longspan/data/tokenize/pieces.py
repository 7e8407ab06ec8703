"""What a finished piece of a store says of itself: `piece.json` in its folder, which appears whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import DataError
from longspan.core.files import atomic_dir, read_json, remove_leftovers, write_json
from longspan.data.readers import ReadReport, RecordPlace
from longspan.data.readers.base import Example
from longspan.data.tokenize.sampling import SourceCounts

FORMAT = "longspan piece of a token store 1"
PIECE, ROWS = "piece.json", "documents.npy"


class PieceSummary(NamedTuple):
    """Content of `piece.json`."""

    plan: str
    """Fingerprint of the plan that it belongs to."""
    inputs: list[dict[str, Any]]
    """Identities of the files that it was made of."""
    size: int
    """About how many bytes of input it stands for."""
    report: ReadReport
    documents: int = 0
    tokens: int = 0
    has_mask: bool = False
    source_names: Sequence[str] = ()
    seen: Mapping[str, SourceCounts] = {}
    """What was read and taken of each source; only where documents are sampled while reading."""


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


def write_summary(folder: Path, summary: PieceSummary) -> None:
    """Write the `piece.json` of a folder that is not in place yet."""
    content = {**summary._asdict(), "report": dataclasses.asdict(summary.report), "format": FORMAT}
    write_json(folder / PIECE, content)


def piece_folder(path: Path) -> Any:
    """Return a context manager: a folder that becomes the piece at `path`; what a killed job left is removed."""
    remove_leftovers(path.parent, path.name)
    return atomic_dir(path)
