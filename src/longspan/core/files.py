"""Files that are either whole or absent: written aside, flushed, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from longspan.core.errors import DataError, RunError

NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS}


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn the operating system's refusal of more bytes (full disk, quota, file limit) into a RunError."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise RunError(
            f"cannot write {path}",
            found=error.strerror or str(error),
            fix="free space or choose another place with --out; nothing half-written was kept",
        ) from error


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; flush, fsync and rename it on success, remove it on failure.

    Raises:
        RunError: the disk refuses the bytes.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, mode, encoding=encoding) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new directory beside `path`; rename it to `path` on success, remove it on failure.

    With `replace`, an existing directory at `path` gives way at the moment of the rename.

    Raises:
        RunError: the disk refuses, or `path` already exists and `replace` is false.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with disk_errors(path):
            aside.mkdir(parents=True)
            yield aside
            if replace and path.exists():
                old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
                os.replace(path, old)
                os.replace(aside, path)
                shutil.rmtree(old)
            else:
                os.replace(aside, path)
    finally:
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: str | Path, name: str = "*") -> list[Path]:
    """Remove what a killed process left aside for `name` in `folder`; return the removed paths."""
    removed = []
    for pattern in (f".{name}.*.tmp", f".{name}.*.old"):
        for path in sorted(Path(folder).glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(path)
    return removed


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as readable JSON, atomically; NaN and infinity are refused (missing is null)."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing or is not JSON; the message names the line.
    """
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON", found=str(error)) from None


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hex characters."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hex characters, reading it in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
