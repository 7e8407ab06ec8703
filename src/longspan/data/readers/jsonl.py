"""JSON lines: one object a line, the text in one field, the source in another or in the file's place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from longspan.core.errors import DataError
from longspan.data.readers.base import (
    Document,
    Fields,
    RawRecord,
    Reader,
    SkippedRecordError,
    decode_utf8,
    lookup,
)

UTF8_BOM = b"\xef\xbb\xbf"
WEIGHTS_FIELD = "loss_weights"


def split_lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of every line that is not blank."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(UTF8_BOM)
        if not line.isspace() and line:
            yield number, line


def parse_line(record: RawRecord, fields: Fields) -> Document:
    """Read one line."""
    place = f"{record.file.path}:{record.position}"
    try:
        value = json.loads(decode_utf8(record.data))
    except (json.JSONDecodeError, RecursionError) as error:
        raise SkippedRecordError("broken_records", f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise SkippedRecordError("broken_records", f"a JSON {type(value).__name__}, not an object")
    messages = None
    if fields.messages is not None:
        messages = lookup(value, fields.messages, place=place)
        text = _messages_text(messages, fields.messages, place)
    else:
        text = lookup(value, fields.text, place=place)
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise DataError(f"{place}: field {fields.text!r} is not text", found=type(text).__name__)
    # An escaped half of a surrogate pair ("\ud83d" alone) is legal JSON and has no UTF-8 form.
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SkippedRecordError("invalid_text", f"lone surrogate at character {error.start}") from None
    source = record.file.source
    if fields.source is not None:
        source = _source_name(lookup(value, fields.source, place=place), fields.source, place)
    weights = value.get(WEIGHTS_FIELD)
    if weights is not None:
        weights = _check_weights(weights, len(text), place)
    return Document(text, source, record.file.path, record.position, weights, messages)


def _messages_text(messages: Any, name: str, place: str) -> str:
    """Return the JSON of a conversation, which stands for its text: it decides the key of the document."""
    if messages is None or messages == []:
        return ""
    if not isinstance(messages, list):
        raise DataError(
            f"{place}: field {name!r} is not a conversation",
            found=type(messages).__name__,
            allowed="a list of turns",
        )
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


def _source_name(value: Any, name: str, place: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"{place}: field {name!r} does not name a source", found=repr(value)[:80])
    return value.encode("utf-8", "replace").decode("utf-8")


def _check_weights(spans: Any, num_characters: int, place: str) -> list[tuple[int, int, int]]:
    checked = []
    for span in spans if isinstance(spans, list) else [spans]:
        whole = isinstance(span, list) and len(span) == 3 and all(type(part) is int for part in span)
        if not whole or not (0 <= span[0] <= span[1] <= num_characters and 0 <= span[2] <= 255):
            raise DataError(
                f"{place}: bad entry in {WEIGHTS_FIELD!r}",
                found=repr(span)[:80],
                allowed=f"[start, end, weight] with 0 <= start <= end <= {num_characters}, weight 0..255",
            )
        checked.append((span[0], span[1], span[2]))
    return checked


JSONL = Reader(split_lines, parse_line)
