"""JSON files that are not lines: one array of objects, or objects one after another, read as a stream."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from longspan.data.readers.base import (
    FilePart,
    MissingFieldError,
    RawRecord,
    Reader,
    SkippedRecordError,
    parse_values,
    whole_file,
)
from longspan.data.readers.fields import missing_column
from longspan.data.readers.opening import DamagedFileError, open_input, reading

BLOCK_CHARACTERS = 1 << 20
MAX_VALUE_CHARACTERS = 2 << 30
_SPACE = " \t\n\r\ufeff"
"""A byte order mark in the middle comes from files put together."""
_ANY_NUMBERS = json.JSONDecoder(parse_int=str)
MAX_HELD = 10_000
"""Records that are held to see whether the file has any that can be used."""


class _NoJsonError(Exception):
    """Something that is not JSON; `record` is the number of the value it stands in."""

    def __init__(self, record: int, found: str) -> None:
        super().__init__(found)
        self.record = record


def read_json(part: FilePart, wanted: Sequence[str] | None) -> Iterator[RawRecord]:
    """Yield the objects of a file; the position is the number of the object, from 1.

    A file without any object that has the wanted fields is left out and counted as one, also if it is not JSON:
    settings, metadata and logs lie among the data of many a folder.

    Raises:
        DamagedFileError: a file of such objects is not JSON from some record on; nothing after a broken value can be
            trusted.
    """
    file = part.file
    held: list[RawRecord] | None = []
    """What could not be used so far, as long as nothing could."""
    with open_input(file.path) as stream, reading(file.path):
        values = _JsonValues(io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape"))
        try:
            for number, value in enumerate(values, 1):
                record = RawRecord(file, number, _usable(value, wanted or ()))
                if held is None:
                    yield record
                    continue
                held.append(record)
                if not isinstance(record.data, SkippedRecordError) or len(held) > MAX_HELD:
                    yield from held
                    held = None
        except _NoJsonError as error:
            if held is None:
                raise DamagedFileError(
                    f"{file.path} is not valid JSON from record {error.record} on",
                    found=str(error),
                    fix="mend or fetch the file again; write one object a line (.jsonl) to lose only what is broken",
                ) from None
            yield RawRecord(file, 1, SkippedRecordError("not_json", f"not valid JSON ({error})"))
            return
    if held:
        first = held[0].data
        of_file: SkippedRecordError = SkippedRecordError("other_files", first.reason, found=first.found)
        if isinstance(first, MissingFieldError):
            of_file = MissingFieldError(first.reason, found=first.found, of_file=True)
        yield RawRecord(file, 1, of_file)


def _usable(value: Any, wanted: Sequence[str]) -> dict[str, Any] | SkippedRecordError:
    if isinstance(value, SkippedRecordError):
        return value
    if not isinstance(value, dict):
        return SkippedRecordError("broken_records", f"a JSON {type(value).__name__}, not an object")
    missing = missing_column(value, wanted)
    return value if missing is None else MissingFieldError(missing.reason, found=missing.found)


class _JsonValues:
    """The values of an array, or values one after another."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream
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
            except RecursionError as error:
                self._fail(str(error))
            except ValueError as error:  # a number of 5000 digits
                _, self._at = _ANY_NUMBERS.raw_decode(self._text, self._at)
                self._count += 1
                return SkippedRecordError("broken_records", str(error))

    def _fail(self, found: str) -> NoReturn:
        raise _NoJsonError(self._count + 1, found) from None


JSON = Reader(read_json, parse_values, whole_file)
