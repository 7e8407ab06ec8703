"""Server-sent events out of bytes, as the HTML standard (section 9.2) splits them.

Only line feed and carriage return end a line: `str.splitlines` would also cut at U+2028, which stands unescaped
in the JSON of many servers.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

_LINE_END = re.compile("\r\n|\r|\n")


class EventDecoder:
    """Cuts a stream of bytes into events; what ends within an event is not one."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._rest = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Yield the data of the events that `chunk` completes."""
        text = self._rest + self._decode(chunk)
        start = 0
        for match in _LINE_END.finditer(text):
            if match.group() == "\r" and match.end() == len(text):
                break  # its line feed may be the first byte of the next chunk
            event = self._line(text[start : match.start()])
            start = match.end()
            if event is not None:
                yield event
        self._rest = text[start:]

    def _line(self, line: str) -> str | None:
        if not line:
            event = "\n".join(self._data) if self._data else None
            self._data = []
            return event
        field, _, value = line.partition(":")
        if field == "data":
            self._data.append(value.removeprefix(" "))
        return None
