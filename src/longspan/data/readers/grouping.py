"""Joining records into long documents: the files of one code repository, the chapters of one book.

Records are dealt by the hash of their group into files on disk; then one file after another is put in order and
its groups are read out. Memory holds the places of one file's records and the text of one group, whatever the
size of the corpus; the disk (`TMPDIR`) holds the texts once more while they are joined. Groups come out in the
order of their hashes, so neither the order of input files nor the number of files on disk shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import disk_errors
from longspan.data.readers.base import Document, Fields, InputFile, Part, RawRecord, ReadReport
from longspan.data.readers.fields import lookup
from longspan.data.readers.reading import READERS, make_document, parse_values_of, records_of

NUM_BUCKETS = 256
_HEAD = struct.Struct("<II")
FOLDER = "folder"
"""Field of a text file: the first folder below the input."""

_COMMENTS = {
    "// ": ".c .h .cc .cpp .cxx .hh .hpp .cu .cuh .js .jsx .mjs .ts .tsx .java .kt .scala .go .rs .cs .swift .php .zig",
    "-- ": ".lua .sql .hs",
    "% ": ".tex .erl",
    "; ": ".lisp .el .clj",
}
_COMMENT_OF = {extension: mark for mark, names in _COMMENTS.items() for extension in names.split()}


class Grouping(NamedTuple):
    """How records become one document."""

    by: str
    """Field whose value the records of a group share; a record without a value stays alone. A text file has
    the fields `path` and `folder` (the first below the input)."""
    order: str | None = None
    """Field that orders the records of a group, numbers before texts; ties and None: canonical order."""
    header: str | None = None
    """Field with a file name that is written as a comment line above each record."""
    separator: str = "\n\n"

    @property
    def names(self) -> tuple[str, ...]:
        """Fields to read besides those of the document."""
        return tuple(name for name in (self.by, self.order, self.header) if name is not None)


class _Kept(NamedTuple):
    """Where a record of a bucket stands; sorts by group, then by order, then canonically."""

    digest: bytes
    group: str
    order: tuple[int, float, str]
    path: str
    position: int
    offset: int
    """Where its bytes start in the bucket."""


def read_grouped(
    files: Sequence[InputFile], fields: Fields, grouping: Grouping, *, strict: bool, report: ReadReport
) -> Iterator[Document]:
    """Yield one document per group; its source, path and position are those of its first record.

    Raises:
        DataError: a field is missing or does not name a group; see also `reading.parse_record`.
        RunError: the disk for temporary files is full.
    """
    if fields.messages is not None:
        raise ArgumentError("conversations cannot be grouped", fix="leave out --group-by")
    with tempfile.TemporaryDirectory(prefix="longspan-group-") as scratch:
        with disk_errors(scratch):
            _deal(files, fields, grouping, Path(scratch), strict, report)
        report.documents = 0
        for number in range(NUM_BUCKETS):
            path = Path(scratch, str(number))
            if path.exists():
                for document in _join_bucket(path, grouping):
                    report.documents += 1
                    yield document
                path.unlink()


def _deal(
    files: Iterable[InputFile],
    fields: Fields,
    grouping: Grouping,
    scratch: Path,
    strict: bool,
    report: ReadReport,
) -> None:
    wanted = (*fields.wanted, *grouping.names)
    buckets: dict[int, IO[bytes]] = {}
    with ExitStack() as stack:
        for file in files:
            for record in records_of(Part(file), wanted, report=report):
                values = parse_values_of(record, strict=strict, report=report)
                if values is None:
                    continue
                document = make_document(values, record, fields, strict=strict, report=report)
                if document is None:
                    continue
                head = _head(document, values, record, fields, grouping)
                number = bytes.fromhex(head["digest"])[0] * NUM_BUCKETS // 256
                if number not in buckets:
                    buckets[number] = stack.enter_context(
                        open(scratch / str(number), "wb", buffering=1 << 16)
                    )
                packed, text = json.dumps(head).encode(), document.text.encode()
                buckets[number].write(_HEAD.pack(len(packed), len(text)) + packed)
                buckets[number].write(text)


def _head(
    document: Document, values: dict[str, Any], record: RawRecord, fields: Fields, grouping: Grouping
) -> dict[str, Any]:
    """Return what is kept beside the text of a record."""
    group = _name(lookup(values, grouping.by, place=record.place), grouping.by, record)
    source = document.source
    if grouping.by == FOLDER and fields.source is None and READERS[record.file.extension].one_text:
        # The folder is the document here, so it cannot be the source as well.
        source = PurePosixPath(record.file.path.removesuffix(record.file.name)).name or source
    order = None if grouping.order is None else lookup(values, grouping.order, place=record.place)
    header = None if grouping.header is None else lookup(values, grouping.header, place=record.place)
    # A record without a group is one by itself: nothing else has its path and position.
    own = f"{record.file.path}\0{document.position}"
    return {
        "digest": hashlib.blake2b((group or own).encode(), digest_size=8).hexdigest(),
        "group": group or own,
        "order": _order(order, grouping.order, record),
        "header": None if header is None else _comment(str(header)),
        "source": source,
        "path": document.path,
        "position": document.position,
        "weights": document.weights,
    }


def _name(value: Any, field: str, record: RawRecord) -> str:
    if value is not None and not isinstance(value, (str, int)):
        raise DataError(f"{record.place}: field {field!r} does not name a group", found=repr(value)[:80])
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _order(value: Any, field: str | None, record: RawRecord) -> tuple[int, float, str]:
    if value is None:
        return (0, 0, "")
    if isinstance(value, (int, float)):
        return (1, value, "")
    if isinstance(value, str):
        return (2, 0, value.encode("utf-8", "replace").decode())
    raise DataError(f"{record.place}: field {field!r} does not order records", found=repr(value)[:80])


def _comment(name: str) -> str:
    clean = name.encode("utf-8", "replace").decode().replace("\n", " ")
    return _COMMENT_OF.get(PurePosixPath(clean).suffix.lower(), "# ") + clean + "\n"


def _join_bucket(path: Path, grouping: Grouping) -> Iterator[Document]:
    with open(path, "rb", buffering=1 << 20) as file:
        kept = sorted(_places(file))
        for _, members in groupby(kept, key=lambda each: (each.digest, each.group)):
            yield _join([_read(file, each.offset) for each in members], grouping)


def _places(file: IO[bytes]) -> Iterator[_Kept]:
    paths: dict[str, str] = {}  # one string for all records of a file
    offset = 0
    while raw := file.read(_HEAD.size):
        head_bytes, text_bytes = _HEAD.unpack(raw)
        head = json.loads(file.read(head_bytes))
        file.seek(text_bytes, os.SEEK_CUR)
        place = paths.setdefault(head["path"], head["path"]), head["position"], offset
        yield _Kept(bytes.fromhex(head["digest"]), head["group"], tuple(head["order"]), *place)
        offset += _HEAD.size + head_bytes + text_bytes


def _read(file: IO[bytes], offset: int) -> tuple[dict[str, Any], str]:
    file.seek(offset)
    head_bytes, text_bytes = _HEAD.unpack(file.read(_HEAD.size))
    return json.loads(file.read(head_bytes)), file.read(text_bytes).decode()


def _join(members: list[tuple[dict[str, Any], str]], grouping: Grouping) -> Document:
    texts: list[str] = []
    weights: list[tuple[int, int, int]] = []
    length = 0
    for head, text in members:
        before = (grouping.separator if texts else "") + (head["header"] or "")
        length += len(before)
        weights += [(start + length, end + length, weight) for start, end, weight in head["weights"] or ()]
        length += len(text)
        texts += [before, text]
    first = members[0][0]
    return Document("".join(texts), first["source"], first["path"], first["position"], weights or None)
