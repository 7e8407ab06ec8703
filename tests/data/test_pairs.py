"""Encoder and decoder windows: where they lie, what they never share, and how documents are split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, ConfigError, DataError, RunError
from longspan.data.exchange.cepe import write_cepe
from longspan.data.exchange.token_documents import open_documents
from longspan.data.jobs.job_lock import JobLock
from longspan.data.pairs.windows import (
    PARTS,
    PairConfig,
    divide,
    plan_pairs,
    read_window,
    split_parts,
    write_pairs,
)
from longspan.data.store import MDSDirectory, TokenStoreWriter


class MadeDocuments:
    """Documents in memory: (domain, file, tokens). Token t of document d is 1000 d + t."""

    dtype = np.dtype(np.uint32)
    tokenizer = None

    def __init__(self, documents: Sequence[tuple[str, str, int]]) -> None:
        self.domains = tuple(sorted({domain for domain, _, _ in documents}))
        self.files = tuple(sorted({file for _, file, _ in documents}))
        documents = sorted(documents, key=lambda each: each[1])
        self.domain = np.array([self.domains.index(domain) for domain, _, _ in documents], np.uint16)
        self.file = np.array([self.files.index(file) for _, file, _ in documents], np.uint32)
        self.tokens = np.array([tokens for _, _, tokens in documents], np.int64)
        self.key = np.arange(len(documents), dtype=np.uint64)
        self.fingerprint = str(documents)

    def ids(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return (1000 * document + np.arange(self.tokens[document], dtype=np.uint32))[start:stop]


def files(domain: str, count: int, tokens: int = 20) -> list[tuple[str, str, int]]:
    """One document in each of `count` files."""
    return [(domain, f"{domain}/{number:04}", tokens) for number in range(count)]


def spec(mode: str = "ab", encoder: int = 8, decoder: int = 4, **settings) -> PairConfig:
    return PairConfig(mode=mode, encoder=encoder, decoder=decoder, **settings)


def all_windows(documents: MadeDocuments, wanted: PairConfig, seed: int = 0) -> dict[str, list[list[int]]]:
    plan = plan_pairs(wanted, documents, seed)
    found: dict[str, list[list[int]]] = {"test": [], "train": []}
    for (part, _), rows in plan.windows.items():
        length = wanted.encoder + wanted.decoder
        found[part] += [read_window(documents, rows, n, length).tolist() for n in range(len(rows.first))]
    return found


def test_windows_of_one_document():
    """20 tokens, encoder 8, decoder 4: (0, 12), (4, 16), (8, 20); 19 tokens lose the last, 11 have none."""
    for tokens, starts in ((20, [0, 4, 8]), (19, [0, 4]), (12, [0]), (11, [])):
        documents = MadeDocuments([("book", "a", tokens)])
        windows = all_windows(documents, spec(test=100))["test"]
        assert sorted(windows) == [list(range(start, start + 12)) for start in starts]


def test_concat_runs_through_documents():
    """Documents of 5 tokens have no window of their own; one after another they have."""
    documents = MadeDocuments([("c", "a", 5)] * 400)
    windows = all_windows(documents, spec("concat", train=1000))["train"]
    part = split_parts(documents, 0)
    stream = np.concatenate([documents.ids(d) for d in np.flatnonzero(part == 1)]).tolist()
    expected = [stream[at : at + 12] for at in range(0, len(stream) - 11, 4)]
    assert sorted(windows) == sorted(expected)


made = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 30), st.integers(0, 60)), min_size=1, max_size=60
).map(lambda rows: MadeDocuments([(domain, f"{domain}/{file:03}", tokens) for domain, file, tokens in rows]))


@given(
    documents=made,
    mode=st.sampled_from(["ab", "concat"]),
    encoder=st.integers(1, 12),
    decoder=st.integers(1, 12),
    samples=st.sampled_from([3, 10_000]),
    seed=st.integers(0, 3),
)
@settings(max_examples=120, deadline=None)
def test_no_decoder_token_is_used_twice_and_no_part_leaks(documents, mode, encoder, decoder, samples, seed):
    """Few and tiny documents, empty ones, one domain: every window is whole, its decoder's alone, and made
    of documents of its own part; with samples to spare every window there is is taken."""
    wanted = spec(mode, encoder, decoder, test=samples, train=samples)
    part = split_parts(documents, seed)
    decoded: set[int] = set()
    found = all_windows(documents, wanted, seed)
    for name, windows in found.items():
        assert len(windows) <= samples
        for window in windows:
            assert len(window) == encoder + decoder
            assert {PARTS[part[token // 1000]] for token in window} == {name}
            if mode == "ab":
                assert window == list(range(window[0], window[0] + len(window)))
                assert window[0] % 1000 % decoder == 0
            assert decoded.isdisjoint(window[encoder:])
            decoded.update(window[encoder:])
    if samples == 10_000 and mode == "ab":
        expected = sum(
            (int(tokens) - encoder) // decoder
            for tokens, of in zip(documents.tokens, part)
            if of < 2 and tokens >= encoder + decoder
        )
        assert sum(map(len, found.values())) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, (1, 0, 0)),
        (2, (1, 1, 0)),
        (3, (1, 1, 1)),
        (4, (1, 1, 2)),
        (50, (1, 24, 25)),
        (99, (1, 48, 50)),
        (100, (1, 49, 50)),
        (200, (2, 98, 100)),
        (1000, (10, 490, 500)),
    ],
)
def test_split_is_right_for_any_number_of_files(count, expected):
    """The published splits left train empty for 2 or 3 files, and failed for fewer than 100 documents."""
    for documents in (MadeDocuments(files("a", count)), MadeDocuments([("a", "one", 9)] * count)):
        part = split_parts(documents, 7)
        assert tuple(np.bincount(part, minlength=3)) == expected


def test_many_files_are_split_whole():
    """Documents of one file are often near copies: they must not stand on both sides."""
    documents = MadeDocuments([("a", f"{number % 150:03}", 20) for number in range(1500)])
    part = split_parts(documents, 0)
    assert all(len(set(part[documents.file == number])) == 1 for number in range(150))
    windows = all_windows(documents, spec("concat", test=10_000))["test"]
    of_files = [{documents.file[token // 1000] for token in window} for window in windows]
    assert windows and all(len(of) == 1 for of in of_files), "windows end at the end of a file"


def test_evaluation_documents_are_the_same_for_every_length_and_domain():
    """A model trained on 8K pairs is evaluated on 128K pairs: they must not be its training documents."""
    alone = MadeDocuments(files("book", 120, 200))
    together = MadeDocuments(files("arxiv", 30, 200) + files("book", 120, 200))
    in_books = together.domain == 1
    assert split_parts(alone, 3).tolist() == split_parts(together, 3)[in_books].tolist()
    assert split_parts(alone, 3).tolist() != split_parts(alone, 4).tolist()
    used = []
    for encoder in (4, 8, 90):
        windows = all_windows(alone, spec(encoder=encoder, test=10_000))["test"]
        used.append({token // 1000 for window in windows for token in window})
    assert used[0] == used[1] == used[2]


def test_copies_of_a_document_stay_together():
    """A store knows equal texts by their key: a copy in train would leak the test."""
    documents = MadeDocuments([("a", "one", 9)] * 60)
    documents.key = np.arange(60, dtype=np.uint64) // 3
    part = split_parts(documents, 0)
    assert all(len(set(part[number : number + 3])) == 1 for number in range(0, 60, 3))


def test_samples_are_divided_by_weights():
    """CEPE's shares where all domains are its own, else equal ones; 0 samples disable a part."""
    books = MadeDocuments(files("arxiv", 200, 400) + files("book", 200, 400))
    counts = plan_pairs(spec(train=11), books).counts
    assert [(count.part, count.domain, count.pairs) for count in counts] == [
        ("train", "arxiv", 6),
        ("train", "book", 5),
    ]
    counts = plan_pairs(spec(test=4, weights={"book": 2.0}), books).counts
    assert [(count.domain, count.pairs) for count in counts] == [("book", 4)]
    with pytest.raises(ArgumentError, match="bad weights"):
        plan_pairs(spec(test=4, weights={"boks": 2.0}), books)
    with pytest.raises(ArgumentError, match="bad weights"):
        plan_pairs(spec(test=4, weights={"book": 0.0}), books)
    with pytest.raises(ConfigError, match="encodr"):
        PairConfig.from_dict({"mode": "ab", "encodr": 3})
    assert divide(10, [0.25, 0.25, 0.5]) == [3, 2, 5]
    assert sum(divide(35_000, [0.025, 0.045, 0.15, 0.67, 0.045, 0.02, 0.045])) == 35_000


def test_missing_windows_are_counted():
    counts = plan_pairs(spec(test=100), MadeDocuments([("a", "a", 20)])).counts
    assert [(count.available, count.wanted, count.pairs) for count in counts] == [(3, 100, 3)]


@pytest.mark.parametrize("format", ["mds", "cepe"])
def test_written_pairs_are_the_planned_ones(tmp_path, format):
    """Columns are arrays, not pickles; CEPE's loader makes tensors of int64."""
    documents = MadeDocuments(files("arxiv", 20) + files("book", 20))
    plan = plan_pairs(spec(train=40), documents)
    assert write_pairs(plan, documents, tmp_path / "out", format=format) == [tmp_path / "out" / "train"]
    assert not (tmp_path / "out" / "test").exists(), "0 samples write nothing"
    for domain in ("arxiv", "book"):
        rows = list(MDSDirectory(tmp_path / "out" / "train" / domain))
        assert {row["domain"] for row in rows} == {domain}
        dtypes = {row[name].dtype.name for row in rows for name in ("token_ids", "prev_token_ids")}
        assert dtypes == {"int64" if format == "cepe" else "uint32"}
        planned = plan.windows["train", domain]
        for number, row in enumerate(rows):
            window = read_window(documents, planned, number, 12)
            assert (row["prev_token_ids"].tolist(), row["token_ids"].tolist()) == (
                window[:8].tolist(),
                window[8:].tolist(),
            )
        assert len(rows) == len(planned.first) == 20


def test_a_complete_part_is_kept_and_another_is_refused(tmp_path):
    """Half-written or other pairs must never pass for these."""
    documents = MadeDocuments(files("a", 20))
    plan = plan_pairs(spec(train=5), documents)
    write_pairs(plan, documents, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (tmp_path / ".train.0123abcd.tmp").mkdir()
    write_pairs(plan, documents, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for other, format in ((plan_pairs(spec(train=6), documents), "mds"), (plan, "cepe")):
        with pytest.raises(DataError, match="made otherwise"):
            write_pairs(other, documents, tmp_path, format=format)


def test_a_second_job_on_a_part_stops(tmp_path):
    """Two jobs at once would remove each other's unfinished files."""
    documents = MadeDocuments(files("a", 20))
    plan = plan_pairs(spec(train=5), documents)
    with JobLock(tmp_path / ".train.lock", what="train"), pytest.raises(RunError, match="another job"):
        write_pairs(plan, documents, tmp_path)
    write_pairs(plan, documents, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train"]


def test_a_domain_that_cannot_name_a_folder_is_refused(tmp_path):
    """It was found when its turn came, after hours of writing others."""
    documents = MadeDocuments([*files("+first", 20), *files("../up", 20)])
    with pytest.raises(DataError, match="cannot name a folder"):
        write_pairs(plan_pairs(spec(train=5), documents), documents, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_store_documents_are_framed(tmp_path, tokenizer, texts):
    """A store holds text alone; CEPE's documents begin with BOS and end with EOS."""
    with TokenStoreWriter(tmp_path / "store", config={}, tokenizer=tokenizer) as writer:
        for number, text in enumerate(texts):
            writer.add(tokenizer.encode(text), source="ab"[number % 2], key=number)
    plain = open_documents([tmp_path / "store"], specials="none")
    framed = open_documents([tmp_path / "store"])
    assert framed.domains == ("a", "b")
    assert framed.fingerprint != plain.fingerprint
    for document in (0, 49):
        ids = framed.ids(document)
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert (
            ids[1:-1].tolist() == plain.ids(document).tolist() == tokenizer.encode(texts[document]).tolist()
        )
        assert len(ids) == framed.tokens[document] == plain.tokens[document] + 2
        for start, stop in ((0, 1), (0, 5), (1, 4), (3, len(ids) - 1), (len(ids) - 1, len(ids)), (2, 10**6)):
            assert framed.ids(document, start, stop).tolist() == ids[start:stop].tolist()
    with pytest.raises(DataError, match="some inputs"):
        open_documents([tmp_path / "store", tmp_path])


def test_token_files_give_their_documents(tmp_path):
    """The domain is the first folder; hidden files and the order of arguments do not count."""
    for name, lengths in (("arxiv/x/b", [3, 2]), ("arxiv/a", [4]), ("book/a", []), (".hidden", [1])):
        write_cepe(tmp_path / f"{name}.npy", lengths, [np.arange(1, n + 1) for n in lengths])
    documents = open_documents([tmp_path])
    assert (documents.domains, documents.tokens.tolist()) == (("arxiv", "book"), [4, 3, 2])
    assert [documents.ids(document).tolist() for document in range(3)] == [[1, 2, 3, 4], [1, 2, 3], [1, 2]]
    alone = open_documents([tmp_path / "book", tmp_path / "arxiv" / "a.npy"])
    assert (alone.domains, alone.tokens.tolist()) == (("arxiv", "book"), [4])
    with pytest.raises(ArgumentError, match="framed already"):
        open_documents([tmp_path], specials="both")
    with pytest.raises(DataError, match=r"no \.npy token files"):
        open_documents([_empty(tmp_path / "empty")])
    with pytest.raises(DataError, match="neither a token store nor"):
        open_documents([tmp_path / "gone"])


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder
