"""What every reader yields and counts: documents, raw records, and a report of what was left out."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from longspan.core.errors import DataError

MAX_EXAMPLES = 5


class Document(NamedTuple):
    """One text with the place it came from."""

    text: str
    source: str
    """Name of the corpus part, the unit of mixtures ("book", "arxiv", ...)."""
    path: str
    """Canonical path of the file."""
    position: int
    """Record number inside the file, from 1 (the line number of a JSON-lines file)."""
    weights: list[tuple[int, int, int]] | None = None
    """Loss weights: (first character, character after the last, weight 0..255); 1 elsewhere. None: all 1."""
    messages: list[Any] | None = None
    """Turns of a conversation as the record holds them; `text` is then their JSON. See `data.chat`."""


class InputFile(NamedTuple):
    """A file to read: its path, the extension that picks the reader, and the source its folder suggests."""

    path: str
    extension: str
    source: str
    size: int
    """Bytes on disk, compressed if the file is compressed."""


class RawRecord(NamedTuple):
    """The bytes of one record, not yet decoded; cheap to cut and to send to another process."""

    file: InputFile
    position: int
    data: bytes


class Fields(NamedTuple):
    """Which fields of a record hold what; a dotted name reaches into nested objects."""

    text: str = "text"
    source: str | None = None
    messages: str | None = None
    """Field of conversations ("messages", "conversations"); then no text field is read."""


class SkippedRecordError(Exception):
    """A record that cannot be used; `kind` is the counter of ReadReport it belongs to."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Reader(NamedTuple):
    """A file format: how to cut a stream into records, and how to read one record."""

    split: Callable[[IO[bytes]], Iterator[tuple[int, bytes]]]
    """Yield (position, bytes) of each record."""
    parse: Callable[[RawRecord, Fields], Document]
    """Raise SkippedRecordError for a broken record, DataError for a record of another shape than asked."""


@dataclass
class ReadReport:
    """Counts of what was read and what was left out, with the first few places by name."""

    files: int = 0
    documents: int = 0
    empty_files: int = 0
    ignored_files: int = 0
    """Files of a folder that no reader knows by their extension."""
    broken_records: int = 0
    invalid_text: int = 0
    """Records with bytes that are not UTF-8, or with lone surrogates."""
    empty_documents: int = 0
    """Documents without a single character, or without a single token."""
    examples: list[str] = field(default_factory=list)

    def skip(self, kind: str, place: str, reason: str) -> None:
        """Count one record or file under `kind` and keep its place if few are kept yet."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{place}: {reason}")

    def add(self, other: ReadReport) -> None:
        """Add the counts of another report, which comes later in canonical order."""
        for name, value in dataclasses.asdict(other).items():
            if name != "examples":
                setattr(self, name, getattr(self, name) + value)
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]

    @property
    def num_skipped(self) -> int:
        """Records left out, whatever the reason."""
        return self.broken_records + self.invalid_text + self.empty_documents

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and examples for a manifest."""
        return dataclasses.asdict(self)

    def warning(self) -> str | None:
        """Return one message about everything left out, or None if nothing was."""
        counts = {
            "broken records": self.broken_records,
            "records with invalid text": self.invalid_text,
            "empty documents": self.empty_documents,
            "empty files": self.empty_files,
            "files of unknown kind": self.ignored_files,
        }
        left_out = [f"{count} {name}" for name, count in counts.items() if count]
        if not left_out:
            return None
        message = f"left out: {', '.join(left_out)} ({self.documents} documents read)"
        return "\n  ".join([message, *self.examples])


def lookup(record: dict[str, Any], dotted: str, *, place: str) -> Any:
    """Return `record["a"]["b"]` for "a.b".

    Raises:
        DataError: the field is not there; the message names the place, the field and the keys that are.
    """
    if dotted in record:
        return record[dotted]
    value: Any = record
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            keys = sorted(map(str, value)) if isinstance(value, dict) else []
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{place}: no field {dotted!r}{hint}",
                found="fields " + ", ".join(keys) if keys else type(value).__name__,
                fix="name the field with --text-field or --source-field",
            )
        value = value[key]
    return value


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8. Raises SkippedRecordError naming the offending byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SkippedRecordError(
            "invalid_text", f"byte {data[error.start]:#04x} at {error.start} is not UTF-8"
        ) from None
