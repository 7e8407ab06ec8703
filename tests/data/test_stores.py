"""Whole stores: merged, split, taken over from others, converted and back, verified."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.data.exchange.convert import convert
from longspan.data.exchange.token_documents import StoreDocuments
from longspan.data.exchange.whole_stores import (
    import_mds,
    merge_stores,
    split_parts,
    split_plans,
    split_store,
)
from longspan.data.packed.materialize import materialize
from longspan.data.plans.mixture import MixturePlan, plan_mixture, split_place
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.readers import FilePart, ReadReport, list_inputs
from longspan.data.readers.mds_folder import read_mds
from longspan.data.store import Column, MDSDirectory, MDSWriter, TokenStore, TokenStoreWriter, open_stores
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import Tokenizer
from longspan.data.verify import VerifyReport, verify
from tests.data.test_materialize import TOKENIZER, make_plan, make_store


def documents(store: TokenStore) -> list[tuple]:
    """Return source, key, ids and weights of every document."""
    found = []
    for number in range(len(store)):
        mask = store.mask(number)
        weights = [1] * len(store.tokens(number)) if mask is None else mask.tolist()
        key = int(store.lengths.key[number])
        found.append((store.source(number), key, store.tokens(number).tolist(), weights))
    return found


@pytest.mark.parametrize("masks", [False, True])
def test_merged_stores_hold_the_documents_of_all(tmp_path: Path, masks: bool) -> None:
    """Sources are numbered anew, shards renamed, and masks kept where only one store has them."""
    first = make_store(tmp_path / "one", [50, 3, 300] * 4)
    second = make_store(tmp_path / "two", [7, 9], masks=masks, seed=5)
    merged = merge_stores([first.path, second.path], tmp_path / "merged")
    assert documents(merged) == documents(first) + documents(second)
    assert verify(merged.path).problems == []


def test_stores_of_two_tokenizers_are_not_merged(tmp_path: Path) -> None:
    """Ids of one vocabulary mean nothing in another."""
    make_store(tmp_path / "one", [5])
    make_store(tmp_path / "two", [5], vocab_size=60_000)
    with pytest.raises(DataError, match="different tokenizers"):
        merge_stores([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")


def test_stores_that_begin_otherwise_are_not_merged(tmp_path: Path) -> None:
    """The merged store would begin texts as whichever came first does; where one does not say, the other holds."""
    for name, adds in (("yes", True), ("no", False), ("unknown", None)):
        identity = SimpleNamespace(**vars(TOKENIZER), adds_bos=adds)
        with TokenStoreWriter(tmp_path / name, config={}, tokenizer=identity) as writer:
            writer.add(np.arange(5), source="a", key=1)
    with pytest.raises(DataError, match=r"only some begin a text with BOS(.|\n)*no without"):
        merge_stores([tmp_path / "yes", tmp_path / "no"], tmp_path / "merged")
    merged = merge_stores([tmp_path / "unknown", tmp_path / "yes"], tmp_path / "merged")
    assert merged.manifest.tokenizer["adds_bos"] is True


def test_characters_go_along(tmp_path: Path) -> None:
    """Counts of characters lost when a mask comes late or stores are joined; what has none is not counted as 0."""
    with TokenStoreWriter(tmp_path / "one", config={}, tokenizer=TOKENIZER) as writer:
        writer.add(np.arange(5), source="a", key=1, characters=20)
        writer.add(np.arange(2), source="a", key=2, characters=70, mask=np.array([0, 1], np.uint8))
    make_store(tmp_path / "two", [5])
    merged = merge_stores([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
    assert merged.lengths.characters is not None
    assert merged.lengths.characters.tolist() == [20, 70, 0]
    spec = MixtureConfig(mode="global", keep_short=0, threshold=10, characters_per_token=3.5)
    assert plan_mixture(spec, TokenStore(tmp_path / "one").lengths, 0).documents.tolist() == [1]
    with pytest.raises(DataError, match="1 documents without a count"):
        plan_mixture(spec, merged.lengths, 0)


def test_a_split_keeps_every_document_once(tmp_path: Path) -> None:
    """No document is lost, none stands in two parts, and masks go along."""
    store = make_store(tmp_path / "store", [5, 9, 30] * 40, masks=True)
    shares = {str(tmp_path / "train"): 0.8, str(tmp_path / "validation"): 0.1, str(tmp_path / "test"): 0.1}
    parts = split_store(store.path, shares)
    together = [document for part in parts.values() for document in documents(part)]
    assert sorted(together) == sorted(documents(store))
    assert [len(part) for part in parts.values()] == [99, 12, 9]
    assert all(verify(part.path).is_whole for part in parts.values())


def test_a_split_is_plans_of_the_same_parts(tmp_path: Path) -> None:
    """No document is lost or in two plans, a copy has the same ones, and a mixture of a part stays inside it."""
    store = make_store(tmp_path / "store", [5, 9, 30] * 40)
    parts = {"train": 0.8, "validation": 0.1, "test": 0.1}
    plans = split_plans(store.lengths, parts)
    chosen = np.concatenate([plan.documents for plan in plans.values()])
    assert sorted(chosen.tolist()) == list(range(120))
    copies = split_store(store.path, {str(tmp_path / name): share for name, share in parts.items()})
    for name, share in parts.items():
        plan, copy = plans[name], copies[str(tmp_path / name)]
        assert sorted(store.lengths.key[plan.documents].tolist()) == sorted(copy.lengths.key.tolist()), share
        assert plan.report.tokens == copy.num_tokens
        spec = MixtureConfig(
            mode="upsample", weights={"a": 0.5}, part=plan.spec.part, max_repeat=3, tokens=500
        )
        assert set(plan_mixture(spec, store.lengths, 7).documents.tolist()) <= set(plan.documents.tolist())
    plans["test"].save(tmp_path / "plan")
    assert MixturePlan.load(tmp_path / "plan").spec.part == plans["test"].spec.part
    for part in ((0.5, 0.5), (-0.1, 1), (0.2, 1.1)):
        with pytest.raises(ConfigError, match="two shares in order"):
            MixtureConfig.from_dict({"part": part})


def test_the_largest_hash_is_in_the_last_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash that rounds up to 1 must not fall out of every part."""
    monkeypatch.setattr("longspan.data.plans.mixture.hashed", lambda keys, *words: keys)
    keys = np.array([0, 2**63, 2**64 - 1], np.uint64)
    assert split_place(keys).tolist() == [0, 0.5, 1]
    assert split_parts(keys, [0.5, 0.5]).tolist() == [0, 1, 1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50), st.integers(1, 49))
def test_the_part_of_a_document_depends_on_its_key_alone(keys: list[int], cut: int) -> None:
    """A test document must not become a training document because the corpus has grown."""
    column = np.array(keys, np.uint64)
    parts = split_parts(column, [0.5, 0.25, 0.25])
    assert split_parts(column[cut:], [0.5, 0.25, 0.25]).tolist() == parts[cut:].tolist()
    # The first border stays where it is when the rest is divided differently.
    assert np.array_equal(split_parts(column, [0.5, 0.5]) == 0, parts == 0)


def test_splits_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    """Shares of 0.9 and 0.2 would lose or repeat documents; an empty part is no part."""
    make_store(tmp_path / "store", [5, 9])
    with pytest.raises(ArgumentError, match="sum to 1"):
        split_store(tmp_path / "store", {"a": 0.9, "b": 0.2})
    with pytest.raises(DataError, match="too few documents"):
        split_store(tmp_path / "store", {str(tmp_path / "a"): 0.999, str(tmp_path / "b"): 0.001})
    assert not (tmp_path / "a").exists()


def write_raw(path: Path, dtype: str, *, domain: bool = True, first: int = 5) -> list[list[int]]:
    """Write raw token documents as datatools does; return their ids."""
    path.mkdir(parents=True)
    columns = [Column("input_ids", f"ndarray:{dtype}"), Column("length", "int"), Column("extra", "str")]
    if domain:
        columns.append(Column("domain", "str"))
    writer = MDSWriter(path, columns, size_limit=300)
    ids = [list(range(first, first + count)) for count in (3, 40, 1, 200)]
    for number, values in enumerate(ids):
        sample = {"input_ids": np.array(values, dtype), "length": len(values), "extra": "x" * number}
        writer.write(sample | ({"domain": "ab"[number % 2]} if domain else {}))
    writer.finish()
    return ids


@pytest.mark.parametrize("dtype", ["uint32", "int32", "uint16"])
@pytest.mark.parametrize("domain", [False, True])
def test_raw_token_data_becomes_a_store_without_copying(tmp_path: Path, dtype: str, domain: bool) -> None:
    """ProLong's raw data says int32, the tool that wrote it uint32; both are ids."""
    ids = write_raw(tmp_path / "raw", dtype, domain=domain)
    store = import_mds(tmp_path / "raw", tmp_path / "store", TOKENIZER)
    assert [store.tokens(number).tolist() for number in range(4)] == ids
    assert [store.source(number) for number in range(4)] == (list("abab") if domain else ["."] * 4)
    assert all(path.is_symlink() for path in (tmp_path / "store").glob("*.mds"))
    assert verify(tmp_path / "store").problems == []
    loader = make_plan(tmp_path / "plan", [store], length=16)
    materialize(tmp_path / "plan", tmp_path / "rows")
    first = MDSDirectory(tmp_path / "rows")[0]["input_ids"]
    assert first.tolist() == loader.row(0).input_ids.tolist()
    merged = merge_stores([store.path, store.path], tmp_path / "merged")
    assert merged.tokens(5).tolist() == ids[1]


def write_merged(folder: Path, *, subs: Sequence[str] = ("proc0-2", "proc1-2")) -> list[list[int]]:
    """Write what datatools leaves of several writers: folders of shards, and above them one index that names them."""
    entries, ids = [], []
    for number, name in enumerate(subs):
        sub = folder / name
        ids += write_raw(sub, "uint32", first=10 * number)
        for entry in json.loads((sub / "index.json").read_text())["shards"]:
            entry["raw_data"]["basename"] = f"{name}/{entry['raw_data']['basename']}"
            entries.append(entry)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return ids


@pytest.mark.parametrize("subs", [("proc0-2", "proc1-2"), ("a/proc0", "a/proc1"), ("a", "a/b")])
def test_an_index_merged_from_subfolders_is_followed(tmp_path: Path, subs: tuple[str, ...]) -> None:
    """The tool that made the data names its shards sub/shard.00000.mds: refused, they make its releases unreadable."""
    ids = write_merged(tmp_path / "raw", subs=subs)
    assert [sample["input_ids"].tolist() for sample in MDSDirectory(tmp_path / "raw")] == ids
    assert verify(tmp_path / "raw").problems == []
    convert(tmp_path / "raw", tmp_path / "store", format="store", tokenizer=TOKENIZER)
    store = TokenStore(tmp_path / "store")
    assert [store.tokens(number).tolist() for number in range(8)] == ids


def test_a_merged_index_is_one_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against sources called after the processes that wrote the data, and against reading a sample twice,
    through the merged index and through that of its folder; shards that came later are named."""
    ids = write_merged(tmp_path / "raw")
    files = list_inputs([tmp_path / "raw"], report=ReadReport())
    assert [(file.path, file.source) for file in files] == [(str(tmp_path / "raw"), "raw")]
    samples = [record.data["input_ids"].tolist() for record in read_mds(FilePart(files[0]), None)]
    assert samples == ids
    (tmp_path / "raw" / "proc0-2" / "shard.00009.mds").write_bytes(b"late")
    list_inputs([tmp_path / "raw"], report=ReadReport())
    assert "does not name 1 shards below it" in caplog.text


@pytest.mark.parametrize("wrong", ["../secret", "/etc/passwd"])
@pytest.mark.parametrize("part", ["raw_data", "zip_data"])
def test_an_index_never_leads_out_of_its_folder(tmp_path: Path, wrong: str, part: str) -> None:
    """Guards against reading what an index from elsewhere names outside of its folder."""
    write_merged(tmp_path / "raw")
    index = json.loads((tmp_path / "raw" / "index.json").read_text())
    index["shards"][0][part] = {**index["shards"][0]["raw_data"], "basename": wrong}
    (tmp_path / "raw" / "index.json").write_text(json.dumps(index))
    for read in (MDSDirectory, lambda path: import_mds(path, tmp_path / "other", TOKENIZER)):
        with pytest.raises(DataError, match="malformed"):
            read(tmp_path / "raw")
    assert not (tmp_path / "other").exists()
    assert len(verify(tmp_path / "raw").problems) == 1


def test_a_folder_of_shards_is_not_a_link_to_elsewhere(tmp_path: Path) -> None:
    """Guards against the same by a link; a shard that is a link itself, as in the cache of the hub, is read."""
    ids = write_merged(tmp_path / "raw")
    shard = tmp_path / "raw" / "proc0-2" / "shard.00000.mds"
    shard.rename(tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    assert MDSDirectory(tmp_path / "raw")[0]["input_ids"].tolist() == ids[0]
    (tmp_path / "raw" / "proc0-2").rename(tmp_path / "elsewhere")
    (tmp_path / "raw" / "proc0-2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="outside of its folder"):
        MDSDirectory(tmp_path / "raw")
    assert "outside of its folder" in verify(tmp_path / "raw").problems[0]


def test_raw_data_that_is_no_token_store_is_refused(tmp_path: Path) -> None:
    """Ids of another vocabulary, columns of another type, rows that are packed already."""
    write_raw(tmp_path / "raw", "uint32", first=49_900)
    with pytest.raises(DataError, match="does not know"):
        import_mds(tmp_path / "raw", tmp_path / "store", TOKENIZER)
    write_raw(tmp_path / "wide", "int64")
    with pytest.raises(DataError, match="no ids that a token store can hold"):
        import_mds(tmp_path / "wide", tmp_path / "store", TOKENIZER)
    store = make_store(tmp_path / "good", [50] * 4)
    make_plan(tmp_path / "plan", [store], length=32)
    materialize(tmp_path / "plan", tmp_path / "rows")
    with pytest.raises(DataError, match="packed already"):
        import_mds(tmp_path / "rows", tmp_path / "store", TOKENIZER)


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_documents_go_out_and_come_back(tmp_path: Path, format: str) -> None:
    """A store that was written as documents is made again to the same content."""
    store = make_store(tmp_path / "store", [50, 3, 300] * 4, masks=True)
    out = tmp_path / f"documents.{format}"
    assert convert(store.path, out, format=format) == "documents"
    assert convert(out, tmp_path / "again", format="store", tokenizer=TOKENIZER) == "store"
    again = TokenStore(tmp_path / "again")
    assert documents(again) == documents(store)
    assert again.fingerprint == store.fingerprint


def test_documents_as_columns(tmp_path: Path) -> None:
    """One flat array and offsets, for whoever wants no library at all."""
    store = make_store(tmp_path / "store", [50, 3, 300])
    convert(store.path, tmp_path / "npy", format="columns")
    tokens, offsets = (np.load(tmp_path / "npy" / f"{name}.npy") for name in ("tokens", "offsets"))
    assert tokens[offsets[1] : offsets[2]].tolist() == store.tokens(1).tolist()
    assert json.loads((tmp_path / "npy" / "names.json").read_text()) == ["a", "b", "c"]


def test_documents_as_the_token_files_of_cepe(tmp_path: Path) -> None:
    """[n] [lengths] [tokens], a file for each source, BOS and EOS in each document: what CEPE's samplers read."""
    store = make_store(tmp_path / "store", [50, 3, 4, 300])
    assert convert(store.path, tmp_path / "npy", format="npy") == "documents"
    bos, eos = TOKENIZER.bos_id, TOKENIZER.eos_id
    for source in store.lengths.source_names:
        framed = [
            [bos, *store.tokens(number).tolist(), eos]
            for number in range(len(store))
            if store.source(number) == source
        ]
        file = np.load(tmp_path / "npy" / source / f"{source}.npy")
        assert file.dtype == np.int64
        assert file.tolist() == [len(framed), *map(len, framed), *(id for ids in framed for id in ids)]
    convert(tmp_path / "npy", tmp_path / "again", format="store", tokenizer=TOKENIZER)
    again = TokenStore(tmp_path / "again")
    assert sorted(document[::2] for document in documents(again)) == sorted(
        document[::2] for document in documents(store)
    )
    convert(store.path, tmp_path / "plain", format="npy", specials="none")
    assert np.load(tmp_path / "plain" / "a" / "a.npy")[1] == len(store.tokens(0))
    with pytest.raises(ArgumentError, match="CEPE's files hold none"):
        convert(make_store(tmp_path / "masked", [50] * 2, masks=True).path, tmp_path / "out", format="npy")
    with pytest.raises(ArgumentError, match="specials frame the documents"):
        convert(store.path, tmp_path / "out", format="jsonl", specials="bos")


def test_conversions_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    """Each message says what the source can become."""
    store = make_store(tmp_path / "store", [50, 3, 300])
    with pytest.raises(ArgumentError, match="MDS folder already"):
        convert(store.path, tmp_path / "out", format="mds")
    with pytest.raises(ArgumentError, match="names its tokenizer"):
        convert(store.path, tmp_path / "out", format="store")
    with pytest.raises(DataError, match="cannot become a token store"):
        convert(tmp_path / "nothing", tmp_path / "out", format="store", tokenizer=TOKENIZER)
    with pytest.raises(DataError, match="nothing does not exist"):
        convert(tmp_path / "nothing", tmp_path / "out", format="mds")
    plan_mixture(MixtureConfig(mode="none"), store.lengths, 0).save(tmp_path / "mixture")
    with pytest.raises(ArgumentError, match="pack it first"):
        convert(tmp_path / "mixture", tmp_path / "out", format="mds")
    (tmp_path / "bad.jsonl").write_text('{"input_ids": [1, 2], "domain": "a", "key": "zz"}\n')
    with pytest.raises(DataError, match="document 0"):
        convert(tmp_path / "bad.jsonl", tmp_path / "out", format="store", tokenizer=TOKENIZER)
    assert not (tmp_path / "out").exists()


def damaged(path: Path, name: str, change: Callable[[bytearray], None]) -> VerifyReport:
    """Change the bytes of one file and verify."""
    content = bytearray((path / name).read_bytes())
    change(content)
    (path / name).write_bytes(content)
    return verify(path)


def cut(content: bytearray) -> None:
    del content[-1:]


def flip(content: bytearray) -> None:
    content[-20] ^= 1


def test_every_damaged_shard_is_named(tmp_path: Path) -> None:
    """The first damaged shard must not hide the second."""
    store = make_store(tmp_path / "store", [50, 300] * 20)
    assert verify(store.path).is_whole
    assert damaged(store.path, "shard.00001.mds", flip).problems == [
        "shard.00001.mds was changed or damaged: its SHA-256 differs"
    ]
    found = damaged(store.path, "shard.00003.mds", cut).problems
    assert [problem.split()[0] for problem in found] == ["shard.00001.mds", "shard.00003.mds"]
    (store.path / "shard.00002.mds").unlink()
    assert any("shard.00002.mds is missing" in problem for problem in verify(store.path).problems)


def test_what_hashes_do_not_show_is_found(tmp_path: Path) -> None:
    """A manifest or table of another store, or a token behind the vocabulary, fits every hash."""
    store = make_store(tmp_path / "store", [50, 300])
    manifest = json.loads((store.path / "longspan.json").read_text())
    for change, message in (
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"tokens": 351}, "contradicts itself"),
        ({"tokenizer": manifest["tokenizer"] | {"vocab_size": 100}}, "in a vocabulary of 100"),
        ({"documents": "many"}, "malformed"),
    ):
        (store.path / "longspan.json").write_text(json.dumps(manifest | change))
        (problem, *_) = verify(store.path).problems
        assert message in problem


@pytest.mark.parametrize("format", ["mds", "npy", "jsonl", "parquet"])
def test_damaged_rows_are_named(tmp_path: Path, format: str) -> None:
    """One bit in one row, a file cut off, a file gone."""
    store = make_store(tmp_path / "store", [50, 300] * 20)
    make_plan(tmp_path / "plan", [store], length=64)
    assert verify(tmp_path / "plan").is_whole
    materialize(tmp_path / "plan", tmp_path / "rows", format=format, piece_bytes=2000)
    report = verify(tmp_path / "rows")
    assert report.is_whole and report.counts["rows"] == 109
    name = json.loads((tmp_path / "rows" / "longspan.json").read_text())["pieces"][1]["file"]
    content = (tmp_path / "rows" / name).read_bytes()

    def flip_an_id(content: bytearray) -> None:
        at = content.index(b"5") if format == "jsonl" else len(content) // 2
        content[at] = ord("7") if format == "jsonl" else content[at] ^ 1

    assert damaged(tmp_path / "rows", name, flip_an_id).problems
    (tmp_path / "rows" / name).write_bytes(content)
    assert "bytes instead of" in damaged(tmp_path / "rows", name, cut).problems[0]
    (tmp_path / "rows" / name).unlink()
    assert f"{name} is missing" in verify(tmp_path / "rows").problems


def test_plans_are_verified_with_their_stores(tmp_path: Path) -> None:
    """A plan over stores that were made anew, and a plan whose columns were changed."""
    store = make_store(tmp_path / "store", [50, 300] * 4)
    plan_mixture(MixtureConfig(mode="none"), store.lengths, 0).save(tmp_path / "mix", stores=[store.path])
    make_plan(tmp_path / "plan", [store], length=64)
    assert verify(tmp_path / "mix").is_whole and verify(tmp_path / "plan").is_whole
    starts = np.load(tmp_path / "plan" / "span_start.npy")
    np.save(tmp_path / "plan" / "span_start.npy", starts + np.uint32(290))
    assert verify(tmp_path / "plan").problems
    for name in ("longspan.json",):
        os.remove(store.path / name)
    make_store(tmp_path / "new", [50, 301] * 4)
    os.rename(tmp_path / "store", tmp_path / "old")
    os.rename(tmp_path / "new", tmp_path / "store")
    assert "have changed" in verify(tmp_path / "mix").problems[0]


def test_what_is_not_tokenized_yet_is_listed(
    tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer: Tokenizer, texts: list[str]
) -> None:
    """After new files have come, the list is what a second run has to do."""
    write_jsonl("in/a.jsonl", *({"text": text} for text in texts[:5]))
    store = tokenize_corpus([tmp_path / "in"], tokenizer, tmp_path / "store")
    assert verify(store.path, against=[str(tmp_path / "in")]).missing == []
    new = write_jsonl("in/b.jsonl", {"text": texts[0] + " more"}, {"text": "news"})
    report = verify(store.path, against=[str(tmp_path / "in")])
    assert report.is_whole and report.missing is not None
    assert [Path(place.rpartition(":")[0]).name for place in report.missing] == [new.name] * 2
    make_plan(tmp_path / "plan", [store], length=64)
    with pytest.raises(ArgumentError, match="only a token store"):
        verify(tmp_path / "plan", against=["in"])
    with pytest.raises(DataError, match="not something that can be verified"):
        verify(tmp_path / "in")


def test_an_mds_folder_of_others_is_verified(tmp_path: Path) -> None:
    """Without a manifest the structure alone is checked."""
    write_raw(tmp_path / "raw", "int32")
    assert verify(tmp_path / "raw").counts == {"shards": 4, "samples": 4}
    assert damaged(tmp_path / "raw", "shard.00001.mds", cut).problems


def test_the_same_store_twice_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A store given twice, or a copy of it, doubled the weight of its documents without a word."""
    store = make_store(tmp_path / "one", [5, 6]).path
    shutil.copytree(store, tmp_path / "copy")
    (tmp_path / "link").symlink_to(store)
    other = make_store(tmp_path / "other", [7]).path
    open_stores([store, other])
    assert not caplog.text
    for again in (store, tmp_path / "copy", tmp_path / "link"):
        caplog.clear()
        assert len(open_stores([store, other, again])) == 3
        assert f"{again} holds the same documents as {store}" in caplog.text
    caplog.set_level("INFO")
    assert len(StoreDocuments([store, tmp_path / "link"], specials="none").tokens) == 2
    assert "1 stores are given again" in caplog.text
