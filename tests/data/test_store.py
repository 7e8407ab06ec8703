"""Token store: whole or absent, strict on opening, and views without copies."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.core.errors import DataError, RunError
from longspan.data.store import MDSDirectory, TokenStore, TokenStoreWriter, token_dtype
from longspan.data.store.lengths import LengthTable
from longspan.data.tokenizer import Tokenizer
from longspan.data.verify import verify

DOCUMENTS = [([1, 2, 3], "book", 11), ([4] * 300, "caf\u00e9", 12), ([299], "book", 13), ([5, 6], "web", 14)]


class Identity:
    """A tokenizer as far as a store is concerned."""

    fingerprint = "f" * 64
    bos_id, eos_id, pad_id = 0, 1, None

    def __init__(self, vocab_size: int = 300) -> None:
        self.vocab_size = vocab_size


def build(
    path: Path, *, masks: dict[int, list[int]] | None = None, vocab_size: int = 300, **options: Any
) -> Path:
    with TokenStoreWriter(path, config={"a": 1}, tokenizer=Identity(vocab_size), **options) as writer:
        for index, (ids, source, key) in enumerate(DOCUMENTS):
            mask = np.array(masks[index], np.uint8) if masks and index in masks else None
            writer.add(np.array(ids), source=source, key=key, mask=mask)
        writer.counts = {"documents": len(DOCUMENTS)}
    return path


@pytest.mark.parametrize("shard_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_round_trip(tmp_path: Path, shard_bytes: int, vocab_size: int, dtype: str) -> None:
    """Guards against offsets that are right for one shard size or dtype only."""
    store = TokenStore(build(tmp_path / "s", shard_bytes=shard_bytes, vocab_size=vocab_size))
    assert verify(store.path).is_whole
    assert len(store) == 4 and store.num_tokens == 306 and store.vocab_size == vocab_size
    for document, (ids, source, key) in enumerate(DOCUMENTS):
        tokens = store.tokens(document)
        assert tokens.tolist() == ids and tokens.dtype == dtype and not tokens.flags.writeable
        assert store.source(document) == source and store.mask(document) is None
        assert store.lengths.key[document] == key
    assert store.lengths.source_names == ("book", "caf\u00e9", "web")
    assert store.lengths.position.tolist() == [0, 1, 2, 3]
    assert store.manifest.tokenizer["eos_id"] == 1 and store.manifest.counts == {"documents": 4}
    with pytest.raises(IndexError):
        store.tokens(4)
    with pytest.raises(IndexError):
        store.tokens(-1)


def test_other_tools_see_plain_mds(tmp_path: Path) -> None:
    """Guards against a store that only we can read."""
    samples = list(MDSDirectory(build(tmp_path / "s")))
    assert [sorted(sample) for sample in samples] == [["domain", "input_ids", "length"]] * 4
    assert samples[1]["domain"] == "caf\u00e9" and samples[1]["length"] == 300


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_mask_column_for_all_or_none(tmp_path: Path, first: int, shard_bytes: int) -> None:
    """Guards against shards with and without a mask in one store, when the first mask comes late."""
    weights = (np.arange(len(DOCUMENTS[first][0])) % 256).tolist()
    store = TokenStore(build(tmp_path / "s", masks={first: weights}, shard_bytes=shard_bytes))
    assert verify(store.path).is_whole
    assert store.has_mask
    for document, (ids, source, _) in enumerate(DOCUMENTS):
        assert store.tokens(document).tolist() == ids and store.source(document) == source
        mask = store.mask(document)
        assert mask is not None and mask.tolist() == (weights if document == first else [1] * len(ids))
    assert sorted(path.name for path in store.path.iterdir() if path.is_dir()) == ["lengths"]


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    """Guards against a plan running on other documents, and against shard sizes changing the identity."""
    plain = TokenStore(build(tmp_path / "a", shard_bytes=1)).fingerprint
    assert TokenStore(build(tmp_path / "b")).fingerprint == plain
    masked = TokenStore(build(tmp_path / "c", masks={0: [0, 1, 1]})).fingerprint
    assert masked not in (plain, TokenStore(build(tmp_path / "d", masks={0: [1, 0, 1]})).fingerprint)


def test_rejected_documents(tmp_path: Path) -> None:
    """Guards against empty arrays (no form in MDS) and ids that would wrap around in uint16."""
    for ids, mask in [([], None), ([300], None), ([-1], None), ([1, 2], [1]), ([1], [1.0])]:
        with (
            pytest.raises(DataError),
            TokenStoreWriter(tmp_path / "s", config={}, tokenizer=Identity()) as writer,
        ):
            weights = None if mask is None else np.array(mask)
            writer.add(np.array(ids, np.int64), source="a", key=1, mask=weights)
        assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(DataError, match="no document"),
        TokenStoreWriter(tmp_path / "s", config={}, tokenizer=Identity()),
    ):
        pass
    assert token_dtype(1 << 16) == np.uint16 and token_dtype((1 << 16) + 1) == np.uint32


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    """Guards against a half-written store under its final name, and against replacing a finished one."""
    with (
        pytest.raises(ZeroDivisionError),
        TokenStoreWriter(tmp_path / "s", config={}, tokenizer=Identity(), shard_bytes=1) as writer,
    ):
        writer.add(np.array([1]), source="a", key=1)
        writer.add(np.array([1]), source="a", key=1)
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    build(tmp_path / "s")
    with pytest.raises(DataError, match="already exists"):
        build(tmp_path / "s")


def test_store_without_manifest_is_incomplete(tmp_path: Path) -> None:
    """Guards against shards being taken for a store before the last file is there."""
    store = build(tmp_path / "s")
    (store / "longspan.json").unlink()
    with pytest.raises(DataError, match="incomplete token store"):
        TokenStore(store)
    with pytest.raises(DataError, match="not a token store"):
        TokenStore(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        TokenStore(tmp_path / "none")


def test_manifest_of_wrong_shape(tmp_path: Path) -> None:
    """Guards against a crash or a wrong dtype when any field of the manifest is replaced."""
    store = build(tmp_path / "s")
    file = store / "longspan.json"
    whole = json.loads(file.read_text())
    for name in whole:
        for value in (None, -1, [], True, "x"):
            if type(value) is type(whole[name]) and name in ("longspan", "fingerprint"):
                continue
            file.write_text(json.dumps(whole | {name: value}))
            with pytest.raises(DataError):
                TokenStore(store)
    for broken in ("{", "[]", json.dumps({name: whole[name] for name in list(whole)[1:]})):
        file.write_text(broken)
        with pytest.raises(DataError):
            TokenStore(store)
    file.write_text(json.dumps(whole | {"dtype": "uint32"}))
    with pytest.raises(DataError, match="contradicts itself"):
        TokenStore(store)


def test_mutated_stores_never_read_wild(tmp_path: Path) -> None:
    """Guards against wild reads: a store with flipped bytes in any file is refused or gives arrays in bounds."""
    original = build(tmp_path / "s", masks={0: [0, 2, 1]}, shard_bytes=400)
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    generator = np.random.default_rng(0)
    outcomes = {"refused": 0, "read": 0}
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    for _ in range(250):
        name = files[generator.integers(len(files))]
        data = bytearray((original / name).read_bytes())
        for _ in range(generator.integers(1, 3)):
            data[generator.integers(len(data))] = generator.integers(256)
        (copy / name).write_bytes(
            data[: generator.integers(len(data))] if generator.integers(8) == 0 else data
        )
        try:
            store = TokenStore(copy)
            for document, (ids, _, _) in enumerate(DOCUMENTS):
                mask = store.mask(document)
                assert len(store.tokens(document)) == len(ids)
                assert mask is None or len(mask) == len(ids)
            outcomes["read"] += 1
        except DataError:
            outcomes["refused"] += 1
        (copy / name).write_bytes((original / name).read_bytes())
    assert outcomes["refused"] > 80 and outcomes["read"] > 15, outcomes


@pytest.mark.parametrize(
    ("column", "value"), [("offset", 2**40), ("offset", 0), ("tokens", 2**31), ("tokens", 0), ("shard", 9)]
)
def test_length_table_cannot_point_outside(tmp_path: Path, column: str, value: int) -> None:
    """Guards against reading beyond the mapped file through a forged length table."""
    store = build(tmp_path / "s")
    table = LengthTable.load(store / "lengths", mmap=False)
    getattr(table, column)[2] = value
    table.save(store / "lengths")
    with pytest.raises(DataError, match="contradicts itself"):
        TokenStore(store)


def test_shifted_offset_is_noticed_on_reading(tmp_path: Path) -> None:
    """Guards against ids read from the middle of a neighbour when table and shard are of two stores."""
    store = build(tmp_path / "s")
    table = LengthTable.load(store / "lengths", mmap=False)
    table.offset[2] -= 2
    table.save(store / "lengths")
    with pytest.raises(DataError, match="document 2 does not stand"):
        TokenStore(store).tokens(2)


def test_verify_finds_changed_ids(tmp_path: Path) -> None:
    """Guards against damage that leaves every header whole."""
    path = build(tmp_path / "s")
    store = TokenStore(path)
    shard = path / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[int(store.lengths.offset[1]) + 5] ^= 1
    shard.write_bytes(data)
    assert "changed or damaged" in verify(path).problems[0]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    """Guards against disks filling up with what killed runs left beside the store."""
    for name in (".s.deadbeef.tmp", ".other.deadbeef.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard.00000.mds").write_bytes(b"x")
    build(tmp_path / "s")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.deadbeef.tmp", "s"]


FILE_LIMIT = """
import resource, signal, sys
import numpy as np
from longspan.core.errors import RunError
from longspan.data.store import TokenStoreWriter

class Identity:
    fingerprint, vocab_size, bos_id, eos_id, pad_id = "f", 300, None, None, None

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with TokenStoreWriter(sys.argv[1], config={}, tokenizer=Identity(), shard_bytes=1 << 14) as writer:
        for key in range(100):
            writer.add(np.arange(256), source="a", key=key)
except RunError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_full_disk_is_a_run_error_and_leaves_nothing(tmp_path: Path) -> None:
    """Guards against a full disk leaving a store that opens, or a traceback instead of a message."""
    command = [sys.executable, "-c", FILE_LIMIT, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == RunError.exit_code, done.stderr
    assert f"cannot write {tmp_path / 's'}" in done.stdout and "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_identity_protocol_is_the_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Guards against the store asking for what a real tokenizer does not have."""
    with TokenStoreWriter(tmp_path / "s", config={}, tokenizer=tokenizer) as writer:
        writer.add(tokenizer.encode("a book"), source="a", key=1)
    manifest = TokenStore(tmp_path / "s").manifest
    assert manifest.tokenizer["fingerprint"] == tokenizer.fingerprint
    assert manifest.tokenizer["pad_id"] == 2
