"""MDS, the shard format of released long-context data: our own codec, exact to the byte, reading without
copies.

A directory holds `index.json` (version 2) and shard files, beside it or in folders below it. A shard is

    u32 n | u32 offset[n + 1] | config JSON | n samples          offsets count from the start of the file

and a sample is `u32 size` of every column of variable size, then the columns' bytes, columns sorted by name.
Integers are little-endian. An `ndarray:DTYPE` is one byte (ndim << 2 | code), the shape in u8, u16, u32 or
u64 (code 0 to 3), then the values; `[5, 6, 7]` as uint16 is `04 03 | 05 00 06 00 07 00`. Empty arrays have no
form.

Nothing in a file is trusted: every name, size and offset is checked against the file before it is followed,
and a `pkl` column is refused unless it is asked for; then arrays are read out of it, and no code is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from longspan.core.errors import DataError
from longspan.data.store.pickled import read_pickled

VERSION = 2
INDEX = "index.json"
SHAPE_DTYPES: tuple[np.dtype[Any], ...] = tuple(map(np.dtype, ("<u1", "<u2", "<u4", "<u8")))
MAX_SHARD_BYTES = 2**32 - 1

# Code of an array's dtype where the column does not fix it.
ARRAY_DTYPES: dict[int, np.dtype[Any]] = {
    8: np.dtype("<u1"),
    9: np.dtype("<i1"),
    16: np.dtype("<u2"),
    17: np.dtype("<i2"),
    18: np.dtype("<f2"),
    32: np.dtype("<u4"),
    33: np.dtype("<i4"),
    34: np.dtype("<f4"),
    64: np.dtype("<u8"),
    65: np.dtype("<i8"),
    66: np.dtype("<f8"),
}
SCALARS: dict[str, np.dtype[Any]] = {dtype.name: dtype for dtype in ARRAY_DTYPES.values()}
SCALARS["int"] = np.dtype("<i8")


class PickledColumnError(DataError):
    """A column is pickled, and nobody said that it may be."""


@dataclass(frozen=True)
class Column:
    """One column: its name and its MDS encoding ("str", "int", "ndarray:uint16", "ndarray:uint32:4,2", ...).

    Raises DataError for an encoding that is unknown, or unsafe to decode.
    """

    name: str
    encoding: str

    def __post_init__(self) -> None:
        kind, _, rest = self.encoding.partition(":")
        if kind == "ndarray":
            dtype, _, shape = rest.partition(":")
            known = not dtype or (dtype in SCALARS and dtype != "int")
            if known and (not shape or all(part.isdecimal() and int(part) for part in shape.split(","))):
                return
        elif not rest and (kind in SCALARS or kind in ("str", "bytes", "json", "pkl")):
            return
        raise DataError(
            f"column {self.name!r} has an encoding that is not supported",
            found=self.encoding,
            allowed=["str", "bytes", "json", *SCALARS, "ndarray", "ndarray:DTYPE", "ndarray:DTYPE:SHAPE"],
        )

    @cached_property
    def dtype(self) -> np.dtype[Any] | None:
        """Dtype of a number or array column; None where each value carries its own or there is none."""
        kind, _, rest = self.encoding.partition(":")
        return SCALARS.get(rest.partition(":")[0] if kind == "ndarray" else kind)

    @cached_property
    def shape(self) -> tuple[int, ...] | None:
        """Fixed shape of an array column, else None."""
        parts = self.encoding.split(":")
        return tuple(int(part) for part in parts[2].split(",")) if len(parts) == 3 else None

    @cached_property
    def is_array(self) -> bool:
        """Whether the column holds arrays."""
        return self.encoding.startswith("ndarray")

    @cached_property
    def size(self) -> int | None:
        """Bytes of every value, or None where they vary."""
        if self.dtype is None or (self.is_array and self.shape is None):
            return None
        return self.dtype.itemsize * math.prod(self.shape or ())

    def encode(self, value: Any) -> list[bytes | memoryview]:
        """Return the bytes of a value in parts; array values are not copied.

        Raises:
            DataError: an array is empty, or has another dtype or shape than the column.
        """
        if self.encoding == "str":
            return [value.encode("utf-8")]
        if self.encoding == "bytes":
            return [value]
        if self.encoding == "json":
            return [json.dumps(value).encode("utf-8")]
        if self.encoding == "pkl":
            raise DataError(f"column {self.name!r} is pickled, and nothing is written so")
        if not self.is_array:
            assert self.dtype is not None
            return [self.dtype.type(value).tobytes()]
        array = np.ascontiguousarray(value)
        if (
            array.size == 0
            or (self.dtype or array.dtype) != array.dtype
            or array.dtype not in SCALARS.values()
        ):
            raise DataError(
                f"column {self.name!r} cannot hold this array",
                found=f"{array.dtype} {list(array.shape)}",
                allowed=f"{self.dtype or 'a number type'}, at least one element",
            )
        head = b"" if self.dtype else bytes([_dtype_code(array.dtype)])
        if self.shape is None:
            head += array_header(array.shape)
        elif array.shape != self.shape:
            raise DataError(f"column {self.name!r}: other shape", found=array.shape, allowed=str(self.shape))
        return [head, array.reshape(-1).view(np.uint8).data]

    def decode(self, data: memoryview) -> Any:
        """Return the value; an array is a view of `data`. Raises DataError if the bytes do not fit."""
        try:
            if self.encoding == "str":
                return str(data, "utf-8")
            if self.encoding == "bytes":
                return bytes(data)
            if self.encoding == "json":
                return json.loads(bytes(data))
            if self.encoding == "pkl":
                return read_pickled(bytes(data), list(ARRAY_DTYPES.values()))
            if not self.is_array:
                assert self.dtype is not None
                return np.frombuffer(data, self.dtype)[0].item()
            return self._decode_array(data)
        except (ValueError, IndexError, RecursionError) as error:
            raise DataError(f"column {self.name!r} ({self.encoding}) is damaged", found=str(error)) from None

    def _decode_array(self, data: memoryview) -> np.ndarray:
        dtype, start = self.dtype, 0
        if dtype is None:
            dtype, start = ARRAY_DTYPES.get(data[0]), 1
            if dtype is None:
                raise ValueError(f"dtype code {data[0]}")
        shape = self.shape
        if shape is None:
            num_axes, size_dtype = data[start] >> 2, SHAPE_DTYPES[data[start] & 3]
            stop = start + 1 + num_axes * size_dtype.itemsize
            shape = tuple(int(side) for side in np.frombuffer(data[start + 1 : stop], size_dtype))
            start = stop
            if len(shape) != num_axes or not shape:
                raise ValueError(f"an array of {num_axes} axes in {len(data)} bytes")
        if math.prod(shape) * dtype.itemsize != len(data) - start:
            raise ValueError(f"{dtype} {list(shape)} in {len(data) - start} bytes")
        return np.frombuffer(data, dtype, offset=start).reshape(shape)


def array_header(shape: Sequence[int]) -> bytes:
    """Return the byte of axes and size code, and the shape. All sides must be positive."""
    # The narrowest of 1, 2, 4 and 8 bytes that holds the longest side.
    code = next(code for code in range(4) if max(shape) < 1 << (8 << code))
    return bytes([len(shape) << 2 | code]) + b"".join(side.to_bytes(1 << code, "little") for side in shape)


def encode_sample(columns: Sequence[Column], values: Mapping[str, Any]) -> list[bytes | memoryview]:
    """Return the bytes of a sample in parts; `columns` are sorted by name."""
    sizes: list[int] = []
    parts: list[bytes | memoryview] = []
    for column in columns:
        encoded = column.encode(values[column.name])
        if column.size is None:
            sizes.append(sum(map(len, encoded)))
        parts += encoded
    if any(size > MAX_SHARD_BYTES for size in sizes):
        raise DataError(
            "a document is too long for the store", found=f"{max(sizes)} bytes", allowed="below 4 GiB"
        )
    return [np.array(sizes, "<u4").tobytes(), *parts]


def shard_config(columns: Sequence[Column], *, size_limit: int, hashes: Sequence[str]) -> dict[str, Any]:
    """Return what both the shard and its entry in the index say about the columns."""
    return {
        "version": VERSION,
        "format": "mds",
        "compression": None,
        "hashes": list(hashes),
        "size_limit": size_limit,
        "column_names": [column.name for column in columns],
        "column_encodings": [column.encoding for column in columns],
        "column_sizes": [column.size for column in columns],
    }


@dataclass(frozen=True)
class ShardInfo:
    """One entry of `index.json`."""

    basename: str
    """Path of the file, from the folder of the index."""
    num_bytes: int
    num_samples: int
    columns: tuple[Column, ...]
    hashes: Mapping[str, str]
    zip_basename: str | None = None
    """File of the compressed shard, used where the raw one is not there."""
    compression: str | None = None


def parse_index(index: Any, *, where: str, allow_pickle: bool = False) -> list[ShardInfo]:
    """Check the content of an `index.json` and return its shards.

    Raises:
        DataError: any part is missing, of another type or version, names a file that is not below the index, or has a
            `pkl` column without `allow_pickle`.
    """
    shards = index.get("shards") if isinstance(index, dict) else None
    if not isinstance(shards, list) or index.get("version") != VERSION:
        raise DataError(f"{where} is not an MDS index", allowed=f"version {VERSION} and a list of shards")
    infos = []
    for number, entry in enumerate(shards):
        try:
            infos.append(_parse_shard(entry))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: shard {number} is malformed", found=f"{type(error).__name__}: {error}"
            ) from None
    pickled = {column.name for info in infos for column in info.columns if column.encoding == "pkl"}
    if pickled and not allow_pickle:
        raise PickledColumnError(
            f"{where}: column {min(pickled)!r} is pickled, and reading a pickle can run any code",
            found="pkl",
            allowed="str, bytes, json, int, ndarray and number columns",
            fix="give --allow-pickle where a command has it: arrays are then read and nothing is run; or convert the "
            "data where it was made to an ndarray column",
        )
    names = [info.basename for info in infos]
    if len(set(names)) != len(names):
        raise DataError(f"{where} names a shard file twice")
    return infos


def below(value: Any) -> PurePosixPath:
    """Return a path that an index names: of a file beside it, or in a folder below it (an index of several writers).

    Raises:
        TypeError: it is not text.
        ValueError: it is absolute, or leads up and out.
    """
    name = _text(value)
    path = PurePosixPath(name)
    if "\0" in name or "\\" in name or not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is not a file below the index")
    return path


def _parse_shard(entry: dict[str, Any]) -> ShardInfo:
    if entry["format"] != "mds" or entry["version"] != VERSION:
        raise ValueError(f"format {entry['format']!r} version {entry['version']!r}")
    names, encodings, sizes = entry["column_names"], entry["column_encodings"], entry["column_sizes"]
    if not (len(names) == len(encodings) == len(sizes) > 0) or list(names) != sorted(set(names)):
        raise ValueError("columns are not a sorted list of distinct names")
    columns = tuple(Column(_text(name), _text(encoding)) for name, encoding in zip(names, encodings))
    if [column.size for column in columns] != sizes:
        raise ValueError(f"column sizes {sizes} do not fit {encodings}")
    raw, compressed = entry["raw_data"], entry.get("zip_data")
    return ShardInfo(
        basename=str(below(raw["basename"])),
        num_bytes=_count(raw["bytes"], MAX_SHARD_BYTES),
        num_samples=_count(entry["samples"], MAX_SHARD_BYTES // 4),
        columns=columns,
        hashes={_text(name): _text(value) for name, value in dict(raw.get("hashes") or {}).items()},
        zip_basename=str(below(compressed["basename"])) if compressed else None,
        compression=_text(entry["compression"]) if entry.get("compression") else None,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _count(value: Any, largest: int) -> int:
    if type(value) is not int or not 0 <= value <= largest:
        raise ValueError(f"{value!r} is not a number in 0..{largest}")
    return value


def _dtype_code(dtype: np.dtype[Any]) -> int:
    return next(code for code, known in ARRAY_DTYPES.items() if known == dtype)


class Shard:
    """The samples of one shard in memory (usually a memory map); every access is checked.

    Raises DataError when the header, an offset or a size points outside the data.
    """

    def __init__(self, data: Any, info: ShardInfo, *, where: str) -> None:
        self.data = memoryview(data)
        self.info, self.where = info, where
        self._num_variable = sum(column.size is None for column in info.columns)
        num_samples = info.num_samples
        head_bytes = 4 * (num_samples + 2)
        if len(self.data) != info.num_bytes or len(self.data) < head_bytes:
            raise DataError(
                f"{where} is cut off or has grown",
                found=f"{len(self.data)} bytes",
                allowed=f"{info.num_bytes} bytes",
                fix="copy or make the store again",
            )
        header = np.frombuffer(self.data, "<u4", count=num_samples + 2)
        self.offsets = header[1:]
        """uint32 [samples + 1]: where each sample starts; the last is the end of the file."""
        smallest = 4 * self._num_variable + sum(column.size or 0 for column in info.columns)
        if (
            int(header[0]) != num_samples
            or int(self.offsets[0]) < head_bytes
            or int(self.offsets[-1]) != len(self.data)
            or bool(np.any(np.diff(self.offsets.astype(np.int64)) < smallest))
        ):
            raise DataError(f"{where} has a damaged header", fix="copy or make the store again")

    def __len__(self) -> int:
        return self.info.num_samples

    def spans(self, sample: int) -> dict[str, tuple[int, int]]:
        """Return per column where its bytes start and end in the data."""
        start, stop = int(self.offsets[sample]), int(self.offsets[sample + 1])
        sizes = iter(np.frombuffer(self.data, "<u4", count=self._num_variable, offset=start).tolist())
        position = start + 4 * self._num_variable
        spans = {}
        for column in self.info.columns:
            size = column.size if column.size is not None else next(sizes)
            spans[column.name] = (position, position + size)
            position += size
        if position != stop:
            raise DataError(
                f"{self.where}: sample {sample} is damaged", found=f"{position - start} bytes of columns"
            )
        return spans

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """Decode one sample; arrays are read-only views of the data."""
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        spans = self.spans(sample)
        return {
            column.name: column.decode(self.data[slice(*spans[column.name])]) for column in self.info.columns
        }
