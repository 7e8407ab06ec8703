"""Units of work: stretches of input of about equal size, cut by a rule that depends on the files alone.

Small files are joined, large ones are cut where their format allows it. Neither the number of workers nor any
timing has a say, so the pieces that are made of the units, and with them the shards of the store, are the
same whoever makes them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import DataError
from longspan.core.files import hash_sample
from longspan.data.readers import FilePart, InputFile, plan_parts
from longspan.data.readers.opening import is_remote, open_raw

UNIT_BYTES = 16 << 20
MAX_UNITS = 4096


class Unit(NamedTuple):
    """Parts of files that one task reads, in canonical order."""

    number: int
    parts: tuple[FilePart, ...]

    @property
    def size(self) -> int:
        """About how many bytes of input it stands for."""
        return sum(part.size for part in self.parts)

    @property
    def files(self) -> list[InputFile]:
        """Files that it reads from, each once."""
        return list(dict.fromkeys(part.file for part in self.parts))


def unit_bytes_of(files: Sequence[InputFile], *, max_units: int = MAX_UNITS) -> int:
    """Return the size of units: 16 MiB, more where that would make more than `max_units` of them."""
    return max(UNIT_BYTES, -(-sum(file.size for file in files) // max_units))


def cut_units(files: Iterable[InputFile], unit_bytes: int) -> list[Unit]:
    """Cut files, in the given order, into units of about `unit_bytes`."""
    units: list[Unit] = []
    held: list[FilePart] = []
    size = 0
    for part in plan_parts(files, part_bytes=unit_bytes):
        if held and size + part.size > unit_bytes:
            units.append(Unit(len(units), tuple(held)))
            held, size = [], 0
        held.append(part)
        size += part.size
    if held:
        units.append(Unit(len(units), tuple(held)))
    return units


def file_identity(file: InputFile) -> dict[str, Any]:
    """Return what tells this input from another: name, source, size, and a hash of 16 blocks spread over it.

    Files of up to 1 MiB are hashed whole; of a larger one 1 MiB is read, so that a finished corpus of any
    size is recognised in seconds. The folder does not count: a corpus may move.
    """
    return {
        **plain_identity(file),
        "sampled_sha256": _sampled_sha256(file.path, file.size, _changed(file.path)),
    }


def plain_identity(file: InputFile) -> dict[str, Any]:
    """Return the part of `file_identity` that needs no reading."""
    return {"name": Path(file.path).name, "source": file.source, "bytes": file.size}


def _changed(path: str) -> int:
    return 0 if is_remote(path) or not os.path.exists(path) else os.stat(path).st_mtime_ns


@lru_cache(maxsize=1 << 16)
def _sampled_sha256(path: str, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    try:
        if os.path.isdir(path):
            _hash_folder(path, digest)
            return digest.hexdigest()
        with open_raw(path) as stream:
            hash_sample(stream, size, digest)
    except OSError as error:
        raise DataError(f"cannot read {path}", found=error.strerror or str(error)) from None
    return digest.hexdigest()


def _hash_folder(path: str, digest: Any) -> None:
    """Hash names and sizes of a folder's files, and the index where it has one (an MDS directory)."""
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        digest.update(os.fsencode(f"{entry.name} {entry.stat().st_size}\n"))
    index = Path(path, "index.json")
    if index.is_file():
        digest.update(index.read_bytes())
