"""Files that are either whole or absent: written aside, flushed, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from longspan.core.errors import DataError, LongspanError, RunError

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_NO_WAY = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.EIO,
}


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn the operating system's refusal to write (full disk, quota, no permission) into a RunError."""
    try:
        yield
    except Exception as error:
        number, found = _system_error(error)
        if number in _NO_ROOM:
            fix = "free space or choose another place with --out; nothing half-written was kept"
        elif number in _NO_WAY:
            fix = "choose another place with --out"
        else:
            raise
        raise RunError(f"cannot write {path}", found=found, fix=fix) from error


def _system_error(error: Exception) -> tuple[int | None, str]:
    """Return the number of the operating system's error behind an exception, and what it says.

    Libraries in Rust (safetensors, tokenizers) raise exceptions of their own that end in "(os error 28)".
    """
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename is not None else ""
        return error.errno, f"{error.strerror or error}{place}"
    number = re.search(r"\(os error (\d+)\)$", str(error))
    return (int(number.group(1)), os.strerror(int(number.group(1)))) if number else (None, str(error))


@contextmanager
def _named_after(path: Path, aside: Path) -> Iterator[None]:
    """Let errors name the place that was asked for: the temporary one is gone when they are read."""
    try:
        yield
    except LongspanError as error:
        error.args = tuple(str(each).replace(aside.name, path.name) for each in error.args)
        raise


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; flush, fsync and rename it on success, remove it on failure.

    Raises:
        RunError: the disk refuses the bytes.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    # What has no UTF-8 form, of a file's name say, becomes an escape: that of JSON, where most of it is written.
    encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
    try:
        with _named_after(path, aside), disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, mode, encoding=encoding, errors=errors) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            _sync_directory(path.parent)
    finally:
        if aside.exists():
            aside.unlink()


def behind_link(path: str | os.PathLike[str]) -> Path:
    """Return the place that a link points to, there or not; any other path as it is.

    A folder renamed to a link, or removed there, would be an error at the end of the work.
    """
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextmanager
def atomic_dir(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new directory beside `path`; flush and rename it to `path` on success, remove it on failure.

    With `replace`, an existing directory at `path` is replaced at the moment of the rename.

    Raises:
        RunError: the disk refuses, or `path` already exists (and is not empty) and `replace` is false.
    """
    path = behind_link(path)
    if not replace:
        _refuse_existing(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _named_after(path, aside), disk_errors(path):
            aside.mkdir(parents=True)
            yield aside
            _sync_tree(aside)
            if replace and path.exists():
                # A kill between the two renames leaves the old one aside: remove_leftovers puts it back.
                old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
                os.replace(path, old)
                os.replace(aside, path)
                _remove(old)
            else:
                _refuse_existing(path)
                os.replace(aside, path)
            _sync_directory(path.parent)
    finally:
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: str | Path, name: str = "*") -> list[Path]:
    """Remove what a killed process left aside for `name` in `folder`; return the removed paths.

    A directory that was moved aside for its successor, which never arrived, goes back to its place.
    """
    removed = []
    aside = f".{name}." + "[0-9a-f]" * 8
    for path in sorted(Path(folder).glob(aside + ".old")):
        place = path.with_name(path.name[1:].rsplit(".", 2)[0])
        if place.exists():
            _remove(path)
            removed.append(path)
        else:
            os.replace(path, place)
    for path in sorted(Path(folder).glob(aside + ".tmp")):
        _remove(path)
        removed.append(path)
    return removed


def link_file(source: Path, target: Path) -> None:
    """Hard-link `target` to `source`; copy it where the file system cannot link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as readable JSON, atomically; what is not finite is null."""
    with atomic_write(path, "w") as file:
        json.dump(finite(value), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def finite(value: Any) -> Any:
    """Return a value for JSON, which knows neither NaN nor infinity: null in their place, missing as a number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, unreadable or not JSON; the message names the line.
    """
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read", found=error.strerror) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON", found=str(error)) from None


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hex characters."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hex characters, reading it in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_sample(stream: IO[bytes], size: int, digest: Any) -> None:
    """Update a hash with 16 blocks of 64 KiB spread over a stream of `size` bytes; up to 1 MiB with all of them."""
    for block in range(16):
        stream.seek(max(size - (1 << 16), 0) * block // 15)
        digest.update(stream.read(1 << 16))


def _refuse_existing(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise RunError(f"{path} already exists", fix="remove it or choose another place with --out")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_tree(folder: Path) -> None:
    """Flush every file below `folder` to the disk: a power cut must not leave empty files in place."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if path.is_file() and not path.is_symlink():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        _sync_directory(Path(parent))


def _sync_directory(folder: Path) -> None:
    """Make the renames in `folder` last, where the file system has such a call."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise
