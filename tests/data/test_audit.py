"""Audits of token stores: duplicates, repetition, lines, languages, and mixtures that choose by them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from longspan.core.errors import ConfigError, DataError
from longspan.data.audit import job
from longspan.data.audit.audit_config import AuditConfig
from longspan.data.audit.duplicates import bands_for
from longspan.data.audit.measuring import Measuring, Vocabulary, measure
from longspan.data.audit.summary import summarize
from longspan.data.jobs import LocalExecutor
from longspan.data.plans.mixture import load_audit, plan_mixture
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.store import TokenStore, TokenStoreWriter
from longspan.data.store.lengths import LengthTable
from longspan.data.store.measures import Measures
from longspan.data.tokenizer import Tokenizer, load_tokenizer


class Identity:
    """A tokenizer as far as a store needs one."""

    fingerprint, vocab_size, bos_id, eos_id, pad_id = "f" * 64, 50_000, None, 0, None


def make_store(path: Path, documents: Sequence[Sequence[int]], source: str = "book") -> TokenStore:
    with TokenStoreWriter(path, config={}, tokenizer=Identity()) as writer:
        for number, ids in enumerate(documents):
            writer.add(np.array(ids, np.uint16), source=source, key=number)
    return TokenStore(path)


def run(stores: Sequence[TokenStore], out: Path, **settings: float) -> Measures:
    config = AuditConfig.from_dict(dict(settings))
    return job.audit(stores, out, config, tokenizer=None, executor=LocalExecutor(1))


def jaccard(first: Sequence[int], second: Sequence[int], run: int = 5) -> float:
    """The definition, on plain sets."""
    a, b = ({tuple(ids[i : i + run]) for i in range(len(ids) - run + 1)} for ids in (first, second))
    return len(a & b) / len(a | b)


def changed(ids: list[int], edits: int, rng: random.Random) -> list[int]:
    ids = list(ids)
    for place in rng.sample(range(len(ids)), edits):
        ids[place] = rng.randrange(1, 50_000)
    return ids


def test_near_duplicates_are_found_and_nothing_else(tmp_path: Path) -> None:
    """Guards against missing pairs just above the limit, and calling pairs below it duplicates: a signature alone
    is off by 0.1 in one pair of a hundred."""
    rng = random.Random(0)
    originals = [[rng.randrange(1, 50_000) for _ in range(300)] for _ in range(120)]
    copies = [changed(ids, rng.choice((5, 6, 7, 12, 16)), rng) for ids in originals]
    found = run([make_store(tmp_path / "store", originals + copies)], tmp_path / "audit").columns
    similar = np.array([jaccard(*pair) >= 0.8 for pair in zip(originals, copies)])
    assert 40 < similar.sum() < 80
    flags = found["near_duplicate"]
    assert not flags[:120].any()
    assert not flags[120:][~similar].any()
    assert flags[120:][similar].mean() >= 0.95
    assert not found["exact_duplicate"].any()


@pytest.mark.parametrize("limit", [0.5, 0.8, 0.95])
def test_bands_let_pairs_at_the_limit_through(limit: float) -> None:
    """Guards against bands so long that pairs at the limit meet in none: the S-curve, written out."""
    bands = bands_for(limit)
    assert bands.number * bands.rows <= 128
    assert 1 - (1 - limit**bands.rows) ** bands.number >= 0.99


def test_chains_of_versions_keep_one_and_copies_follow_it(tmp_path: Path) -> None:
    """Guards against comparing with what was left out: what stays has to stand for all that went."""
    rng = random.Random(1)
    first = [rng.randrange(1, 50_000) for _ in range(400)]
    second = changed(first, 6, rng)
    other = [rng.randrange(1, 50_000) for _ in range(400)]
    documents = [other, first, second, second, first, other, [7], [7], [8]]
    found = run([make_store(tmp_path / "store", documents)], tmp_path / "audit").columns
    assert found["exact_duplicate"].tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 0]
    assert found["near_duplicate"].tolist() == [0, 0, 1, 1, 1, 1, 0, 1, 0]


def test_duplicates_are_found_across_stores_in_any_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against documents that are compared within their block or store alone, or that move between columns."""
    rng = random.Random(2)
    texts = [[rng.randrange(1, 50_000) for _ in range(rng.randrange(1, 90))] for _ in range(20)]
    stores = [make_store(tmp_path / "a", texts[:12]), make_store(tmp_path / "b", texts[8:])]
    whole = run(stores, tmp_path / "whole").columns
    assert whole["exact_duplicate"].tolist() == [0] * 12 + [1] * 4 + [0] * 8
    monkeypatch.setattr(job, "BLOCK_TOKENS", 64)
    cut = run(stores, tmp_path / "cut").columns
    for name, column in whole.items():
        assert np.array_equal(column, cut[name]), name


def test_repetition_by_eye(tmp_path: Path) -> None:
    """Guards against runs that reach over the border of two documents, and documents too short for one."""
    once, twice = list(range(1, 21)), list(range(30, 50)) * 2
    found = run([make_store(tmp_path / "store", [once, twice, [5], once[-5:] + twice[:5]])], tmp_path / "out")
    # 40 tokens have 31 runs of 10; 20 of them begin at different places of the 20 tokens.
    assert found.columns["repeated"].tolist() == pytest.approx([0, 11 / 31, 0, 0])
    assert found.columns["compression"][1] < found.columns["compression"][0]


def test_copies_keep_their_order_in_a_store_with_some_of_the_documents(tmp_path: Path) -> None:
    """Guards against a store of part of the input whose first copy is the input's second: both would be left out."""
    audited = Measures(
        {"exact_duplicate": np.array([0, 0, 1, 0, 1], np.uint8)},
        (),
        keys=np.array([7, 3, 7, 9, 7], np.uint64),
    )

    def found(name: str, *stores: list[int]) -> list[int]:
        tables = []
        for number, keys in enumerate(stores):
            with TokenStoreWriter(tmp_path / f"{name}{number}", config={}, tokenizer=Identity()) as writer:
                for key in keys:
                    writer.add(np.array([1], np.uint16), source="a", key=key)
            tables.append(TokenStore(tmp_path / f"{name}{number}").lengths)
        columns = audited.of(LengthTable.concatenate(tables))
        return [int(value) for value in columns["exact_duplicate"]]

    # More copies than were audited are copies too.
    assert found("some", [7, 7, 9, 7, 7]) == [0, 1, 0, 1, 1]
    # And so is the one in a second store.
    assert found("two", [7, 9], [3, 7]) == [0, 0, 0, 1]
    with pytest.raises(DataError, match="2 documents of other stores, of which 1 were not audited"):
        found("others", [7, 8])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of words and line ends: an id a word."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers

    known = ["all", "rights", "reserved", "here", "the", "fox", "sees", "a", "dog", "today", "1", "2", "|"]
    names = ["<eos>", "\n", *known]
    words = Words(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")
    ])  # fmt: skip
    folder = tmp_path_factory.mktemp("words")
    words.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


def test_lines_symbols_and_boilerplate_by_eye(words: Tokenizer, tmp_path: Path) -> None:
    """Guards against lines counted twice in one document, and short lines taken for boilerplate."""
    notice = "all rights reserved here\n"
    texts = [
        notice + "the fox sees a dog\n" * 2,
        notice + "a dog today\n",
        "1 2 | 1 2 |",
        "the fox sees a dog\n",
    ]
    documents = [words.encode(text) for text in texts]
    with TokenStoreWriter(tmp_path / "store", config={}, tokenizer=words) as writer:
        for number, ids in enumerate(documents):
            writer.add(ids, source="page", key=number)
    store = TokenStore(tmp_path / "store")
    config = AuditConfig(boilerplate_documents=2)
    found = job.audit([store], tmp_path / "audit", config, tokenizer=words, executor=LocalExecutor(1)).columns
    # Tokens: notice 5, fox 6 (twice), today 4; a line of 4 tokens is long enough.
    assert [len(ids) for ids in documents] == [17, 9, 6, 6]
    assert found["repeated_lines"].tolist() == pytest.approx([6 / 17, 0, 0, 0])
    assert found["boilerplate"].tolist() == pytest.approx([1, 5 / 9, 0, 1])
    assert found["symbols"].tolist() == pytest.approx([0, 0, 1, 0])
    loaded = Measures.load(tmp_path / "audit")
    assert loaded.of(store.lengths)["language"].tolist() == ["en", "en", "zxx", "en"]


def test_mixture_by_condition(tmp_path: Path) -> None:
    """Guards against columns of one store read for another, and documents that go without being counted."""
    a, b = make_store(tmp_path / "a", [[1] * 9, [2] * 5]), make_store(tmp_path / "b", [[1] * 9, [3] * 7])
    run([a, b], tmp_path / "audit")
    spec = MixtureConfig(
        mode="none", where="near_duplicate == 0 and tokens > 5", audit=str(tmp_path / "audit")
    )
    audit = load_audit(spec)
    table = LengthTable.concatenate([a.lengths, b.lengths])
    plan = plan_mixture(spec, table, 0, audit=audit)
    assert sorted(plan.documents.tolist()) == [0, 3]
    assert plan.report.excluded == 2
    # A part of what was audited, and in another order.
    alone = plan_mixture(spec, b.lengths, 0, audit=audit)
    assert alone.documents.tolist() == [1]
    plan.save(tmp_path / "plan")
    assert type(plan).load(tmp_path / "plan").report.excluded == 2
    other = make_store(tmp_path / "c", [[1] * 9, [2] * 5, [4]])
    with pytest.raises(DataError, match="not of these stores"):
        plan_mixture(spec, other.lengths, 0, audit=audit)
    with pytest.raises(ConfigError, match="long_range"):
        plan_mixture(spec.model_copy(update={"where": "long_range > 0"}), b.lengths, 0, audit=audit)


def test_summary_weighs_documents_by_their_tokens_and_says_what_was_not_measured(tmp_path: Path) -> None:
    """Guards against missing values read as 0."""
    store = make_store(tmp_path / "store", [[1] * 30, list(range(10)), [1] * 30])
    measures = run([store], tmp_path / "audit")
    columns = {**measures.columns, "long_range": np.array([np.nan, 0.5, np.nan], np.float32)}
    (row,) = summarize(columns, store.lengths)
    assert (row["documents"], row["tokens"], row["lengths"]) == (3, 70, "under 4K")
    assert row["exact_duplicate"]["mean"] == pytest.approx(30 / 70)
    assert row["long_range"] == {"mean": 0.5, "measured": pytest.approx(10 / 70)}


def test_damaged_audits_are_refused(tmp_path: Path) -> None:
    """Guards against an audit that is used although it does not fit together."""
    measures = run([make_store(tmp_path / "store", [[1] * 9])], tmp_path / "audit")
    (tmp_path / "audit" / "near_duplicate.npy").write_bytes(b"no column")
    with pytest.raises(DataError, match="cannot be read as a column"):
        Measures.load(tmp_path / "audit")
    two = {name: np.repeat(column, 2) for name, column in measures.columns.items()}
    Measures(two, measures.stores).save(tmp_path / "audit")
    with pytest.raises(DataError, match="contradicts itself"):
        Measures.load(tmp_path / "audit")


def test_a_block_without_a_tokenizer_measures_what_it_can(tmp_path: Path) -> None:
    """Guards against lines of a vocabulary that nobody knows."""
    store = make_store(tmp_path / "store", [[1, 2, 3]])
    found = measure(job.Block(str(store.path), 0, 1, Measuring(5)))
    assert found.lines is None and found.languages is None and found.symbols is None


def test_vocabulary_counts_visible_characters(words: Tokenizer) -> None:
    """Guards against spaces counted as symbols: indented code would be a table."""
    found = Vocabulary.of(words, words.vocab_size)
    assert found.ends_line.tolist() == [False, True] + [False] * 13
    assert found.symbols[12:].tolist() == [1, 1, 1] and found.characters[2] == 3
