"""Where the documents of packed rows stand: read from the rows of others once, and kept beside them.

    FOLDER/.longspan-rows/       columns; or `~/.cache/longspan/rows/` where the folder cannot be written

It is made again when a file has another size or time than it had. Small data are indexed each time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longspan.core.columns import load_columns, save_columns
from longspan.core.errors import DataError, LongspanError
from longspan.core.files import sha256_bytes
from longspan.core.log import get_logger
from longspan.core.progress import progress
from longspan.data.packed.row_files import JsonlRows, RowFile, row_table

KIND = "row-index"
NAME = ".longspan-rows"
KEPT_BYTES = 1 << 26
"""Size of the files from which on an index is kept."""

Key = list[list[Any]]
"""Name, size and time (or version) of every file: what an index was made of."""

_COLUMNS = {
    "file_rows": np.int64,
    "lengths": np.int64,
    "offsets": np.int64,
    "starts": np.int64,
    "ends": np.int64,
    "sources": np.uint16,
    "line_starts": np.int64,
    "line_ends": np.int64,
}
ROW_ERRORS = (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError)


@dataclass(frozen=True, eq=False)
class RowIndex:
    """The documents of all rows; those of row r are `offsets[r]` to `offsets[r + 1]`."""

    file_rows: np.ndarray
    """int64 [files] rows of each."""
    lengths: np.ndarray
    """int64 [rows] tokens of each."""
    offsets: np.ndarray
    """int64 [rows + 1]."""
    starts: np.ndarray
    """int64 [documents] first token in the row."""
    ends: np.ndarray
    """int64 [documents]."""
    sources: np.ndarray
    """uint16 [documents] index into `names`."""
    line_starts: np.ndarray
    """int64 [rows] of JSON lines: where each line starts in its file; else empty."""
    line_ends: np.ndarray
    """int64 [rows] of JSON lines."""
    names: tuple[str, ...]
    fingerprint: str
    """Over a sample of the files' bytes; empty where the rows have one of their own."""

    def check(self, path: Path | str) -> None:
        """Check that documents stand in their rows one after another.

        Raises:
            DataError: naming the first row where they do not.
        """
        row_of = np.repeat(np.arange(len(self.lengths)), np.diff(self.offsets))
        wrong = (self.starts >= self.ends) | (self.starts < 0) | (self.ends > self.lengths[row_of])
        wrong[1:] |= (self.starts[1:] < self.ends[:-1]) & (row_of[1:] == row_of[:-1])
        if wrong.any():
            raise DataError(
                f"row {row_of[np.argmax(wrong)]} of {path} has spans that overlap or reach outside",
                fix="verify or pack again",
            )


def make_index(path: Path | str, files: Sequence[RowFile], *, fingerprint: str) -> RowIndex:
    """Read where the documents of all rows stand.

    Raises:
        DataError: a row is not one.
    """
    names: dict[str, int] = {}
    columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype)] for name, dtype in _COLUMNS.items()}
    counts = [np.zeros(1, np.int64)]
    with progress("index rows", total=len(files), unit="files") as bar:
        for number, file in enumerate(files):
            try:
                table = row_table(file)
            except ROW_ERRORS as error:
                raise DataError(
                    f"{path} holds something that is not a packed row",
                    found=f"file {number + 1}: {type(error).__name__}: {error}",
                ) from None
            renumber = np.array([names.setdefault(name, len(names)) for name in table.names] or [0])
            if len(names) > 1 << 16:
                raise DataError(f"{path} has more than {1 << 16} sources", fix="give it fewer names")
            counts.append(table.counts)
            columns["file_rows"].append(np.array([file.num_rows]))
            columns["lengths"].append(table.lengths)
            columns["starts"].append(table.starts)
            columns["ends"].append(table.ends)
            columns["sources"].append(renumber[table.sources].astype(np.uint16))
            if isinstance(file, JsonlRows):
                columns["line_starts"].append(file.places[:, 0])
                columns["line_ends"].append(file.places[:, 1])
            bar.advance()
    columns["offsets"] = [np.cumsum(np.concatenate(counts))]
    whole = {name: np.concatenate(parts).astype(_COLUMNS[name]) for name, parts in columns.items()}
    return RowIndex(**whole, names=tuple(names), fingerprint=fingerprint)


def load_index(path: Path | str, key: Key) -> RowIndex | None:
    """Return the index that is kept for these files, if there is one and they have not changed."""
    for place in _places(path):
        if not place.is_dir():
            continue
        try:
            head, columns = load_columns(place, kind=KIND, dtypes=_COLUMNS)
            if head["files"] == key:
                return RowIndex(**columns, names=tuple(head["names"]), fingerprint=head["fingerprint"])
        except (LongspanError, KeyError, TypeError):
            continue  # made by another version, or half gone: it is made again
    return None


def keep_index(path: Path | str, key: Key, index: RowIndex) -> None:
    """Keep an index beside the data, or in the user's cache; small data have none."""
    if sum(size for _, size, _ in key) < KEPT_BYTES:
        return
    head = {"files": key, "names": list(index.names), "fingerprint": index.fingerprint}
    columns = {name: getattr(index, name) for name in _COLUMNS}
    for place in _places(path):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if os.access(place.parent, os.W_OK):
                save_columns(place, kind=KIND, head=head, columns=columns)
                get_logger("data").info("%s: where its documents stand is kept in %s", path, place)
                return
        except (LongspanError, OSError):
            continue
    get_logger("data").warning("%s: its index can be kept nowhere and is made each time", path)


def file_key(path: Path, files: Sequence[Path]) -> Key:
    """Return name, size and time of every file."""
    home = path if path.is_dir() else path.parent
    found = [(os.path.relpath(file, home), file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def _places(path: Path | str) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan" / "rows"
    if isinstance(path, str):
        return [cache / f"hub-{sha256_bytes(path.encode())[:16]}"]
    beside = path / NAME if path.is_dir() else path.with_name(f".{path.name}{NAME}")
    place = sha256_bytes(os.fsencode(os.path.realpath(path)))[:16]
    return [beside, cache / f"{path.name}-{place}"]
