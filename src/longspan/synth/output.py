"""Files of a job, each whole or absent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from longspan.core.files import atomic_write


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines as they are made; the file appears when the last one is written."""
    with atomic_write(path, "w") as file:
        for record in records:
            file.write(_line(record))


class Lines:
    """The file of what was rejected: it appears, whole, when the block that writes it ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()

    def __enter__(self) -> Lines:
        self._file: IO[Any] = self._stack.enter_context(atomic_write(self._path, "w"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, document: str, reason: str, text: str) -> None:
        """Write one line."""
        self._file.write(_line({"document": document, "reason": reason, "text": text}))


def _line(record: Mapping[str, Any]) -> str:
    # ASCII escapes: a reply may hold half of a surrogate pair, which has no UTF-8 form.
    return json.dumps(record, allow_nan=False) + "\n"
