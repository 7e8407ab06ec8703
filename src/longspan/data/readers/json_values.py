"""JSON files that are not lines: one array of objects, or objects one after another, read as a stream."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from longspan.core.errors import DataError
from longspan.data.readers.base import (
    OPTIONAL_FIELDS,
    Part,
    RawRecord,
    Reader,
    SkippedRecordError,
    parse_values,
    whole_file,
)
from longspan.data.readers.fields import lookup
from longspan.data.readers.opening import open_input, reading

BLOCK_CHARACTERS = 1 << 20
MAX_VALUE_CHARACTERS = 2 << 30
_SPACE = " \t\n\r"


def read_json(part: Part, wanted: Sequence[str] | None) -> Iterator[RawRecord]:
    """Yield the objects of a file; the position is the number of the object, from 1.

    A file whose first object has none of the wanted fields is left out and counted with its name.

    Raises:
        DataError: the file is not JSON from some record on; nothing after a broken value can be trusted.
    """
    file = part.file
    with open_input(file.path) as stream, reading(file.path):
        values = _Values(io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape"), file.path)
        for number, value in enumerate(values, 1):
            data: Any = value
            if not isinstance(value, dict):
                found = f"a JSON {type(value).__name__}, not an object"
                data = SkippedRecordError("broken_records", found)
            elif number == 1:
                # Settings and metadata lie among the data of many a folder.
                data = _without_fields(value, wanted or ()) or value
            yield RawRecord(file, number, data)
            if isinstance(data, SkippedRecordError) and data.kind == "ignored_files":
                return


def _without_fields(value: dict[str, Any], wanted: Sequence[str]) -> SkippedRecordError | None:
    for name in wanted:
        try:
            if name not in OPTIONAL_FIELDS:
                lookup(value, name, place="")
        except DataError:
            keys = ", ".join(map(str, value))[:200]
            return SkippedRecordError(
                "ignored_files", f"no data: the first object has no field {name!r}, only {keys}"
            )
    return None


class _Values:
    """The values of an array, or values one after another."""

    def __init__(self, stream: io.TextIOWrapper, path: str) -> None:
        self._stream, self._path = stream, path
        self._text, self._at, self._ended = "", 0, False
        self._decoder = json.JSONDecoder()
        self._count = 0

    def __iter__(self) -> Iterator[Any]:
        if self._peek() == "[":
            self._at += 1
            yield from self._elements()
        else:
            while self._peek():
                yield self._value()

    def _elements(self) -> Iterator[Any]:
        if self._peek() != "]":
            while True:
                yield self._value()
                if self._peek() != ",":
                    break
                self._at += 1
                self._peek()
        if self._peek() != "]":
            self._fail("an array that is not closed")
        self._at += 1
        if self._peek():
            self._fail("text after the end of the array")

    def _peek(self) -> str:
        """Return the next character that is not space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(BLOCK_CHARACTERS):
                return ""

    def _more(self, count: int) -> bool:
        block = "" if self._ended else self._stream.read(count)
        self._ended = not block
        self._text = self._text[self._at :] + block
        self._at = 0
        return bool(block)

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number may go on in the next block; everything else ends where it ends.
                if end < len(self._text) or self._ended or not isinstance(value, (int, float)):
                    self._at = end
                    self._count += 1
                    return value
                self._more(BLOCK_CHARACTERS)
            except json.JSONDecodeError as error:
                # A value that runs on beyond what was read; twice as much each time, so the cost stays linear.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                held = len(self._text) - self._at
                if not cut or held > MAX_VALUE_CHARACTERS or not self._more(max(held, BLOCK_CHARACTERS)):
                    self._fail(error.msg)
            except (ValueError, RecursionError) as error:
                self._fail(str(error))

    def _fail(self, found: str) -> None:
        raise DataError(
            f"{self._path} is not valid JSON from record {self._count + 1} on",
            found=found,
            fix="mend or fetch the file again; write one object a line (.jsonl) to lose only what is broken",
        ) from None


JSON = Reader(read_json, parse_values, whole_file)
