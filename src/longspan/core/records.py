"""JSON-lines records: appended one at a time, readable while they grow, whole after a kill."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longspan.core.errors import DataError, RunError
from longspan.core.files import disk_errors, finite


class JsonlWriter:
    """Append JSON objects to a file, one line each; every line is handed to the operating system at once.

    A torn last line, left by a killed process, is cut off when the file is opened again; one that lacks only its line
    break gets it.

    Args:
        alone: refuse a file that another writer has opened so; the lock ends with its process, however that ends.

    Raises:
        RunError: the disk refuses, or `alone` and another process writes the file.
    """

    def __init__(self, path: str | Path, *, alone: bool = False) -> None:
        self.path = Path(path)
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            if alone:
                self._lock()
            _cut_torn_line(self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, whole or not at all; what is not finite is null. Raises RunError when the disk refuses."""
        line = _encode(record) + b"\n"
        with disk_errors(self.path):
            # A nearly full disk takes the first part of a line without an error and refuses only the rest.
            written = 0
            try:
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                if written:
                    self._file.truncate(os.fstat(self._file.fileno()).st_size - written)
                raise

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self._file.closed:
            with disk_errors(self.path):
                os.fsync(self._file.fileno())
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RunError(
                f"another process writes {self.path}", fix="wait for it to end, or choose another file"
            ) from None
        except OSError:
            pass  # a shared disk without locks

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file that we wrote; a torn last line is not a record.

    A last line that is whole but for its line break is one: an editor may have taken it.

    Raises:
        DataError: the file is missing or a folder, or a whole line is not a JSON object (file and line are named).
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir():
        raise DataError(f"{path} is a folder", allowed="a JSON-lines file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and not _is_whole(line):
                return
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number} is not valid JSON", found=str(error)) from None
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number} is not a JSON object", found=type(record).__name__)
            yield record


def _encode(record: dict[str, Any]) -> bytes:
    record = finite(record)
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair (from a file name that is not UTF-8) has no UTF-8 form, but a JSON escape.
        return json.dumps(record, allow_nan=False).encode()


def _cut_torn_line(path: Path) -> None:
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            block = file.read(position - start)
            newline = block.rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            position = start
        else:
            keep = 0
        if keep == end:
            return
        file.seek(keep)
        if _is_whole(file.read()):
            file.write(b"\n")
        else:
            file.truncate(keep)


def _is_whole(line: bytes) -> bool:
    """Whether a line without a line break is a record: what a torn write leaves of an object is none."""
    if not line.rstrip().endswith(b"}"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
