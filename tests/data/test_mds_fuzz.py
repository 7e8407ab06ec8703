"""Mutated shards and indexes: never a crash, a hang or a read outside of the file, always our error.

Every value that is decoded is compared with the size it may have, so a wild read would be seen as one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.core.errors import DataError
from longspan.data.packed.packed_rows import PackedRows
from longspan.data.store import Column, MDSDirectory, MDSWriter
from longspan.data.store.mds import Shard, parse_index

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def original(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Write one shard with a column of every kind; return its bytes and the index."""
    path.mkdir()
    columns = [
        Column("domain", "str"),
        Column("fixed", "ndarray:uint16:2,3"),
        Column("free", "ndarray"),
        Column("indices", "ndarray:uint32"),
        Column("input_ids", "ndarray:uint32"),
        Column("length", "int"),
        Column("meta", "json"),
        Column("raw", "bytes"),
        Column("score", "float32"),
    ]
    writer = MDSWriter(path, columns, size_limit=1 << 20)
    for number in range(4):
        writer.write(
            {
                "domain": "book" * number,
                "fixed": np.arange(6, dtype=np.uint16).reshape(2, 3),
                "free": np.arange(number + 1, dtype=np.float64),
                "indices": np.array([[0, 4], [4, 12]], np.uint32),
                "input_ids": np.arange(12, dtype=np.uint32),
                "length": 12,
                "meta": {"id": [number, None]},
                "raw": b"\0\1" * number,
                "score": 0.5,
            }
        )
    writer.finish()
    return (path / "shard.00000.mds").read_bytes(), json.loads((path / "index.json").read_text())


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """Return the bytes with a few flips, numbers at the edge of their type, cuts, repeats or additions."""
    content = bytearray(data)
    for _ in range(int(generator.integers(1, 4))):
        # Half of the changes hit the table of places and the sizes in front.
        limit = len(content) if generator.random() < 0.5 else min(64, len(content))
        at = int(generator.integers(0, max(1, limit)))
        kind = int(generator.integers(0, 6))
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << int(generator.integers(0, 8))
        elif kind == 1:
            value = INTERESTING[int(generator.integers(0, len(INTERESTING)))]
            content[at : at + 4] = value.to_bytes(4, "little")
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            content[at:at] = generator.bytes(int(generator.integers(1, 9)))
        elif kind == 4:
            del content[at : at + int(generator.integers(1, 9))]
        else:
            content[at : at + 8] = generator.bytes(8)
    return bytes(content)


def size_of(value: Any) -> int:
    """Return the bytes that a decoded value holds."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    return len(value) if isinstance(value, (bytes, str)) else 0


def read_all(data: bytes, index: Any) -> bool:
    """Read every sample; return whether all could be read. Raises whatever is not our error."""
    try:
        for info in parse_index(index, where="index.json"):
            shard = Shard(data, info, where="shard")
            for sample in range(len(shard)):
                decoded = shard[sample]
                assert sum(map(size_of, decoded.values())) <= len(data), "more than the file holds"
    except DataError:
        return False
    return True


def fuzz_shards(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """Mutate a shard `count` times, half of them with a size in the index that fits; return read, refused."""
    data, index = original(folder)
    generator = np.random.default_rng(seed)
    read = 0
    for number in range(count):
        mutated = mutate(data, generator)
        if number % 2:
            index["shards"][0]["raw_data"]["bytes"] = len(mutated)
        started = time.monotonic()
        read += read_all(mutated, index)
        assert time.monotonic() - started < 5, "a read that hangs"
        index["shards"][0]["raw_data"]["bytes"] = len(data)
    return read, count - read


def mutate_index(index: Any, generator: np.random.Generator) -> Any:
    """Return an index in which one value, anywhere, is another, gone or of another type."""
    text = json.dumps(index)
    copy = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            places.append((value, key))
            if isinstance(child, (dict, list)):
                collect(child)

    collect(copy)
    parent, key = places[int(generator.integers(0, len(places)))]
    values = [
        None,
        -1,
        0,
        2**32,
        2**63,
        1.5,
        "",
        "../x",
        "pkl",
        "ndarray:uint32:0",
        [],
        {},
        [[]],
        True,
        "str",
    ]
    if generator.random() < 0.2:
        del parent[key]
    else:
        parent[key] = values[int(generator.integers(0, len(values)))]
    return copy


def fuzz_indexes(folder: Path, count: int, seed: int) -> None:
    """Mutate the index `count` times."""
    data, index = original(folder)
    generator = np.random.default_rng(seed)
    for _ in range(count):
        read_all(data, mutate_index(index, generator))


def fuzz_folders(folder: Path, count: int, seed: int) -> None:
    """Mutate shards on the disk: what maps files, and what reads rows from them, must hold as well."""
    data, index = original(folder)
    generator = np.random.default_rng(seed)
    for _ in range(count):
        mutated = mutate(data, generator)
        index["shards"][0]["raw_data"]["bytes"] = len(mutated)
        (folder / "shard.00000.mds").write_bytes(mutated)
        (folder / "index.json").write_text(json.dumps(index))
        try:
            list(MDSDirectory(folder))
            rows = PackedRows(folder)
            for row in range(rows.num_rows):
                found = rows.row(row)
                assert len(found.input_ids) == rows.length == found.cu_seqlens[-1]
        except DataError:
            pass


def test_mutated_shards(tmp_path: Path) -> None:
    """A few thousand of what the slow test does."""
    read, refused = fuzz_shards(tmp_path / "shards", 2000, 1)
    assert read > 100 and refused > 1000  # changes of values are read, changes of structure are not
    fuzz_indexes(tmp_path / "indexes", 500, 2)
    fuzz_folders(tmp_path / "folders", 200, 3)


@pytest.mark.slow
def test_many_mutated_shards(tmp_path: Path) -> None:
    """At least 50,000 shards."""
    read, refused = fuzz_shards(tmp_path / "shards", 50_000, 11)
    assert read > 1000 and refused > 10_000
    fuzz_indexes(tmp_path / "indexes", 10_000, 12)
    fuzz_folders(tmp_path / "folders", 5000, 13)
