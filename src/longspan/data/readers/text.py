"""Text files: one file, one document; the source is the folder it lies in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from longspan.core.errors import DataError
from longspan.data.readers.base import FilePart, RawRecord, Reader, SkippedRecordError, whole_file
from longspan.data.readers.fields import decode_utf8
from longspan.data.readers.jsonl import UTF8_BOM
from longspan.data.readers.opening import is_remote, open_input


def read_whole(part: FilePart, wanted: Sequence[str] | None) -> Iterator[RawRecord]:
    """Yield the whole file as record 1."""
    try:
        with open_input(part.file.path) as stream:
            data: Any = stream.read().removeprefix(UTF8_BOM)
    except DataError as error:
        # The file is the record, and one record ends no job; one that has vanished is another matter.
        if is_remote(part.file.path) or not os.path.exists(part.file.path):
            raise
        data = SkippedRecordError("broken_records", str(error).splitlines()[0])
    if data:
        yield RawRecord(part.file, 1, data)


def parse_text(record: RawRecord) -> dict[str, Any]:
    """Decode the file; line ends are kept as they are. Its place below the input is `path` and `folder`."""
    path = PurePosixPath(record.file.name)
    folder = path.parts[0] if len(path.parts) > 1 else ""
    return {"text": decode_utf8(record.data), "path": str(path), "folder": folder}


TEXT = Reader(read_whole, parse_text, whole_file, one_text=True)
