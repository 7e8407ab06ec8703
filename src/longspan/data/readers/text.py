"""Text files: one file, one document; the source is the folder it lies in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from longspan.data.readers.base import Document, Fields, RawRecord, Reader, decode_utf8
from longspan.data.readers.jsonl import UTF8_BOM


def split_whole(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the whole file as record 1."""
    data = stream.read().removeprefix(UTF8_BOM)
    if data:
        yield 1, data


def parse_text(record: RawRecord, fields: Fields) -> Document:
    """Decode the file. Line ends are kept as they are."""
    return Document(decode_utf8(record.data), record.file.source, record.file.path, record.position)


TEXT = Reader(split_whole, parse_text)
