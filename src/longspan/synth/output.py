"""Files of a job, each whole or absent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longspan.core.files import atomic_write


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines as they are made; the file appears when the last one is written."""
    with atomic_write(path, "w") as file:
        for record in records:
            file.write(_line(record))


Reject = Callable[[str, str, str], object]
"""Writes down what was rejected: of which document, why, and its text."""


@contextmanager
def rejected_lines(path: Path) -> Iterator[Reject]:
    """Write the file of what is rejected: it appears, whole, when the block ends without an error."""
    with atomic_write(path, "w") as file:
        yield lambda document, reason, text: file.write(
            _line({"document": document, "reason": reason, "text": text})
        )


def _line(record: Mapping[str, Any]) -> str:
    # ASCII escapes: a reply may hold half of a surrogate pair, which has no UTF-8 form.
    return json.dumps(record, allow_nan=False) + "\n"
