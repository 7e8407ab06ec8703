"""MDS codec: exact bytes, round trips, and files that lie."""

from __future__ import annotations

import bz2
import contextlib
import copy
import gzip
import hashlib
import json
import os
import pickle  # noqa: TID251  what others write
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from longspan.core.errors import DataError
from longspan.data.store.directory import MDSDirectory, MDSWriter
from longspan.data.store.mds import ARRAY_DTYPES, Column, Shard, encode_sample, parse_index
from longspan.data.store.pickled import read_pickled
from longspan.data.verify import verify

TOKENS = (Column("domain", "str"), Column("input_ids", "ndarray:uint16"), Column("length", "int"))


def write(
    path: Path, columns: tuple[Column, ...], samples: list[dict[str, Any]], size_limit: int = 1 << 16
) -> Path:
    path.mkdir(exist_ok=True)
    writer = MDSWriter(path, columns, size_limit=size_limit)
    for sample in samples:
        writer.write(sample)
    writer.finish()
    return path


def sample(*ids: int, domain: str = "book") -> dict[str, Any]:
    return {"domain": domain, "input_ids": np.array(ids, np.uint16), "length": len(ids)}


def test_bytes_of_a_sample() -> None:
    """Guards against any change of the format: sizes, text, array header, values, length."""
    data = b"".join(encode_sample(TOKENS, sample(5, 6, 7)))
    assert data.hex(" ", 2) == (
        "0400 0000 0800 0000"  # bytes of domain and input_ids
        " 626f 6f6b"  # book
        " 0403 0500 0600 0700"  # one axis counted in u8, 3 values
        " 0300 0000 0000 0000"  # length as i64
    )


def test_shard_equals_the_reference_writer(tmp_path: Path) -> None:
    """Guards against shards other tools cannot read.

    The digest is of the body that mosaicml-streaming 0.13.0 wrote for these two samples; the header of its shard
    counts 2 samples that start at bytes 241 and 269 and end at 889 with a config of 225 bytes (no hashes).
    """
    samples = [sample(5, 6, 7), sample(*range(300), domain="c")]
    write(tmp_path, TOKENS, samples)
    data = (tmp_path / "shard.00000.mds").read_bytes()
    num_samples, *offsets = np.frombuffer(data, "<u4", count=4).tolist()
    config = json.loads(data[16 : offsets[0]])
    assert (num_samples, offsets[1] - offsets[0], offsets[2] - offsets[0]) == (2, 28, 648)
    assert config["column_sizes"] == [None, None, 8] and config["version"] == 2
    config["hashes"] = []
    body = json.dumps(config, sort_keys=True).encode() + data[offsets[0] :]
    assert len(body) == 889 - 16
    whole = np.array([2, 241, 269, 889], "<u4").tobytes() + body
    assert (
        hashlib.sha256(whole).hexdigest()
        == "e79b55b003341a3737aba2419a04935efb4149ba306fb35bc2ae6257b4d36431"
    )


ARRAYS = hnp.arrays(
    dtype=st.sampled_from(list(ARRAY_DTYPES.values())),
    # Beyond 255 a side takes two bytes.
    shape=hnp.array_shapes(max_dims=3, max_side=9) | hnp.array_shapes(max_dims=1, min_side=250, max_side=300),
    elements={"allow_nan": False, "min_value": 0, "max_value": 100},
    fill=st.just(7),
)
SAMPLES = st.fixed_dictionaries(
    {"any": ARRAYS, "text": st.text(max_size=30), "raw": st.binary(max_size=30)}
    | {"number": st.integers(-(2**63), 2**63 - 1), "value": st.dictionaries(st.text(), st.integers())}
)


@settings(max_examples=25, deadline=None)
@given(samples=st.lists(SAMPLES, min_size=1, max_size=5), limit=st.sampled_from([1, 700, 1 << 20]))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, samples: list[Any], limit: int) -> None:
    """Guards against values that change on their way, whatever the cut into shards."""
    encodings = {"any": "ndarray", "text": "str", "raw": "bytes", "number": "int", "value": "json"}
    columns = tuple(Column(name, encoding) for name, encoding in encodings.items())
    directory = MDSDirectory(write(tmp_path_factory.mktemp("mds"), columns, samples, limit))
    assert verify(directory.path).is_whole
    assert len(directory) == len(samples)
    for index, wanted in enumerate(samples):
        found = directory[index]
        assert found["any"].dtype == wanted["any"].dtype
        assert np.array_equal(found.pop("any"), wanted["any"])
        assert found == {name: value for name, value in wanted.items() if name != "any"}


@pytest.mark.parametrize("side", [1, 255, 256, 65535, 65536])
def test_array_header_width(side: int) -> None:
    """Guards against an array being counted in too few bytes at the limits of u8 and u16."""
    column = Column("a", "ndarray:uint8")
    data = b"".join(column.encode(np.ones(side, np.uint8)))
    assert len(data) == side + 1 + (1 if side < 256 else 2 if side < 65536 else 4)
    assert len(column.decode(memoryview(data))) == side


def test_fixed_shapes_and_numbers(tmp_path: Path) -> None:
    """Guards against columns of packed rows (fixed shapes) and plain numbers being misread."""
    columns = (Column("m", "ndarray:uint32:2,2"), Column("f", "float32"), Column("u", "uint8"))
    values = {"m": np.array([[1, 2], [3, 4]], np.uint32), "f": 0.5, "u": 255}
    (found,) = MDSDirectory(write(tmp_path, columns, [values]))
    assert found["m"].tolist() == [[1, 2], [3, 4]] and (found["f"], found["u"]) == (0.5, 255)
    assert not found["m"].flags.writeable


def test_values_that_do_not_fit() -> None:
    """Guards against writing what no reader accepts: empty arrays, other dtypes, other shapes."""
    for encoding, value in [
        ("ndarray:uint16", np.zeros(0, np.uint16)),
        ("ndarray:uint16", np.zeros(3, np.int64)),
        ("ndarray:uint16:2", np.zeros(3, np.uint16)),
        ("ndarray", np.zeros(3, np.complex64)),
    ]:
        with pytest.raises(DataError):
            Column("a", encoding).encode(value)


@pytest.mark.parametrize("encoding", ["jpeg", "ndarray:object", "ndarray:int", "ndarray:uint8:0", "str:1"])
def test_refused_encodings(encoding: str) -> None:
    """Guards against guessing unknown encodings."""
    with pytest.raises(DataError, match="not supported"):
        Column("a", encoding)


def pickled_folder(folder: Path, *values: bytes) -> Path:
    """Write an MDS folder with a pickled column, as mosaicml-streaming does for whatever it is given."""
    write(folder, (Column("a", "bytes"),), [{"a": value} for value in values])
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["column_encodings"] = ["pkl"]
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_arrays_are_read_on_request(tmp_path: Path, protocol: int) -> None:
    """Refused unless asked for; then what numpy itself would read, of every protocol and order."""
    arrays = [
        np.arange(300, dtype=np.int64),
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(4, dtype=np.float16)[::2],
        np.arange(4, dtype=">u2"),
    ]
    folder = pickled_folder(tmp_path, *(pickle.dumps(array, protocol) for array in arrays[:4]))
    with pytest.raises(DataError, match=r"pickle can run any code(.|\n)*--allow-pickle"):
        MDSDirectory(folder)
    for found, array in zip(MDSDirectory(folder, allow_pickle=True), arrays):
        assert np.array_equal(found["a"], array) and found["a"].dtype == array.dtype
    with pytest.raises(ValueError, match="an array of"):
        read_pickled(pickle.dumps(arrays[4], protocol), [np.dtype("<u2")])
    with pytest.raises(DataError, match="nothing is written"):
        Column("a", "pkl").encode(arrays[0])


class Caller:
    """Pickled, it is a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_pickles_run_nothing(tmp_path: Path) -> None:
    """Calls, objects in arrays, damaged bytes and arrays that claim more than there is end in one message."""
    mark = tmp_path / "ran"
    array = pickle.dumps(np.arange(9))
    hostile = [
        pickle.dumps(Caller(os.mkdir, str(mark))),
        pickle.dumps([np.arange(3), Caller(os.mkdir, str(mark))]),
        pickle.dumps(np.array([Caller(os.mkdir, str(mark))], object)),
        pickle.dumps(Caller(exec, f"import os; os.mkdir({str(mark)!r})")),
        pickle.dumps({"a": 1}),
        pickle.dumps([[1]]),
        array.replace(b"K\x09\x85", b"K\xff\x85"),
        b"cnumpy\ndtype\n(N}S'arguments'\nI1\ns\x86b.",
        b"cos\nsystem\n(S'false'\ntR.",
        b"",
    ]
    folder = pickled_folder(tmp_path / "folder", *hostile)
    directory = MDSDirectory(folder, allow_pickle=True)
    for number in range(len(hostile)):
        with pytest.raises(DataError, match="is damaged"):
            directory[number]
    assert not mark.exists()
    generator = np.random.default_rng(0)
    for _ in range(300):
        mutated = bytearray(array)
        mutated[int(generator.integers(len(array)))] = int(generator.integers(256))
        with contextlib.suppress(ValueError):
            read_pickled(bytes(mutated), [np.dtype("<i8")])


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "..", ".", "", "a\\b", "a\0b", 5, None])
def test_index_cannot_name_files_elsewhere(tmp_path: Path, name: Any) -> None:
    """Guards against an index that makes us read files outside its directory."""
    write(tmp_path, TOKENS, [sample(1)])
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = name
    with pytest.raises(DataError, match="shard 0 is malformed"):
        parse_index(index, where="index.json")


def test_index_of_wrong_shape(tmp_path: Path) -> None:
    """Guards against a crash or a wild read when any single value of the index is replaced."""
    write(tmp_path, TOKENS, [sample(1, 2), sample(3)])
    whole = json.loads((tmp_path / "index.json").read_text())
    entry = whole["shards"][0]
    refused = 0
    for path in [(name,) for name in entry] + [("raw_data", name) for name in entry["raw_data"]]:
        for value in (None, -1, 7, 2**40, "x", [], {}, ["a"], [[]], True, 1.5):
            index = copy.deepcopy(whole)
            target = index["shards"][0]
            for name in path[:-1]:
                target = target[name]
            target[path[-1]] = value
            (tmp_path / "index.json").write_text(json.dumps(index))
            refused += not verify(tmp_path).is_whole
    assert refused > 70
    for broken in (
        "",
        "[]",
        "{}",
        '{"version": 2}',
        '{"version": 3, "shards": []}',
        '{"version": 2, "shards": [1]}',
    ):
        (tmp_path / "index.json").write_text(broken)
        with pytest.raises(DataError):
            MDSDirectory(tmp_path)


def test_mutated_shards_never_read_wild(tmp_path: Path) -> None:
    """Guards against wild reads: 2000 shards with flipped, cut or spliced bytes are refused or decode in bounds."""
    generator = np.random.default_rng(0)
    samples = [sample(*range(1, 2 + n % 9), domain="ab"[n % 2]) for n in range(12)]
    write(tmp_path, TOKENS, samples)
    info = MDSDirectory(tmp_path).shards[0]
    whole = (tmp_path / "shard.00000.mds").read_bytes()
    body = int(np.frombuffer(whole, "<u4", offset=4, count=1)[0])
    hot = [*range(4 * (len(samples) + 2)), *range(body, len(whole))]  # offsets and samples, not the config
    outcomes = {"refused": 0, "read": 0}
    for round_number in range(2000):
        data = bytearray(whole)
        for _ in range(generator.integers(1, 4)):
            data[generator.choice(hot)] = generator.integers(256)
        if round_number % 10 == 0:
            start, stop = sorted(generator.integers(0, len(data), 2))
            data[start:stop] = b"" if round_number % 20 else bytes(stop - start)
        try:
            shard = Shard(bytes(data), info, where="shard")
            for number in range(len(shard)):
                ids = shard[number]["input_ids"]
                assert 0 < ids.nbytes < len(data)
            outcomes["read"] += 1
        except DataError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 500 and outcomes["read"] > 100, outcomes


def test_cut_grown_or_missing_shards(tmp_path: Path) -> None:
    """Guards against a copy that stopped half-way."""
    write(tmp_path, TOKENS, [sample(1, 2, 3)])
    shard = tmp_path / "shard.00000.mds"
    whole = shard.read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        shard.write_bytes(content)
        with pytest.raises(DataError, match="cut off or has grown"):
            MDSDirectory(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        MDSDirectory(tmp_path)


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    """Guards against damage inside token values, which no header shows."""
    write(tmp_path, TOKENS, [sample(1, 2, 3)])
    shard = tmp_path / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)
    directory = MDSDirectory(tmp_path)
    assert directory[0]["input_ids"].tolist() == [1, 2, 2]
    assert "changed or damaged" in verify(tmp_path).problems[0]


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "zstd:3": zstandard.ZstdCompressor().compress,
    "gz": gzip.compress,
    "bz2:9": bz2.compress,
}


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_shards(tmp_path: Path, kind: str) -> None:
    """Guards against released compressed data being unreadable, and against bombs and cut files."""
    write(tmp_path, TOKENS, [sample(*range(1, 2000))])
    index = json.loads((tmp_path / "index.json").read_text())
    raw = tmp_path / "shard.00000.mds"
    packed = COMPRESS[kind](raw.read_bytes())
    index["shards"][0] |= {
        "compression": kind,
        "zip_data": {"basename": "z", "bytes": len(packed), "hashes": {}},
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    size = raw.stat().st_size
    raw.unlink()
    (tmp_path / "z").write_bytes(packed)
    assert len(MDSDirectory(tmp_path)[0]["input_ids"]) == 1999
    for content in (packed[: len(packed) // 2], b"junk" * 9, COMPRESS[kind](bytes(10 * size))):
        (tmp_path / "z").write_bytes(content)
        with pytest.raises(DataError):
            MDSDirectory(tmp_path)[0]


def test_unknown_compression(tmp_path: Path) -> None:
    """Guards against a compression that is only guessed."""
    write(tmp_path, TOKENS, [sample(1)])
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0] |= {"compression": "br", "zip_data": {"basename": "z", "bytes": 1, "hashes": {}}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "shard.00000.mds").rename(tmp_path / "z")
    with pytest.raises(DataError, match="compression is not supported"):
        MDSDirectory(tmp_path)[0]


def test_many_shards_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against running out of file descriptors, and against views dying with their shard."""
    from longspan.data.store import directory as module

    monkeypatch.setattr(module, "MAX_OPEN_SHARDS", 2)
    directory = MDSDirectory(write(tmp_path, TOKENS, [sample(n, n) for n in range(1, 9)], size_limit=1))
    assert len(directory.shards) == 8
    views = [directory[index]["input_ids"] for index in (0, 7, 3, 0, 5, 1)]
    assert [view.tolist() for view in views] == [[1, 1], [8, 8], [4, 4], [1, 1], [6, 6], [2, 2]]
    with pytest.raises(IndexError):
        directory[8]
    with pytest.raises(IndexError):
        directory[-1]
