"""From the fields of a record to a document: dotted names, and checks of what the fields hold."""

from __future__ import annotations

import difflib
import json
from typing import Any

from longspan.core.errors import DataError
from longspan.data.readers.base import (
    WEIGHTS_FIELD,
    Document,
    Fields,
    Place,
    RawRecord,
    SkippedRecordError,
    UTF8Values,
)


def lookup(record: dict[str, Any], dotted: str, *, place: Place | str) -> Any:
    """Return `record["a"]["b"]` for "a.b"; a key "a.b" itself goes first.

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


def document_of(values: dict[str, Any], record: RawRecord, fields: Fields) -> Document:
    """Make a document of the fields of a record.

    Raises:
        SkippedRecordError: the text has no UTF-8 form.
        DataError: a field is missing or of another type than asked.
    """
    file, place = record.file, record.place
    messages = None
    if fields.messages is not None:
        messages = lookup(values, fields.messages, place=place)
        text = _messages_text(messages, fields.messages, place)
    else:
        text = lookup(values, fields.text, place=place)
    if isinstance(text, bytes):  # a column of bytes in parquet or arrow
        text = decode_utf8(text)
    text = "" if text is None else text
    if not isinstance(text, str):
        raise DataError(f"{place}: field {fields.text!r} is not text", found=type(text).__name__)
    # An escaped half of a surrogate pair ("\ud83d" alone) is legal JSON and has no UTF-8 form.
    if not (isinstance(values, UTF8Values) or text.isascii()):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SkippedRecordError("invalid_text", f"lone surrogate at character {error.start}") from None
    source = file.source
    if fields.source is not None:
        source = _source_name(lookup(values, fields.source, place=place), fields.source, place)
    weights = values.get(WEIGHTS_FIELD)
    if weights is not None:
        weights = _check_weights(weights, len(text), place)
    return Document(text, source, file.path, record.position, weights, messages)


def _messages_text(messages: Any, name: str, place: Place) -> str:
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


def _source_name(value: Any, name: str, place: Place) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"{place}: field {name!r} does not name a source", found=repr(value)[:80])
    return value.encode("utf-8", "replace").decode("utf-8")


def _check_weights(spans: Any, num_characters: int, place: Place) -> list[tuple[int, int, int]]:
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
