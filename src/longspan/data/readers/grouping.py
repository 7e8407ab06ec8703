"""Joining records into long documents: the files of one code repository, the chapters of one book.

Records are dealt by the hash of their group into buckets on disk; then one bucket after another is put in order
and its groups are read out.

    FOLDER/records      runs: the records of up to 32 MiB of input, sorted by bucket
    FOLDER/index        for each run, where its buckets begin: int64 [runs, buckets + 1]

Memory holds one run, or the places of one bucket's records and the text of one group, whatever the size of the
corpus; the disk holds the texts once more while they are joined. Several folders may be dealt side by side, and
every bucket of them read by itself. Groups come out in the order of their hashes, so neither the order of input
files nor the number of folders or buckets shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import disk_errors
from longspan.data.readers.base import Document, Fields, InputFile, Part, RawRecord, ReadReport
from longspan.data.readers.fields import lookup
from longspan.data.readers.reading import READERS, make_document, parse_values_of, records_of

NUM_BUCKETS = 256
RUN_BYTES = 1 << 25
RECORDS, INDEX = "records", "index"
_HEAD = struct.Struct("<II")
_SPAN = struct.Struct("<qq")
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
    folder: int
    """Number of the folder that holds it."""
    offset: int
    """Where its bytes start in the records of that folder."""


def read_grouped(
    files: Sequence[InputFile], fields: Fields, grouping: Grouping, *, strict: bool, report: ReadReport
) -> Iterator[Document]:
    """Yield one document per group; its source, path and position are those of its first record.

    Raises:
        DataError: a field is missing or does not name a group; see also `reading.parse_record`.
        RunError: the disk for temporary files is full.
    """
    with tempfile.TemporaryDirectory(prefix="longspan-group-") as scratch:
        folder, count = Path(scratch), NUM_BUCKETS
        with disk_errors(scratch):
            deal(map(Part, files), fields, grouping, folder, num_buckets=count, strict=strict, report=report)
        report.documents = 0
        for number in range(count):
            for document in read_bucket([folder], number, grouping, num_buckets=count):
                report.documents += 1
                yield document


def deal(
    parts: Iterable[Part],
    fields: Fields,
    grouping: Grouping,
    folder: Path,
    *,
    num_buckets: int,
    strict: bool,
    report: ReadReport,
) -> None:
    """Write the records of `parts` into the buckets of an empty folder; `report` counts records as documents.

    Raises:
        ArgumentError: conversations cannot be grouped.
        DataError: see `read_grouped`.
    """
    if fields.messages is not None:
        raise ArgumentError("conversations cannot be grouped", fix="leave out --group-by")
    held: list[list[bytes]] = [[] for _ in range(num_buckets)]
    size = 0
    with open(folder / RECORDS, "wb") as records, open(folder / INDEX, "wb") as index:
        for number, data in _dealt(parts, fields, grouping, num_buckets, strict, report):
            held[number].append(data)
            size += len(data)
            if size >= RUN_BYTES:
                _write_run(held, records, index)
                size = 0
        if size:
            _write_run(held, records, index)


def _dealt(
    parts: Iterable[Part],
    fields: Fields,
    grouping: Grouping,
    num_buckets: int,
    strict: bool,
    report: ReadReport,
) -> Iterator[tuple[int, bytes]]:
    """Yield the bucket of each record and what is kept of it."""
    wanted = (*fields.wanted, *grouping.names)
    for part in parts:
        for record in records_of(part, wanted, report=report):
            values = parse_values_of(record, strict=strict, report=report)
            if values is None:
                continue
            document = make_document(values, record, fields, strict=strict, report=report)
            if document is None:
                continue
            head = _head(document, values, record, fields, grouping)
            # The first 64 bits of 0..2**64, cut into equal ranges.
            number = int(head["digest"], 16) * num_buckets >> 64
            packed, text = json.dumps(head).encode(), document.text.encode()
            yield number, b"".join((_HEAD.pack(len(packed), len(text)), packed, text))


def _write_run(held: list[list[bytes]], records: IO[bytes], index: IO[bytes]) -> None:
    place = records.tell()
    places = [place]
    for bucket in held:
        records.writelines(bucket)
        place += sum(map(len, bucket))
        places.append(place)
        bucket.clear()
    index.write(struct.pack(f"<{len(places)}q", *places))


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


def read_bucket(
    folders: Sequence[Path], number: int, grouping: Grouping, *, num_buckets: int
) -> Iterator[Document]:
    """Yield one document per group of bucket `number` of folders that `deal` wrote, in order of their hashes."""
    kept = sorted(_places(folders, number, num_buckets))
    for _, members in groupby(kept, key=lambda each: (each.digest, each.group)):
        yield _join(_read(folders, list(members)), grouping)


def _places(folders: Sequence[Path], number: int, num_buckets: int) -> Iterator[_Kept]:
    """Yield where every record of a bucket stands."""
    paths: dict[str, str] = {}  # one string for all records of a file
    for folder, path in enumerate(folders):
        spans = list(_spans(path / INDEX, number, num_buckets))
        if not spans:
            continue
        with open(path / RECORDS, "rb", buffering=1 << 17) as file:
            for start, stop in spans:
                file.seek(start)
                while start < stop:
                    head_bytes, text_bytes = _HEAD.unpack(file.read(_HEAD.size))
                    head = json.loads(file.read(head_bytes))
                    file.seek(text_bytes, os.SEEK_CUR)
                    place = paths.setdefault(head["path"], head["path"]), head["position"], folder, start
                    digest = bytes.fromhex(head["digest"])
                    yield _Kept(digest, head["group"], tuple(head["order"]), *place)
                    start += _HEAD.size + head_bytes + text_bytes


def _read(folders: Sequence[Path], members: list[_Kept]) -> list[tuple[dict[str, Any], str]]:
    """Return head and text of each record, opening every file once."""
    found: dict[int, tuple[dict[str, Any], str]] = {}
    by_folder = sorted(range(len(members)), key=lambda number: members[number].folder)
    for folder, numbers in groupby(by_folder, key=lambda number: members[number].folder):
        with open(folders[folder] / RECORDS, "rb") as file:
            for number in numbers:
                file.seek(members[number].offset)
                head_bytes, text_bytes = _HEAD.unpack(file.read(_HEAD.size))
                found[number] = json.loads(file.read(head_bytes)), file.read(text_bytes).decode()
    return [found[number] for number in range(len(members))]


def _spans(index: Path, number: int, num_buckets: int) -> Iterator[tuple[int, int]]:
    """Yield where a bucket stands in each run that has some of it."""
    row_bytes = 8 * (num_buckets + 1)
    with open(index, "rb", buffering=0) as file:
        for run in range(os.fstat(file.fileno()).st_size // row_bytes):
            file.seek(run * row_bytes + 8 * number)
            start, stop = _SPAN.unpack(file.read(_SPAN.size))
            if start < stop:
                yield start, stop


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
