"""From the fields of a record to a document: dotted names, and checks of what the fields hold."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from longspan.core.log import printable
from longspan.data.readers.base import (
    WEIGHTS_FIELD,
    Document,
    Fields,
    MissingFieldError,
    OptionalField,
    RawRecord,
    SkippedRecordError,
    UTF8Values,
)


def lookup(record: dict[str, Any], dotted: str) -> Any:
    """Return `record["a"]["b"]` for "a.b"; a key "a.b" itself goes first.

    Raises:
        MissingFieldError: the field is not there; the message names it and the keys that are.
    """
    if dotted in record:
        return record[dotted]
    value: Any = record
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            keys = sorted(map(str, value)) if isinstance(value, dict) else []
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            found = "fields " + ", ".join(keys)[:400] if keys else type(value).__name__
            raise MissingFieldError(f"no field {dotted!r}{hint}", found=found)
        value = value[key]
    return value


def missing_column(columns: dict[str, Any], wanted: Sequence[str]) -> MissingFieldError | None:
    """Return what a file whose columns are known lacks of the wanted fields, None if nothing."""
    for name in wanted:
        try:
            if not isinstance(name, OptionalField):
                lookup(columns, name)
        except MissingFieldError as error:
            return MissingFieldError(error.reason, found=error.found, of_file=True)
    return None


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
        SkippedRecordError: the text has no UTF-8 form, or a field is missing or of another type than asked.
    """
    file = record.file
    messages = variables = None
    if fields.messages is not None:
        messages = _messages(lookup(values, fields.messages), fields.messages)
        variables = {name: values[name] for name in fields.variables if values.get(name) is not None} or None
        text = _conversation_text(messages, variables, fields.messages)
    else:
        text = lookup(values, fields.text)
    if isinstance(text, bytes):  # a column of bytes in parquet or arrow
        text = decode_utf8(text)
    text = "" if text is None else text
    if not isinstance(text, str):
        raise _wrong_type(f"field {fields.text!r} is not text", text)
    # An escaped half of a surrogate pair ("\ud83d" alone) is legal JSON and has no UTF-8 form.
    # What is checked of a record is not checked of JSON in one of its texts.
    checked = isinstance(values, UTF8Values) and messages is None
    if not (checked or text.isascii()):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SkippedRecordError("invalid_text", f"lone surrogate at character {error.start}") from None
    source = file.source
    if fields.source is not None:
        source = _source_name(lookup(values, fields.source), fields.source)
    weights = values.get(WEIGHTS_FIELD)
    if weights is not None and messages is not None:
        raise _wrong_type(f"{WEIGHTS_FIELD!r} are of texts: turns say by `weight` what is learnt", weights)
    if weights is not None:
        weights = _check_weights(weights, len(text))
    return Document(text, source, file.path, record.position, weights, messages, variables)


def _wrong_type(what: str, value: Any, *, allowed: str = "") -> SkippedRecordError:
    found = f"{type(value).__name__} {repr(value)[:80]}" if value is not None else "null"
    return SkippedRecordError("wrong_types", what, found=found + (f"; allowed: {allowed}" if allowed else ""))


def _messages(messages: Any, name: str) -> list[Any]:
    """Return the turns of a conversation, which may be stored as JSON text."""
    if isinstance(messages, (str, bytes)):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise _wrong_type(f"field {name!r} is a text that is not JSON", messages) from None
    messages = [] if messages is None else messages
    if not isinstance(messages, list):
        raise _wrong_type(f"field {name!r} is not a conversation", messages, allowed="a list of turns")
    return messages


def _conversation_text(messages: list[Any], variables: dict[str, Any] | None, name: str) -> str:
    """Return the JSON of a conversation, which stands for its text: it decides the key of the document."""
    value = messages if variables is None else [messages, variables]
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")) if messages else ""
    except (TypeError, RecursionError):
        raise _wrong_type(f"field {name!r} holds values that are not JSON", messages) from None


def _source_name(value: Any, name: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise _wrong_type(f"field {name!r} does not name a source", value)
    return printable(value)


def _check_weights(spans: Any, num_characters: int) -> list[tuple[int, int, int]]:
    checked = []
    for span in spans if isinstance(spans, list) else [spans]:
        whole = isinstance(span, list) and len(span) == 3 and all(type(part) is int for part in span)
        if not whole or not (0 <= span[0] <= span[1] <= num_characters and 0 <= span[2] <= 255):
            allowed = f"[start, end, weight] with 0 <= start <= end <= {num_characters}, weight 0..255"
            raise _wrong_type(f"bad entry in {WEIGHTS_FIELD!r}", span, allowed=allowed)
        checked.append((span[0], span[1], span[2]))
    return checked
