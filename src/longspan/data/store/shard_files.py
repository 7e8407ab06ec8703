"""MDS shards of a known number of samples, written as the samples come, and the index of a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longspan.core.errors import DataError
from longspan.core.files import atomic_write
from longspan.data.store.mds import INDEX, MAX_SHARD_BYTES, VERSION, Column, shard_config

SIZE_LIMIT = 1 << 26


def write_shard(
    path: Path,
    columns: Sequence[Column],
    samples: Iterable[Sequence[bytes | memoryview]],
    num_samples: int,
    *,
    fix: str | None = None,
) -> None:
    """Write encoded samples as one shard, whole or not at all, holding one of them in memory.

    Raises:
        DataError: they are 4 GiB or more; `fix` says what makes them smaller.
    """
    config = json.dumps(_config(columns), sort_keys=True).encode()
    offsets = np.zeros(num_samples + 1, np.int64)
    offsets[0] = 4 * (num_samples + 2) + len(config)
    with atomic_write(path) as file:
        # The table of places stands in front of the samples and is known after them.
        file.seek(int(offsets[0]))
        for number, parts in enumerate(samples):
            offsets[number + 1] = offsets[number] + sum(map(len, parts))
            file.writelines(parts)
        if offsets[-1] > MAX_SHARD_BYTES:
            raise DataError("the rows are too large for a shard", found=f"{offsets[-1]} bytes", fix=fix)
        file.seek(0)
        file.write(np.array([num_samples, *offsets], "<u4").tobytes() + config)


def shard_entries(columns: Sequence[Column], pieces: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what an index says of shards that `write_shard` wrote: of each its file, rows and bytes."""
    return [
        {
            **_config(columns),
            "samples": piece["rows"],
            "raw_data": {"basename": piece["file"], "bytes": piece["bytes"], "hashes": {}},
            "zip_data": None,
        }
        for piece in pieces
    ]


def write_index(folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Write the index that makes a folder of shards an MDS directory."""
    with atomic_write(folder / INDEX, "w") as file:
        json.dump({"version": VERSION, "shards": list(shards)}, file, sort_keys=True)


def _config(columns: Sequence[Column]) -> dict[str, Any]:
    return shard_config(columns, size_limit=SIZE_LIMIT, hashes=[])
