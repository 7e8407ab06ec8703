"""Files of token ids that other tools write, memory-mapped, nothing unpickled.

datatrove     NAME.ds            ids of uint16 or uint32, documents one after another
              NAME.ds.index      where each document ends, in tokens: uint64 [documents]
              NAME.ds.loss       one byte a token: whether it is trained; optional
              NAME.ds.metadata   "tokenizer|bytes of an id", tokens; optional
Megatron      NAME.bin           ids, sequences one after another
              NAME.idx           "MMIDIDX\\0\\0", version 1 as uint64, dtype code as uint8, sequences and documents + 1
                                 as uint64, then int32 lengths, int64 byte offsets [sequences] and
                                 int64 first sequences [documents + 1]
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import DataError

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEAD = struct.Struct("<9sQBQQ")
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class TokenFile(NamedTuple):
    """An open file of documents."""

    path: str
    tokens: NDArray[np.integer]
    """All ids [tokens]; memory-mapped."""
    starts: NDArray[np.int64]
    """First token of each document [documents]."""
    ends: NDArray[np.int64]
    """Token after the last of each document [documents]."""
    trained: NDArray[np.uint8] | None = None
    """1 where a token is trained, else 0 [tokens]; None: all are."""


def read_datatrove(path: str | os.PathLike[str]) -> TokenFile:
    """Open a `.ds` file with its index.

    Raises:
        DataError: the index is missing, or the files do not fit one another.
    """
    path = Path(path)
    size = _size(path)
    ends = _mapped(path.with_name(path.name + ".index"), "<u8")
    total = int(ends[-1]) if len(ends) else 0
    if (len(ends) and bool(np.any(ends[1:] < ends[:-1]))) or total > size:
        raise DataError(f"{path}.index is not the index of {path.name}", found=f"{len(ends)} document ends")
    width = _id_bytes(path) or (size // total if total else 2)
    if width not in (2, 4) or total * width != size:
        raise DataError(
            f"{path} does not fit its index",
            found=f"{size} bytes for {total} tokens",
            allowed="2 or 4 bytes a token",
            fix="copy both files again",
        )
    trained = None
    loss = path.with_name(path.name + ".loss")
    if loss.is_file():
        trained = _mapped(loss, "u1").astype(np.uint8, copy=False)
        if len(trained) != total or bool(np.any(trained > 1)):
            raise DataError(
                f"{loss} does not fit {path.name}", found=len(trained), allowed=f"{total} bytes of 0, 1"
            )
    bounds = np.concatenate([[0], ends]).astype(np.int64)
    return TokenFile(str(path), _mapped(path, f"<u{width}"), bounds[:-1], bounds[1:], trained)


def read_megatron(path: str | os.PathLike[str]) -> TokenFile:
    """Open the `.bin` and `.idx` of an indexed data set, given either.

    Raises:
        DataError: a file is missing, damaged or of another version, or points outside of the other.
    """
    index, data = Path(path).with_suffix(".idx"), Path(path).with_suffix(".bin")
    raw = _mapped(index, "u1")
    if len(raw) < _MEGATRON_HEAD.size:
        raise DataError(f"{index} is cut off", found=f"{len(raw)} bytes")
    magic, version, code, num_sequences, num_bounds = _MEGATRON_HEAD.unpack(
        raw[: _MEGATRON_HEAD.size].tobytes()
    )
    if magic != MEGATRON_MAGIC or version != 1 or code not in _MEGATRON_DTYPES:
        raise DataError(
            f"{index} is not an index of Megatron's data",
            found=f"{magic!r}, version {version}, dtype code {code}",
            allowed=f"{MEGATRON_MAGIC!r}, version 1, dtype codes of integers {sorted(_MEGATRON_DTYPES)}",
        )
    counts = (("<i4", num_sequences), ("<i8", num_sequences), ("<i8", num_bounds))
    if len(raw) < _MEGATRON_HEAD.size + sum(np.dtype(kind).itemsize * count for kind, count in counts):
        raise DataError(
            f"{index} is cut off",
            found=f"{len(raw)} bytes for {num_sequences} sequences and {num_bounds - 1} documents",
        )
    columns, at = [], _MEGATRON_HEAD.size
    for kind, count in counts:
        columns.append(np.frombuffer(raw, kind, count, at).astype(np.int64))
        at += columns[-1].size * np.dtype(kind).itemsize
    lengths, offsets, first = columns
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    size = _size(data)
    follows = np.concatenate([[0], np.cumsum(lengths)])
    if (
        bool(np.any(lengths < 0))
        or not np.array_equal(offsets, follows[:-1] * dtype.itemsize)
        or int(follows[-1]) * dtype.itemsize != size
        or not len(first)
        or bool(np.any(np.diff(first) < 0))
        or (int(first[0]), int(first[-1])) != (0, num_sequences)
    ):
        raise DataError(
            f"{index} does not fit {data.name}",
            found=f"{num_sequences} sequences, {size} bytes of ids",
            allowed="sequences one after another that fill the file, and documents made of all of them",
            fix="copy both files again",
        )
    return TokenFile(str(data), _mapped(data, dtype.str), follows[first[:-1]], follows[first[1:]])


def _id_bytes(path: Path) -> int | None:
    """Return the bytes of an id that datatrove's metadata name, if there are any."""
    metadata = path.with_name(path.name + ".metadata")
    if not metadata.is_file():
        return None
    try:
        return int(metadata.read_text(encoding="utf-8").splitlines()[0].rpartition("|")[2])
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{metadata} is damaged", found=str(error), fix="remove it") from None


def _size(path: Path) -> int:
    if not path.is_file():
        raise DataError(f"{path} does not exist", fix="copy the index and the ids together")
    return path.stat().st_size


def _mapped(path: Path, dtype: str) -> NDArray[np.integer]:
    """Return a whole file as one column. Raises DataError when it ends inside a value."""
    size = _size(path)
    if size % np.dtype(dtype).itemsize:
        raise DataError(f"{path} is cut off", found=f"{size} bytes")
    # An empty file cannot be memory-mapped.
    return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)
