"""Token data of other tools, and our own rows and documents, back into a token store."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import DataError
from longspan.data.exchange.cepe import write_cepe
from longspan.data.exchange.convert import convert
from longspan.data.exchange.import_tokens import import_tokens
from longspan.data.exchange.token_files import MEGATRON_MAGIC, read_datatrove, read_megatron
from longspan.data.packed.materialize import materialize
from longspan.data.packed.row_formats import FORMATS
from longspan.data.store import Column, TokenStore
from longspan.data.store.directory import MDSWriter
from longspan.data.verify import verify
from tests.data.test_materialize import TOKENIZER, make_plan, make_store
from tests.data.test_stores import documents
from tests.patience import PATIENCE_SECONDS

DOCUMENTS = [[1, 10, 11, 2], [12, 13], [1, 2], [14, 2, 15, 2]]
"""1 is BOS and 2 is EOS."""
UNFRAMED = [[10, 11], [12, 13], [14, 2, 15]]


def ids_of(store: TokenStore) -> list[list[int]]:
    return [store.tokens(number).tolist() for number in range(len(store))]


def write_datatrove(path: Path, *, dtype: str = "<u2", metadata: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.concatenate(DOCUMENTS).astype(dtype).tobytes())
    ends = np.cumsum([len(each) for each in DOCUMENTS])
    path.with_name(path.name + ".index").write_bytes(ends.astype("<u8").tobytes())
    if metadata:
        size = np.dtype(dtype).itemsize
        path.with_name(path.name + ".metadata").write_text(f"Unknown Tokenizer|{size}|{size}\n12\n12 T")


def write_megatron(path: Path, *, code: int = 8, dtype: str = "<u2") -> None:
    """Write the documents, the second as two sequences of one token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = [4, 1, 1, 2, 4]
    offsets = np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize
    head = MEGATRON_MAGIC + struct.pack("<QBQQ", 1, code, len(lengths), 5)
    columns = np.array(lengths, "<i4").tobytes() + offsets.astype("<i8").tobytes()
    path.with_suffix(".idx").write_bytes(head + columns + np.array([0, 1, 3, 4, 5], "<i8").tobytes())
    path.with_suffix(".bin").write_bytes(np.concatenate(DOCUMENTS).astype(dtype).tobytes())


@pytest.mark.parametrize(("dtype", "metadata"), [("<u2", True), ("<u4", True), ("<u4", False)])
def test_datatrove_files(tmp_path: Path, dtype: str, metadata: bool) -> None:
    """Guards against ids of the wrong width, and against BOS and EOS in a store, doubled when it is packed."""
    write_datatrove(tmp_path / "in" / "book" / "00000_tokens.ds", dtype=dtype, metadata=metadata)
    write_datatrove(tmp_path / "in" / "00001_tokens.ds", dtype=dtype, metadata=metadata)
    store = import_tokens(tmp_path / "in", tmp_path / "store", TOKENIZER)
    assert ids_of(store) == UNFRAMED * 2
    assert [store.source(number) for number in range(6)] == ["in"] * 3 + ["book"] * 3
    assert store.manifest.counts == {"bos_removed": 4, "eos_removed": 6, "empty_documents": 2}
    assert verify(store.path).problems == []
    assert len(set(store.lengths.key.tolist())) == 6
    one = import_tokens(tmp_path / "in" / "book" / "00000_tokens.ds", tmp_path / "one", TOKENIZER)
    assert ids_of(one) == UNFRAMED and one.lengths.key.tolist() == store.lengths.key.tolist()[3:]


def test_datatrove_loss_is_the_mask(tmp_path: Path) -> None:
    """Guards against training what the other tool had masked, and a mask that is not cut with its document."""
    write_datatrove(tmp_path / "a.ds")
    (tmp_path / "a.ds.loss").write_bytes(bytes([1, 0, 1, 1] * 3))
    store = import_tokens(tmp_path / "a.ds", tmp_path / "store", TOKENIZER)
    masks = [store.mask(number) for number in range(3)]
    assert [mask is not None and mask.tolist() for mask in masks] == [[0, 1], [1, 0], [1, 0, 1]]
    (tmp_path / "a.ds.loss").write_bytes(bytes(11))
    with pytest.raises(DataError, match="does not fit"):
        read_datatrove(tmp_path / "a.ds")


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (3, "<i2")])
@pytest.mark.parametrize("name", ["a.bin", "a.idx", ""])
def test_megatron_files(tmp_path: Path, code: int, dtype: str, name: str) -> None:
    """Guards against sequences taken for documents, and dtype codes mixed up."""
    write_megatron(tmp_path / "in" / "a", code=code, dtype=dtype)
    store = import_tokens(tmp_path / "in" / name, tmp_path / "store", TOKENIZER)
    assert ids_of(store) == UNFRAMED


def test_cepe_files(tmp_path: Path) -> None:
    """Guards against the empty file, and against lengths that are read as tokens."""
    (tmp_path / "in").mkdir()
    write_cepe(tmp_path / "in" / "a.npy", [4, 2, 2, 4], [np.array(each) for each in DOCUMENTS])
    np.save(tmp_path / "in" / "b.npy", np.zeros(1))
    store = import_tokens(tmp_path / "in", tmp_path / "store", TOKENIZER)
    assert ids_of(store) == UNFRAMED
    none = SimpleNamespace(**{**vars(TOKENIZER), "bos_id": None, "eos_id": None})
    assert ids_of(import_tokens(tmp_path / "in", tmp_path / "framed", none)) == DOCUMENTS


@pytest.mark.parametrize("masks", [False, True])
def test_columns_of_ours_come_back(tmp_path: Path, masks: bool) -> None:
    """Guards against documents that can be written and not be read again: keys, sources and masks included."""
    store = make_store(tmp_path / "store", [50, 3, 300] * 4, masks=masks)
    convert(store.path, tmp_path / "npy", format="columns")
    assert convert(tmp_path / "npy", tmp_path / "again", format="store", tokenizer=TOKENIZER) == "store"
    again = TokenStore(tmp_path / "again")
    assert documents(again) == documents(store) and again.fingerprint == store.fingerprint
    for name, column in (
        ("offsets", np.arange(13)),
        ("keys", np.zeros(3, np.uint64)),
        ("sources", np.zeros(12)),
    ):
        saved = (tmp_path / "npy" / f"{name}.npy").read_bytes()
        np.save(tmp_path / "npy" / f"{name}.npy", column)
        with pytest.raises(DataError, match=r"do not fit|not such a column"):
            import_tokens(tmp_path / "npy", tmp_path / "other", TOKENIZER)
        (tmp_path / "npy" / f"{name}.npy").write_bytes(saved)
    np.save(tmp_path / "npy" / "tokens.npy", np.array([{}] * 3), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        import_tokens(tmp_path / "npy", tmp_path / "other", TOKENIZER)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_come_back_as_their_spans(tmp_path: Path, format: str) -> None:
    """Guards against padding and the tokens that frame documents becoming text, and lost or doubled spans."""
    store = make_store(tmp_path / "store", [50, 3, 120, 64], masks=True)
    make_plan(tmp_path / "plan", [store], length=64, remainder="pad", specials="both", shuffle=False)
    materialize(tmp_path / "plan", tmp_path / "rows", format=format)
    again = import_tokens(tmp_path / "rows", tmp_path / "again", TOKENIZER)
    assert list(chain(*ids_of(again))) == list(chain(*ids_of(store)))
    lengths = [len(each) for each in ids_of(again)]
    # Rows of 64: [B 50 E, B 3 E, B 6] [64] [50 E, B 12] [52 E, padding].
    assert lengths == [50, 3, 6, 64, 50, 12, 52]
    assert again.manifest.counts["bos_removed"] == again.manifest.counts["eos_removed"] == 4
    weights = [again.mask(number).tolist() for number in range(len(again))]  # type: ignore[union-attr]
    wanted = [weights for _, _, _, weights in documents(store)]
    assert list(chain(*weights)) == list(chain(*wanted))


def test_chunks_of_others_come_back(tmp_path: Path) -> None:
    """Guards against packed SlimPajama, as published, being readable for training only."""
    spans = [{"source": "Book", "start": 0, "end": 2}, {"source": "ArXiv", "start": 2, "end": 5}]
    record = {"input_ids": [1, 12, 13, 14, 2], "labels": 7, "source": spans}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n")
    store = import_tokens(tmp_path / "rows.jsonl", tmp_path / "store", TOKENIZER)
    assert ids_of(store) == [[12], [13, 14]] and store.lengths.source_names == ("Book", "ArXiv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ds", b"", "not the index"),
        ("a.ds", bytes(25), "fit its index"),
        ("a.ds.index", bytes(7), "cut off"),
        ("a.ds.index", np.array([5, 3, 12], "<u8").tobytes(), "not the index"),
        ("a.ds.index", np.array([1 << 63], "<u8").tobytes(), "not the index"),
        ("a.ds.metadata", b"name", "damaged"),
        ("a.ds.metadata", b"name|4\n12", "fit its index"),
        ("a.ds", np.full(12, 50_000, "<u2").tobytes(), "do not fit the store"),
    ],
)
def test_damaged_datatrove_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Guards against ids of a neighbour, or a crash, where a file is cut off or belongs to another."""
    write_datatrove(tmp_path / "a.ds")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        import_tokens(tmp_path / "a.ds", tmp_path / "store", TOKENIZER)
    assert not (tmp_path / "store").exists()


def test_missing_halves(tmp_path: Path) -> None:
    """Guards against a traceback where only one of two files was copied."""
    write_datatrove(tmp_path / "a.ds")
    (tmp_path / "a.ds.index").unlink()
    write_megatron(tmp_path / "b")
    (tmp_path / "b.bin").unlink()
    for name in ("a.ds", "b.idx"):
        with pytest.raises(DataError, match="does not exist"):
            import_tokens(tmp_path / name, tmp_path / "store", TOKENIZER)
    with pytest.raises(DataError, match=r"files \.ds, \.idx"):
        import_tokens(tmp_path, tmp_path / "store", TOKENIZER)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_megatron_index(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Guards against a damaged header or table causing a crash, a huge allocation, or ids outside of the file."""
    folder = tmp_path_factory.mktemp("megatron")
    write_megatron(folder / "a")
    raw = bytearray((folder / "a.idx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "a.idx").write_bytes(raw[: data.draw(st.integers(0, len(raw)))] or b"x")
    try:
        file = read_megatron(folder / "a.bin")
    except DataError:
        return
    assert np.all(file.starts <= file.ends) and (not len(file.ends) or file.ends.max() <= len(file.tokens))


WRITE = """
import sys
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from datatrove.pipeline.tokens.tokenizer import TokenizedFile

documents = [[1, 10, 11, 2], [12, 13], [1, 2], [14, 2, 15, 2]]
for size in (2, 4):
    file = TokenizedFile(sys.argv[1], f"{size}.ds", save_final_metadata=True, token_size=size)
    for ids in documents:
        file.write(ids, None)
    file.close()
    file = MegatronTokenizedFile(sys.argv[1], f"{size}", token_size=size)
    for ids in documents:
        file.write(ids)
    file.close()
"""
PYTHON = os.environ.get("LONGSPAN_DATATROVE_PYTHON")


@pytest.mark.skipif(not PYTHON, reason="LONGSPAN_DATATROVE_PYTHON does not name a Python with datatrove")
def test_what_datatrove_writes(tmp_path: Path) -> None:
    """Guards against reading our own idea of the formats."""
    subprocess.run([str(PYTHON), "-c", WRITE, str(tmp_path)], check=True, timeout=PATIENCE_SECONDS)
    for name in ("2.ds", "4.ds", "2.bin", "4.idx"):
        assert ids_of(import_tokens(tmp_path / name, tmp_path / f"store-{name}", TOKENIZER)) == UNFRAMED


@pytest.mark.parametrize("encoding", ["ndarray:int32", "ndarray:int64", "ndarray", "bytes"])
@pytest.mark.parametrize("name", ["tokens", "input_ids"])
def test_columns_of_ids_under_other_names_and_types(tmp_path: Path, name: str, encoding: str) -> None:
    """Ids under the name `tokens`, or of 64 bits, were refused in the name of a folder that was gone."""
    folder = tmp_path / "in"
    folder.mkdir()
    writer = MDSWriter(folder, [Column(name, encoding)], size_limit=1 << 20)
    for document in DOCUMENTS:
        ids = np.array(document, "<i4" if encoding == "ndarray:int32" else "<i8")
        writer.write({name: ids.tobytes() if encoding == "bytes" else ids})
    writer.finish()
    store = import_tokens(folder, tmp_path / "store", TOKENIZER)
    linked = name == "input_ids" and encoding == "ndarray:int32"
    assert ids_of(store) == (DOCUMENTS if linked else UNFRAMED)
    assert verify(tmp_path / "store").is_whole


def test_errors_name_places_that_stay(tmp_path: Path) -> None:
    """A message must name the input, or the place that was asked for, never the folder it is made in."""
    columns = {"text": "str", "tokens": "json", "odd": "bytes", "wild": "ndarray:int64"}
    values = {"text": "a", "tokens": "[1]", "odd": b"\0" * 5, "wild": np.array([1, 1 << 40])}
    for number, name in enumerate(columns):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        column = {"odd": "tokens", "wild": "tokens"}.get(name, name)
        writer = MDSWriter(folder, [Column(column, columns[name])], size_limit=1 << 20)
        writer.write({column: values[name]})
        writer.finish()
        with pytest.raises(DataError) as raised:
            import_tokens(folder, tmp_path / "store", TOKENIZER)
        assert ".tmp" not in str(raised.value)
        assert folder.name in str(raised.value) or name == "wild"
    assert not [path.name for path in tmp_path.iterdir() if not path.name.startswith("in")]
