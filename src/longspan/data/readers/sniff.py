"""The format of a file by its content, where its name says nothing; JSON lines told from other JSON."""

from __future__ import annotations

import json

from longspan.core.errors import DataError
from longspan.data.readers.jsonl import UTF8_BOM
from longspan.data.readers.opening import MAGIC_BYTES, open_input, open_raw, opener_of, reading

HEAD_BYTES = 1 << 16
_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}


def sniff(path: str, *, json_too: bool) -> str | None:
    """Return the extension that names the format of the content, None if it is not one that can be known.

    With `json_too`, text that begins like JSON counts; binary formats have marks that leave no doubt.
    """
    try:
        with reading(path), open_raw(path) as raw:
            head = raw.read(MAGIC_BYTES)
        for magic, extension in _MAGIC.items():
            if head.startswith(magic):
                return extension
        if json_too or opener_of(path, head) is not None:
            return sniff_json(path, surely=True)
    except DataError:
        return None
    return None


def sniff_json(path: str, *, surely: bool = False) -> str | None:
    """Return ".jsonl" for one object a line, ".json" for other JSON; None (`surely`) if it is no JSON.

    Reads 64 KiB.
    """
    with open_input(path) as stream:
        head = stream.read(HEAD_BYTES).removeprefix(UTF8_BOM).lstrip()
    if head.startswith(b"["):
        return ".json"
    if not head.startswith(b"{"):
        return None if surely else ".jsonl"
    line, newline, rest = head.partition(b"\n")
    if not newline or _is_object(line):
        return ".jsonl"
    # A broken first line is followed by another object; a value over several lines is not.
    return ".jsonl" if rest.lstrip().startswith(b"{") else ".json"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
