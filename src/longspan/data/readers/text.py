"""Text files: one file, one document; the source is the folder it lies in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from longspan.data.readers.base import Part, RawRecord, Reader, whole_file
from longspan.data.readers.fields import decode_utf8
from longspan.data.readers.jsonl import UTF8_BOM
from longspan.data.readers.opening import open_input


def read_whole(part: Part, wanted: Sequence[str] | None) -> Iterator[RawRecord]:
    """Yield the whole file as record 1."""
    with open_input(part.file.path) as stream:
        data = stream.read().removeprefix(UTF8_BOM)
    if data:
        yield RawRecord(part.file, 1, data)


def parse_text(record: RawRecord) -> dict[str, Any]:
    """Decode the file; line ends are kept as they are. Its place below the input is `path` and `folder`."""
    path = PurePosixPath(record.file.name)
    folder = path.parts[0] if len(path.parts) > 1 else ""
    return {"text": decode_utf8(record.data), "path": str(path), "folder": folder}


TEXT = Reader(read_whole, parse_text, whole_file, one_text=True)
