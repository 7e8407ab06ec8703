"""The format of a file by its content, where its name says nothing; JSON lines told from other JSON."""

from __future__ import annotations

import json

from longspan.core.errors import DataError
from longspan.data.readers.columnar import is_columnar
from longspan.data.readers.jsonl import UTF8_BOM
from longspan.data.readers.opening import MAGIC_BYTES, open_input, open_raw, opener_of, reading

HEAD_BYTES = 1 << 16
_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}
_CUT_CHARACTERS = 16
"""So near the end of what was read, a mistake may be the cut itself."""


def sniff(path: str, *, json_too: bool) -> str | None:
    """Return the extension that names the format of the content, None if it is not one that can be known.

    With `json_too`, text that is JSON counts, as far as its first 64 KiB tell. A table must open as one.
    """
    try:
        with reading(path), open_raw(path) as raw:
            head = raw.read(MAGIC_BYTES)
        for magic, extension in _MAGIC.items():
            if head.startswith(magic):
                return extension if is_columnar(path, extension) else None
        if json_too or opener_of(path, head) is not None:
            return _sniff_text(path)
    except DataError:
        return None
    return None


def sniff_json(path: str) -> str:
    """Return how a file called .json is read: ".jsonl" for one object a line, ".json" for other JSON.

    Reads 64 KiB. What is no JSON at all is for the reader to say.
    """
    head, _ = _head(path)
    if not head:
        return ".jsonl"
    if head.startswith(b"["):
        return ".json"
    line, newline, rest = head.partition(b"\n")
    if head.startswith(b"{") and (not newline or _is_object(line)):
        return ".jsonl"
    # A broken first line is followed by other objects; a value over several lines is not.
    if head.startswith(b"{"):
        return ".jsonl" if rest.lstrip().startswith(b"{") else ".json"
    return ".jsonl" if any(map(_is_object, rest.split(b"\n"))) else ".json"


def _sniff_text(path: str) -> str | None:
    """Return ".jsonl" or ".json" for text that is JSON, None for any other."""
    head, is_cut = _head(path)
    if head.startswith(b"{"):
        lines = head.split(b"\n")
        whole = lines[:-1] if is_cut else lines
        # A broken first line is followed by others.
        if any(map(_is_object, whole[:2])):
            return ".jsonl"
    return ".json" if head.startswith((b"[", b"{")) and _is_json(head, is_cut=is_cut) else None


def _head(path: str) -> tuple[bytes, bool]:
    """Return the first bytes of a file without a byte order mark and space, and whether there are more."""
    with open_input(path) as stream:
        head = stream.read(HEAD_BYTES)
        is_cut = len(head) == HEAD_BYTES and bool(stream.read(1))
    return head.removeprefix(UTF8_BOM).lstrip(), is_cut


def _is_json(head: bytes, *, is_cut: bool) -> bool:
    """Whether a text is one array, or objects one after another, as far as it is there."""
    text = head.decode("utf-8", "replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return is_cut and (error.msg.startswith("Unterminated") or error.pos > len(text) - _CUT_CHARACTERS)
    except (ValueError, RecursionError):
        return False
    rest = text[end:].lstrip()
    return not rest or (text.startswith("{") and rest.startswith("{"))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
