"""Rows of the files that evaluation sets are released in: JSON lines, a JSON list, `{"data": [...]}`, Parquet.

JSON lines and the rows of a large JSON list are read one by one when they are asked for: a set of long contexts has
gigabytes.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from longspan.core.errors import DataError
from longspan.core.files import sha256_file

_BLOCK_BYTES = 1 << 20
_WHOLE_BYTES = 32 << 20
"""A JSON list that is no larger is read whole."""
_QUOTE, _OPENS, _CLOSES, _COMMA = 1, 2, 3, 4
_KINDS = np.zeros(256, np.uint8)
"""What a byte is in JSON, outside of a string."""
for _kind, _letters in ((_QUOTE, b'"'), (_OPENS, b"[{"), (_CLOSES, b"]}"), (_COMMA, b",")):
    _KINDS[list(_letters)] = _kind


class Rows(Sequence[dict[str, Any]]):
    """The rows of one file.

    Raises:
        DataError: the file is not of a kind that is read here, or broken; or a row is not an object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[Any] | None = None
        self._spans = np.empty((0, 2), np.int64)  # where each row begins and ends
        if path.suffix == ".parquet":
            import pyarrow.parquet

            with open(path, "rb") as file:
                self._rows = pyarrow.parquet.read_table(file).to_pylist()
        elif _first_byte(path) == b"[":
            if path.stat().st_size > _WHOLE_BYTES:
                self._spans = _list_spans(path)
            else:
                self._rows = _read_json(path)
        elif path.suffix == ".json" and _is_one_object(path):
            content = _read_json(path)
            if not isinstance(content.get("data"), list):
                raise DataError(
                    f"{path} is not a list of rows", allowed='a JSON list, JSON lines, or {"data": [...]}'
                )
            self._rows = content["data"]
        else:
            starts = _line_starts(path)
            self._spans = np.stack([starts[:-1], starts[1:]], axis=1)

    def __len__(self) -> int:
        return len(self._spans) if self._rows is None else len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        row = self._read(number) if self._rows is None else self._rows[number]
        if not isinstance(row, dict):
            raise DataError(f"{self.path}: row {number + 1} is not an object", found=type(row).__name__)
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def load(self) -> Rows:
        """Read all rows into memory, for small files whose rows are wanted again and again; return this."""
        if self._rows is None:
            self._rows = list(self)
        return self

    def size(self, number: int) -> int:
        """Return about how many bytes a row has."""
        if len(self._spans):
            start, end = self._spans[number]
            return int(end - start)
        return sum(len(str(value)) for value in self[number].values())

    def field(self, number: int, name: str) -> Any:
        """Return a field of a row. Raises DataError naming file, row and the fields that there are."""
        row = self[number]
        if name not in row:
            raise DataError(
                f"{self.path}: row {number + 1} has no field {name!r}",
                found=", ".join(sorted(row)) or "nothing",
            )
        return row[name]

    @property
    def sha256(self) -> str:
        """SHA-256 of the file. Cost: reads it."""
        return sha256_file(self.path)

    def _read(self, number: int) -> Any:
        start, end = map(int, self._spans[number])
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            return orjson.loads(line)
        except ValueError:
            pass  # it may hold NaN or half a surrogate pair, which only Python's own parser reads
        try:
            return json.loads(line)
        except ValueError as error:
            raise DataError(f"{self.path}: row {number + 1} is not valid JSON", found=str(error)) from None


def find_rows(root: Path, places: Sequence[str], *, what: str) -> Rows:
    """Return the rows of the first file that exists; a place is a path below `root` and may be a pattern.

    Raises:
        DataError: none exists; the message says where it was looked for.
    """
    for place in places:
        found = sorted(path for path in root.glob(place) if path.is_file())
        if found:
            return Rows(found[0])
    raise DataError(
        f"the data of {what} is not there",
        found=f"{root} is {'a folder without it' if root.is_dir() else 'no folder'}",
        allowed=[str(root / place) for place in places],
        fix="put the released files there, or name their folder with --data-root",
    )


def _line_starts(path: Path) -> np.ndarray:
    """Return where each line that is not blank begins, and the end of the file at last."""
    ends = [0]
    size = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            breaks = np.flatnonzero(np.frombuffer(block, np.uint8) == 0x0A)
            ends.extend((breaks + 1 + size).tolist())
            size += len(block)
    if ends[-1] != size:
        ends.append(size)
    # A blank line is at most its line break: it is joined to the line before it, where JSON ignores it.
    starts = [start for start, end in itertools.pairwise(ends) if end - start > 2]
    return np.array([*starts, size], np.int64)


def _list_spans(path: Path) -> np.ndarray:
    """Return where each row of a JSON list begins and ends [rows, 2]: its brackets are counted, and nothing is parsed.

    Raises:
        DataError: the brackets do not match, or something stands behind the list.
    """
    bounds, first, last = [], 0, 0
    size = depth = inside = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            while block.endswith(b"\\") and (more := file.read(1)):
                block += more  # what a backslash escapes stands in the same block
            found = np.frombuffer(block, np.uint8)
            kinds = _KINDS[found]
            kinds[_escaped(found)] = 0
            places = np.flatnonzero(kinds)
            kinds = kinds[places]
            quoted = (np.cumsum(kinds == _QUOTE) + inside) % 2 == 1
            opens, closes = (~quoted & (kinds == kind) for kind in (_OPENS, _CLOSES))
            depths = depth + np.cumsum(opens.astype(np.int64) - closes)
            begins, ends = opens & (depths == 1), closes & (depths <= 0)
            between = ~quoted & (kinds == _COMMA) & (depths == 1)
            bounds.append(places[begins | between | ends] + size)
            first, last = first + int(begins.sum()), last + int(ends.sum())
            if len(places):
                inside, depth = int(quoted[-1]), int(depths[-1])
            size += len(block)
        borders = np.concatenate(bounds)
        file.seek(int(borders[-1]) + 1)
        if (first, last, depth, inside) != (1, 1, 0, 0) or file.read(64).strip():
            raise DataError(f"{path} is not valid JSON", found="a list that does not end where the file does")
        file.seek(int(borders[0]) + 1)
        if len(borders) == 2 and not file.read(min(64, int(borders[1] - borders[0]) - 1)).strip():
            return np.empty((0, 2), np.int64)
    return np.stack([borders[:-1] + 1, borders[1:]], axis=1)


def _escaped(found: np.ndarray) -> np.ndarray:
    """Return the places of bytes that a backslash escapes: behind an odd number of them."""
    slashes = np.flatnonzero(found == ord("\\"))
    if len(slashes) == 0:
        return slashes
    parted = np.diff(slashes) != 1
    starts, ends = slashes[np.append(True, parted)], slashes[np.append(parted, True)]
    behind = ends[(ends - starts) % 2 == 0] + 1
    return behind[behind < len(found)]


def texts_of(value: Any) -> list[str]:
    """Return a field that holds one text or several as a list."""
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _first_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _is_one_object(path: Path) -> bool:
    """Return whether the whole file is one JSON object: its first line alone is none."""
    with open(path, "rb") as file:
        line = file.readline()
        more = file.readline()
    try:
        return "data" in json.loads(line) and not more.strip()
    except ValueError:
        return True


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())  # a byte order mark may stand before it
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON", found=str(error)) from None
