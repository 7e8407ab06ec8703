"""An MDS directory on disk: shards written as they fill, read through memory maps."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from longspan.core.errors import DataError
from longspan.core.files import read_json
from longspan.data.store.mds import (
    INDEX,
    MAX_SHARD_BYTES,
    Column,
    Shard,
    ShardInfo,
    encode_sample,
    parse_index,
    shard_config,
)
from longspan.data.store.shard_files import write_index

# A map holds a file descriptor; views keep their own shard alive, so the cache may drop any of them.
MAX_OPEN_SHARDS = 128


class MDSWriter:
    """Append samples to shards of about `size_limit` bytes in an existing directory; `finish` writes the
    index.

    Holds one shard in memory. Shards carry a SHA-256 in the index.
    """

    def __init__(self, path: str | Path, columns: Sequence[Column], *, size_limit: int) -> None:
        self.path = Path(path)
        self.columns = sorted(columns, key=lambda column: column.name)
        self.body_starts: list[int] = []
        """Where the samples of each finished shard start in its file."""
        self._config = shard_config(self.columns, size_limit=size_limit, hashes=["sha256"])
        self._config_bytes = json.dumps(self._config, sort_keys=True).encode()
        self._size_limit = size_limit
        self._entries: list[dict[str, Any]] = []
        self._parts: list[bytes | memoryview] = []
        self._sizes: list[int] = []
        self._num_bytes = 0

    def write(self, values: Mapping[str, Any]) -> tuple[int, int]:
        """Append a sample; return its shard and where it starts, counted from the shard's first sample.

        Arrays are kept by reference until their shard is written.

        Raises:
            DataError: a value does not fit its column, or the sample is 4 GiB or more.
        """
        return self.write_encoded(encode_sample(self.columns, values))

    def write_encoded(self, parts: Sequence[bytes | memoryview]) -> tuple[int, int]:
        """Append a sample that is encoded already; see `write` and `mds.encode_sample`."""
        size = sum(map(len, parts))
        if self._header_bytes(1) + size > MAX_SHARD_BYTES:
            raise DataError(
                "a document is too long for the store", found=f"{size} bytes", allowed="below 4 GiB"
            )
        if (
            self._sizes
            and self._header_bytes(len(self._sizes) + 1) + self._num_bytes + size > self._size_limit
        ):
            self._flush()
        place = len(self._entries), self._num_bytes
        self._parts += parts
        self._sizes.append(size)
        self._num_bytes += size
        return place

    def finish(self) -> None:
        """Write the last shard and the index."""
        if self._sizes:
            self._flush()
        write_index(self.path, self._entries)

    def _header_bytes(self, num_samples: int) -> int:
        return 4 + 4 * (num_samples + 1) + len(self._config_bytes)

    def _flush(self) -> None:
        num_samples = len(self._sizes)
        start = self._header_bytes(num_samples)
        offsets = start + np.cumsum([0, *self._sizes])
        head = np.array([num_samples, *offsets], "<u4").tobytes() + self._config_bytes
        name = f"shard.{len(self._entries):05}.mds"
        digest = hashlib.sha256()
        with open(self.path / name, "wb") as file:
            for part in (head, *self._parts):
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        raw = {"basename": name, "bytes": int(offsets[-1]), "hashes": {"sha256": digest.hexdigest()}}
        self._entries.append({**self._config, "samples": num_samples, "raw_data": raw, "zip_data": None})
        self.body_starts.append(start)
        self._parts, self._sizes, self._num_bytes = [], [], 0


def stay_inside(folder: Path, names: Iterable[str]) -> None:
    """Check that the folders of shards are below `folder`, links followed; the shard itself may be a link.

    Raises:
        DataError: naming the first that is not.
    """
    home = folder.resolve()
    for parent in sorted({Path(name).parent for name in names} - {Path(".")}):
        found = (folder / parent).resolve()
        if not found.is_relative_to(home):
            raise DataError(
                f"{folder / INDEX} names shards outside of its folder",
                found=f"{parent} is a link to {found}",
                fix="copy that folder here",
            )


class MDSDirectory:
    """Samples of an MDS directory by number, decoded on access, arrays as read-only views of the mapped file.

    Opening reads the index and the sizes of the files; a shard's header is checked when it is first touched.
    Shards that are there only compressed (zstd, gzip, bz2) are decompressed into memory.

    Args:
        allow_pickle: read `pkl` columns; see `pickled`.
        check_sizes: look at every file at once. False: a shard that is missing or cut off fails when it is opened.

    Raises:
        DataError: the index is missing or malformed, a shard is missing or has another size, or stands in a folder
            that is a link to outside.
    """

    def __init__(self, path: str | Path, *, allow_pickle: bool = False, check_sizes: bool = True) -> None:
        self.path = Path(path)
        if not (self.path / INDEX).is_file():
            raise DataError(f"{self.path} is not an MDS directory", found=f"no {INDEX}")
        index = self.path / INDEX
        self.shards = parse_index(read_json(index), where=str(index), allow_pickle=allow_pickle)
        stay_inside(self.path, [info.basename for info in self.shards])
        for info in self.shards if check_sizes else ():
            self._check_size(info)
        self._first = np.cumsum([0, *(info.num_samples for info in self.shards)])
        self._open = lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, sample: int) -> dict[str, Any]:
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        return self.shard(shard)[sample - int(self._first[shard])]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(len(self.shards)):
            yield from map(self.shard(number).__getitem__, range(self.shards[number].num_samples))

    def shard(self, number: int) -> Shard:
        """Return an open shard. Raises DataError when its header is damaged."""
        return self._open(number)

    def _check_size(self, info: ShardInfo) -> None:
        path = self.path / info.basename
        if path.is_file():
            if path.stat().st_size != info.num_bytes:
                raise DataError(
                    f"{path} is cut off or has grown",
                    found=f"{path.stat().st_size} bytes",
                    allowed=f"{info.num_bytes} bytes",
                    fix="copy or make the store again",
                )
        elif info.zip_basename is None or not (self.path / info.zip_basename).is_file():
            raise DataError(f"{path} is missing", fix="copy or make the store again")

    def _open_shard(self, number: int) -> Shard:
        info = self.shards[number]
        self._check_size(info)
        path = self.path / info.basename
        if not path.is_file():
            return Shard(self._decompress(info), info, where=str(self.path / str(info.zip_basename)))
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot map {path}", found=str(error)) from None
        return Shard(data, info, where=str(path))

    def _decompress(self, info: ShardInfo) -> bytes:
        import zstandard

        path = self.path / str(info.zip_basename)
        # One byte more than announced shows a shard that is larger, without unpacking a bomb.
        limit = info.num_bytes + 1
        kind = (info.compression or "").partition(":")[0]
        try:
            if kind == "zstd":
                with open(path, "rb") as file:
                    # No window is larger than the shard itself.
                    opened = zstandard.ZstdDecompressor(max_window_size=1 << 31)
                    return opened.stream_reader(file).read(limit)
            if kind in ("gz", "bz2"):
                with gzip.open(path) if kind == "gz" else bz2.open(path) as stream:
                    return stream.read(limit)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{path} is a damaged compressed shard", found=str(error)) from None
        raise DataError(f"{path}: compression is not supported", found=kind, allowed=["zstd", "gz", "bz2"])
