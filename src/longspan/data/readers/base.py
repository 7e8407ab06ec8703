"""What every reader yields and counts: documents, raw records, parts of files, and a report of what was left
out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from longspan.core.log import get_logger
from longspan.data.readers.opening import COMPRESSION, is_remote, open_input

MAX_EXAMPLES = 5
LINE_EXTENSIONS = (".jsonl", ".ndjson")
"""Formats whose positions are byte offsets of lines."""


class RecordPlace(NamedTuple):
    """Where a record stands, written for people only when a message needs it."""

    path: str
    position: int
    line: int | None = None
    """Line number from 1, where the reader knows it without extra work."""
    in_bytes: bool = False
    """Whether the position is the byte offset of a line."""

    def __str__(self) -> str:
        """Write `file:line`, or `file: record n`; may count the lines before a byte offset."""
        if self.line is not None:
            return f"{self.path}:{self.line}"
        if not self.in_bytes:
            return f"{self.path}: record {self.position}"
        if is_remote(self.path):
            return f"{self.path}: byte {self.position}"
        return f"{self.path}:{_line_at(self.path, self.position)}"


class Document(NamedTuple):
    """One text with the place it came from."""

    text: str
    source: str
    """Name of the corpus part, the unit of mixtures ("book", "arxiv", ...)."""
    path: str
    """Canonical path of the file."""
    position: int
    """Where the record stands in the file: the byte offset of its line (after decompression) in a JSON-lines
    file, the number of the record from 1 in every other format. Never depends on how the file was split."""
    weights: list[tuple[int, int, int]] | None = None
    """Loss weights: (first character, character after the last, weight 0..255); 1 elsewhere. None: all 1."""
    messages: list[Any] | None = None
    """Turns of a conversation as the record holds them; `text` is then their JSON. See `data.chat`."""
    variables: dict[str, Any] | None = None
    """Other fields of the record that belong to the conversation, such as `tools`; in `text` too."""

    @property
    def place(self) -> RecordPlace:
        """Where the document stands, for messages: `str(place)` is `file:line` or `file: record n`."""
        return RecordPlace(self.path, self.position, in_bytes=extension_of(self.path) in LINE_EXTENSIONS)


class InputFile(NamedTuple):
    """A file to read: its path, the extension that picks the reader, and the source its folder suggests."""

    path: str
    extension: str
    """Key of `READERS`: that of the content, where the name says nothing or something else."""
    source: str
    size: int
    """Bytes on disk, compressed if the file is compressed."""
    name: str = ""
    """Path below the input folder; the file's own name if it was given alone."""


class FilePart(NamedTuple):
    """A stretch of one file that is read by itself, in any process.

    The records of the parts of a file, one part after another, are the records of the file.
    """

    file: InputFile
    start: int = 0
    stop: int | None = None
    """Half-open range in the reader's unit (bytes of a line format, row groups of parquet, record batches of
    arrow, shards of MDS). None: to the end."""
    size: int = 0
    """About how many bytes of input it stands for."""


class RawRecord(NamedTuple):
    """One record, cut out but not yet parsed; can be sent to another process."""

    file: InputFile
    position: int
    data: Any
    """Bytes of a line or a text file, or the fields of a record, or the SkippedRecordError it ended in."""
    line: int | None = None

    @property
    def place(self) -> RecordPlace:
        """Where the record stands, for messages."""
        return RecordPlace(self.file.path, self.position, self.line, self.file.extension in LINE_EXTENSIONS)


class Fields(NamedTuple):
    """Which fields of a record hold what; a dotted name reaches into nested objects."""

    text: str = "text"
    source: str | None = None
    messages: str | None = None
    """Field of conversations ("messages", "conversations"); then no text field is read."""

    variables: tuple[str, ...] = ()
    """Fields that belong to a conversation, where a record has them ("tools")."""

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names to read; those that a record may lack are `OptionalField`."""
        names = (self.messages or self.text, self.source)
        optional = map(OptionalField, (WEIGHTS_FIELD, *self.variables))
        return (*(name for name in names if name is not None), *optional)


class OptionalField(str):
    """Name of a field that a record may lack."""

    __slots__ = ()


WEIGHTS_FIELD = "loss_weights"


class SkippedRecordError(Exception):
    """A record that cannot be used, or a file without one; `kind` is the counter of ReadReport it belongs to."""

    def __init__(self, kind: str, reason: str, *, found: str | None = None) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason, self.found = kind, reason, found

    def __str__(self) -> str:
        return self.reason if self.found is None else f"{self.reason} ({self.found})"


def damaged(file: InputFile, position: int, error: Exception) -> RawRecord:
    """Return what stands for the records of a damaged file from a position on."""
    what, *more = str(error).split("\n  ")
    found = next((each.removeprefix("found: ") for each in more if each.startswith("found: ")), None)
    reason = what.removeprefix(f"{file.path} ").removeprefix("is ")
    return RawRecord(file, position, SkippedRecordError("damaged_files", reason, found=found))


class MissingFieldError(SkippedRecordError):
    """A record lacks a wanted field; `of_file`: so do all records of its file, whose columns say so."""

    def __init__(self, reason: str, *, found: str | None, of_file: bool = False) -> None:
        super().__init__("other_files" if of_file else "missing_fields", reason, found=found)


class Reader(NamedTuple):
    """A file format: how to cut a file into parts and a part into records, and how to parse one record."""

    records: Callable[[FilePart, Sequence[str] | None], Iterator[RawRecord]]
    """Yield the records of a part; only the fields named need to be read (None: all of them)."""
    parse: Callable[[RawRecord], dict[str, Any]]
    """Return the fields of a record that is none itself of SkippedRecordError. Raise that for a broken one."""
    split: Callable[[InputFile, int], list[FilePart]]
    """Cut a file into parts of about so many bytes; a function of the file alone."""
    one_text: bool = False
    """The file is one text, named by the folder it lies in; other files are containers of records."""
    compressible: bool = True
    """Whether such files are also read with .gz, .zst and .bz2 at the end."""


def whole_file(file: InputFile, part_bytes: int) -> list[FilePart]:
    """Return the file as one part, for formats that can only be read from the start."""
    return [FilePart(file, size=file.size)]


def cut_between(file: InputFile, sizes: Sequence[int], part_bytes: int) -> list[FilePart]:
    """Cut a file between its blocks of `sizes`, each part of at least `part_bytes` of them but the last."""
    parts: list[FilePart] = []
    start = held = 0
    for number, size in enumerate(sizes):
        held += size
        if held >= part_bytes or number + 1 == len(sizes):
            parts.append(FilePart(file, start, number + 1, held))
            start, held = number + 1, 0
    return parts if len(parts) > 1 else whole_file(file, part_bytes)


def parse_values(record: RawRecord) -> dict[str, Any]:
    """Return the fields of a record that the format itself has already parsed."""
    fields: dict[str, Any] = record.data
    return fields


class UTF8Values(dict[str, Any]):
    """Fields whose texts are known to have a UTF-8 form; others may hold half of a surrogate pair."""


class Example(NamedTuple):
    """One thing that was left out."""

    place: RecordPlace | str
    reason: str
    kind: str = ""
    """The counter it belongs to."""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


OF_FILES = ("empty_files", "other_files", "not_json", "damaged_files")
"""Counters of whole files."""
OF_RECORDS = ("broken_records", "missing_fields", "wrong_types", "invalid_text", "empty_documents")
_LEFT_OUT = {
    "broken_records": "broken records",
    "missing_fields": "records without a wanted field",
    "wrong_types": "records with a field of another type",
    "invalid_text": "records with invalid text",
    "empty_documents": "empty documents",
    "empty_files": "empty files",
    "other_files": "files without a wanted field",
    "damaged_files": "damaged or cut-off files, or parts of files",
    "not_json": "files that are not JSON, whatever their name says",
    "cards": "cards of data sets",
    "token_stores": "token stores",
    "duplicate_files": "files given more than once",
    "dead_links": "links to nothing",
    "linked_loops": "links to folders that are read already",
    "unreadable": "files or folders that may not be read",
}
_NO_LOSS = ("cards", "token_stores", "duplicate_files", "linked_loops")
"""Of these, what is no data, or is read already."""


@dataclass
class ReadReport:
    """Counts of what was read and what was left out, with the first few places by name."""

    files: int = 0
    documents: int = 0
    empty_files: int = 0
    ignored_files: int = 0
    """Files of a folder that no reader knows."""
    other_files: int = 0
    """Files of which no record has a wanted field: settings and metadata among the data."""
    damaged_files: int = 0
    """Files, or stretches of them, that cannot be read; what stands before and behind them is."""
    not_json: int = 0
    """Files called .json that are something else."""
    cards: int = 0
    """README.md and the like of a data set folder, which are about the data."""
    token_stores: int = 0
    """Token stores and other folders of ours below an input folder."""
    duplicate_files: int = 0
    """Inputs that lead to a file that is read already, by another link or another argument."""
    dead_links: int = 0
    linked_loops: int = 0
    """Linked folders that lead to a folder that is read already."""
    unreadable: int = 0
    broken_records: int = 0
    missing_fields: int = 0
    wrong_types: int = 0
    """Records of which a field holds something else than it must: a number for text, null for a source."""
    invalid_text: int = 0
    """Records with bytes that are not UTF-8, or with lone surrogates."""
    empty_documents: int = 0
    """Documents without a single character, or without a single token."""
    mixed_orders: int = 0
    """Groups whose order is by numbers in some records and by texts in others; they are read."""
    notes: dict[str, int] = field(default_factory=dict)
    """What a chat template left out of conversations that are kept, with a number of turns."""
    remarks: dict[str, int] = field(default_factory=dict)
    """What is to be known of conversations that are kept whole."""
    examples: list[Example] = field(default_factory=list)
    ignored_names: list[str] = field(default_factory=list)
    """The first few ignored files."""

    def skip(self, kind: str, place: RecordPlace | str, reason: str) -> None:
        """Count one record or file under `kind` and keep its place if few are kept yet, or none of its kind."""
        setattr(self, kind, getattr(self, kind) + 1)
        self._keep(Example(place, reason, kind))

    def _keep(self, example: Example) -> None:
        if len(self.examples) < MAX_EXAMPLES or all(each.kind != example.kind for each in self.examples):
            self.examples.append(example)

    def note(self, notes: Mapping[str, int], *, remarks: Collection[str] = ()) -> None:
        """Add to what was left out of conversations that are kept; `remarks` are those by which nothing was."""
        for name, count in notes.items():
            counts = self.remarks if name in remarks else self.notes
            counts[name] = counts.get(name, 0) + count

    def ignore(self, path: str) -> None:
        """Count a file that no reader knows."""
        self.ignored_files += 1
        if len(self.ignored_names) < MAX_EXAMPLES:
            self.ignored_names.append(path)

    def add(self, other: ReadReport) -> None:
        """Add the counts of another report, which comes later in canonical order."""
        for each in dataclasses.fields(self):
            if each.name == "examples":
                for example in other.examples:
                    self._keep(example)
            elif each.name in ("notes", "remarks"):
                self.note(getattr(other, each.name), remarks=other.remarks)
            elif each.name == "ignored_names":
                self.ignored_names = [*self.ignored_names, *other.ignored_names][:MAX_EXAMPLES]
            else:
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @property
    def num_skipped(self) -> int:
        """Records left out, whatever the reason."""
        return sum(getattr(self, kind) for kind in OF_RECORDS)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and examples for a manifest."""
        return {**dataclasses.asdict(self), "examples": list(map(str, self.examples))}

    def warning(self) -> str | None:
        """Return one message about everything left out or doubtful, or None if nothing was."""
        left_out = [f"{count} {name}" for kind, name in _LEFT_OUT.items() if (count := getattr(self, kind))]
        if self.ignored_files:
            more = ", ..." if self.ignored_files > len(self.ignored_names) else ""
            left_out.append(
                f"{self.ignored_files} files of unknown kind ({', '.join(self.ignored_names)}{more})"
            )
        read = f" ({self.documents} documents read)" if self.documents else ""
        lines = [f"left out: {', '.join(left_out)}{read}"] if left_out else []
        lines += [f"  {each}" for each in self.examples]
        if self.mixed_orders:
            lines.append(
                f"{self.mixed_orders} groups hold numbers and texts to order by: all are ordered as texts there, "
                "numbers in them by their value"
            )
        lines += [f"{count} {name}" for name, count in self.notes.items()]
        return "\n".join(lines) if lines else None

    def log(self) -> None:
        """Say what was left out or is doubtful, as a warning where data may be lost by it; then the remarks."""
        kinds = [kind for kind in _LEFT_OUT if kind not in _NO_LOSS]
        lost = any(getattr(self, kind) for kind in (*kinds, "ignored_files", "mixed_orders", "notes"))
        if (text := self.warning()) is not None:
            get_logger("data.readers").log(logging.WARNING if lost else logging.INFO, text)
        for name, count in self.remarks.items():
            get_logger("data.readers").info("%d %s", count, name)


def extension_of(path: str) -> str:
    """Return the extension that names the format: ".jsonl" for "a.jsonl.zst"."""
    pure = PurePosixPath(path)
    if pure.suffix.lower() in COMPRESSION:
        pure = pure.with_suffix("")
    return pure.suffix.lower()


def _line_at(path: str, offset: int) -> int:
    line, left = 1, offset
    with open_input(path) as stream:
        while left > 0 and (block := stream.read(min(left, 1 << 20))):
            line += block.count(b"\n")
            left -= len(block)
    return line
