"""JSON lines: one object a line. A file that is not compressed can be read in parts, cut at line borders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

import orjson

from longspan.data.readers.base import (
    FilePart,
    InputFile,
    RawRecord,
    Reader,
    SkippedRecordError,
    UTF8Values,
    whole_file,
)
from longspan.data.readers.fields import decode_utf8
from longspan.data.readers.opening import is_compressed, open_input

UTF8_BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 2 << 30
"""A longer line is counted as broken without being held in memory."""


def split_by_bytes(file: InputFile, part_bytes: int) -> list[FilePart]:
    """Cut at multiples of `part_bytes`: a line belongs to the part that its first byte lies in.

    Reads at most the first bytes of the file.
    """
    if file.size <= part_bytes or is_compressed(file.path):
        return whole_file(file, part_bytes)
    starts = range(0, file.size, part_bytes)
    stops = [*starts[1:], None]
    return [
        FilePart(file, start, stop, (stop or file.size) - start)
        for start, stop in zip(starts, stops, strict=True)
    ]


def read_lines(part: FilePart, wanted: Sequence[str] | None) -> Iterator[RawRecord]:
    """Yield every line that is not blank, with its byte offset as position."""
    file = part.file
    with open_input(file.path) as stream:
        offset = _find_line(stream, part)
        number = 1 if part.start == 0 else None
        while offset is not None and (part.stop is None or offset < part.stop):
            line = stream.readline(MAX_LINE_BYTES)
            if not line:
                return
            size = len(line)
            data: Any = line
            if size == MAX_LINE_BYTES and not line.endswith(b"\n"):
                del line
                data = SkippedRecordError("broken_records", f"a line of more than {MAX_LINE_BYTES} bytes")
                while not (rest := stream.readline(1 << 20)).endswith(b"\n") and rest:
                    size += len(rest)
                size += len(rest)
            else:  # a mark in the middle comes from files put together
                data = line.removeprefix(UTF8_BOM)
            if isinstance(data, SkippedRecordError) or (data and not data.isspace()):
                yield RawRecord(file, offset, data, number)
            offset += size
            number = None if number is None else number + 1


def _find_line(stream: IO[bytes], part: FilePart) -> int | None:
    """Move to the first line that starts in the part; return its offset, None if there is none."""
    if part.start == 0:
        return 0
    # The byte before tells whether a line starts exactly at the border.
    offset = part.start - 1
    stream.seek(offset)
    while part.stop is None or offset < part.stop:
        block = stream.readline(1 << 20)
        if not block:
            return None
        offset += len(block)
        if block.endswith(b"\n"):
            return offset
    return None


def parse_line(record: RawRecord) -> dict[str, Any]:
    """Read the object on one line."""
    try:
        value = orjson.loads(record.data)
        if isinstance(value, dict) and not _may_be_rounded(value):
            return UTF8Values(value)
    except (orjson.JSONDecodeError, RecursionError):
        pass
    # Python's own parser reads more (NaN, lone surrogates), and says what is wrong.
    try:
        value = json.loads(decode_utf8(record.data))
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a plain ValueError
        raise SkippedRecordError("broken_records", f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise SkippedRecordError("broken_records", f"a JSON {type(value).__name__}, not an object")
    return value


def _may_be_rounded(value: dict[str, Any]) -> bool:
    """Whether some number is a float of 2**63 or more, as which orjson reads integers beyond 64 bits."""
    held: list[Any] = [value]
    while held:
        each = held.pop()
        for inner in each.values() if isinstance(each, dict) else each:
            if isinstance(inner, float):
                if abs(inner) >= 1 << 63:
                    return True
            elif isinstance(inner, (dict, list)):
                held.append(inner)
    return False


JSONL = Reader(read_lines, parse_line, split_by_bytes)
