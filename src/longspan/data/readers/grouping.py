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
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from longspan.core.errors import ArgumentError
from longspan.core.files import disk_errors
from longspan.core.log import printable
from longspan.data.readers.base import (
    Document,
    Fields,
    FilePart,
    InputFile,
    RawRecord,
    ReadReport,
    SkippedRecordError,
)
from longspan.data.readers.fields import lookup
from longspan.data.readers.reading import READERS, make_document, parse_values_of, records_of, skip_record

NUM_BUCKETS = 256
RUN_BYTES = 1 << 25
RECORDS, INDEX = "records", "index"
_HEAD = struct.Struct("<II")
_WHOLE = re.compile(r"[-+]?[0-9]{1,1000}")
_DIGITS = re.compile(r"[0-9]+")
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
    """Field that orders the records of a group, by number or by text (see `_order_key`); ties and None: canonical
    order."""
    header: str | None = None
    """Field with a file name that is written as a comment line above each record."""
    separator: str = "\n\n"

    @property
    def names(self) -> tuple[str, ...]:
        """Fields to read besides those of the document."""
        return tuple(name for name in (self.by, self.order, self.header) if name is not None)


class _Kept(NamedTuple):
    """Where a record of a bucket stands; sorts by group, then canonically."""

    digest: bytes
    group: str
    path: str
    position: int
    folder: int
    """Number of the folder that holds it."""
    offset: int
    """Where its bytes start in the records of that folder."""
    order: int | float | str | None
    """What the record is ordered by in its group."""


def read_grouped(
    files: Sequence[InputFile], fields: Fields, grouping: Grouping, *, strict: bool, report: ReadReport
) -> Iterator[Document]:
    """Yield one document per group; its source, path and position are those of its first record.

    Raises:
        DataError: (`strict`) a field is missing or does not name a group; see also `reading.parse_record`.
        RunError: the disk for temporary files is full.
    """
    with tempfile.TemporaryDirectory(prefix="longspan-group-") as scratch:
        folder, count = Path(scratch), NUM_BUCKETS
        with disk_errors(folder.parent):
            deal(
                map(FilePart, files),
                fields,
                grouping,
                folder,
                num_buckets=count,
                strict=strict,
                report=report,
            )
        report.documents = 0
        for number in range(count):
            yield from read_bucket([folder], number, grouping, num_buckets=count, report=report)


def deal(
    parts: Iterable[FilePart],
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
    parts: Iterable[FilePart],
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
            try:
                kept = {name: lookup(values, name) for name in grouping.names}
                group = _name(kept[grouping.by], grouping.by)
                order = None if grouping.order is None else _order(kept[grouping.order], grouping.order)
            except SkippedRecordError as error:
                skip_record(record, error, strict=strict, report=report)
                continue
            document = make_document(values, record, fields, strict=strict, report=report)
            if document is None:
                continue
            header = None if grouping.header is None else kept[grouping.header]
            head = _head(document, record, fields, grouping, group=group, order=order, header=header)
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
    document: Document,
    record: RawRecord,
    fields: Fields,
    grouping: Grouping,
    *,
    group: str,
    order: int | float | str | None,
    header: Any,
) -> dict[str, Any]:
    """Return what is kept beside the text of a record."""
    source = document.source
    if grouping.by == FOLDER and fields.source is None and READERS[record.file.extension].one_text:
        # The folder is the document here, so it cannot be the source as well.
        source = printable(PurePosixPath(record.file.path.removesuffix(record.file.name)).name) or source
    # A record without a group is one by itself: nothing else has its path and position.
    own = f"{record.file.path}\0{document.position}"
    return {
        "digest": hashlib.blake2b((group or own).encode(errors="surrogateescape"), digest_size=8).hexdigest(),
        "group": group or own,
        "order": order,
        "header": None if header is None else _comment(str(header)),
        "source": source,
        "path": document.path,
        "position": document.position,
        "weights": document.weights,
    }


def _name(value: Any, field: str) -> str:
    if value is not None and not isinstance(value, (str, int)):
        raise SkippedRecordError(
            "wrong_types", f"field {field!r} does not name a group", found=repr(value)[:80]
        )
    return "" if value is None else printable(str(value))


def _order(value: Any, field: str) -> int | float | str | None:
    """Return what a record is ordered by: a number, also if it is written as text, or a text."""
    if isinstance(value, date):  # of a column
        value = value.isoformat()
    if isinstance(value, str):
        clean = value.strip()
        return int(clean) if _WHOLE.fullmatch(clean) else printable(value)
    if value is None or (isinstance(value, (int, float)) and value == value):
        return value
    raise SkippedRecordError("wrong_types", f"field {field!r} does not order records", found=repr(value)[:80])


def _comment(name: str) -> str:
    clean = printable(name).replace("\n", " ")
    return _COMMENT_OF.get(PurePosixPath(clean).suffix.lower(), "# ") + clean + "\n"


def _order_key(members: Sequence[_Kept], report: ReadReport) -> Callable[[_Kept], tuple[Any, ...]]:
    """Return the key that orders the records of a group: those without a value first, then by number or by text.

    Where some have numbers and some texts, numbers count as texts, and all texts are ordered with the whole numbers
    in them by their value: "part 2" stands before "part 10".
    """
    texts = sum(isinstance(each.order, str) for each in members)
    if texts and texts < sum(each.order is not None for each in members):
        report.mixed_orders += 1

    def key(each: _Kept) -> tuple[Any, ...]:
        if each.order is None:
            place: tuple[Any, ...] = (0,)
        else:
            place = (1, _natural(str(each.order)) if texts else each.order)
        return (*place, each.path, each.position)

    return key


def _natural(text: str) -> str:
    """Return what orders a text with its whole numbers by their value: each is led by a 0 and its length."""

    def led(number: re.Match[str]) -> str:
        digits = number[0].lstrip("0") or "0"
        return f"0{len(digits):09}{digits}"

    return f"{_DIGITS.sub(led, text)}\0{text}"


def read_bucket(
    folders: Sequence[Path], number: int, grouping: Grouping, *, num_buckets: int, report: ReadReport
) -> Iterator[Document]:
    """Yield one document per group of bucket `number` of folders that `deal` wrote, in order of their hashes.

    `report` counts the documents.
    """
    kept = sorted(_places(folders, number, num_buckets), key=lambda each: (each.digest, each.group))
    for _, group in groupby(kept, key=lambda each: (each.digest, each.group)):
        members = list(group)
        members.sort(key=_order_key(members, report))
        report.documents += 1
        yield _join(_read(folders, members), grouping)


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
                    yield _Kept(digest, head["group"], *place, head["order"])
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
