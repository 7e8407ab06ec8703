"""Ways of cutting documents into windows: no token skipped or measured twice, and sums equal to brute force."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.data.exchange.token_documents import StoreDocuments
from longspan.data.store import Column, MDSWriter, TokenStoreWriter
from longspan.data.tokenizer import Tokenizer
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.ppl import PplConfig, PplWindow, plan_windows
from longspan.eval.ppl_documents import MdsDocuments, is_tokenised, open_tokenised
from longspan.eval.ppl_run import run_ppl
from longspan.eval.records import read_records
from longspan.infer.perplexity import token_nll

BOS = 1


class Ids:
    """Documents of the ids 100, 101, 102, ... so that an id says its place; lengths by source."""

    def __init__(self, lengths: dict[str, list[int]], tokenizer: str | None = None) -> None:
        self.domains = tuple(lengths)
        self.tokens = np.array([n for counts in lengths.values() for n in counts], np.int64)
        self.domain = np.repeat(np.arange(len(lengths)), [len(n) for n in lengths.values()]).astype(np.uint16)
        self.key = np.arange(len(self.tokens), dtype=np.uint64)
        self.files, self.file, self.dtype = (), np.zeros(0, np.uint32), np.dtype(np.uint32)
        self.tokenizer, self.fingerprint = tokenizer, "f"

    def ids(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return np.arange(100, 100 + self.tokens[document], dtype=np.uint32)[start:stop]


class Words:
    """What windows are asked of a tokenizer."""

    path, fingerprint = Path("t"), "t"

    def __init__(self, bos_id: int | None = BOS, *, adds_bos: bool = False) -> None:
        self.bos_id, self.adds_bos = bos_id, adds_bos


def windows_of(sizes: list[int], words: Words | None = None, **task: Any) -> list[PplWindow]:
    return plan_windows(PplConfig(**task), Ids({"a": sizes}), words or Words()).windows  # type: ignore[arg-type]


def measured(window: PplWindow) -> list[int]:
    return (window.ids[len(window.ids) - window.scored :].astype(int) - 100).tolist()


def test_windows_of_the_module_are_those_of_the_code() -> None:
    """The seeds step by the stride but shorten windows by the BOS: one token in every window is skipped."""
    two = windows_of([10], cut="sliding", lengths=(4,), stride=2)
    assert [(window.ids - 100).tolist() for window in two] == [
        [0, 1, 2, 3],
        [2, 3, 4, 5],
        [4, 5, 6, 7],
        [6, 7, 8, 9],
    ]
    assert [measured(window) for window in two] == [[1, 2, 3], [4, 5], [6, 7], [8, 9]]
    whole = windows_of([10], cut="sliding", lengths=(4,), stride=4)
    assert [measured(window) for window in whole] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    begun = windows_of([10], cut="sliding", lengths=(4,), stride=4, bos="always")
    assert [window.ids.tolist() for window in begun] == [
        [BOS, 100, 101, 102],
        [BOS, 103, 104, 105],
        [BOS, 106, 107, 108],
        [BOS, 109],
    ]
    assert [measured(window) for window in begun] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    full = windows_of([10, 3], cut="full")
    assert [(len(window.ids), window.length, window.scored) for window in full] == [(10, 10, 9), (3, 10, 2)]
    cut = windows_of([10, 3], cut="truncate", lengths=(4, 8))
    assert [(len(window.ids), window.length) for window in cut] == [(4, 4), (8, 8), (3, 4), (3, 8)]


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    length=st.integers(2, 40),
    stride=st.integers(1, 40),
    bos=st.booleans(),
)
def test_every_token_is_measured_once(tokens: list[int], length: int, stride: int, bos: bool) -> None:
    """Skipped and doubled tokens both give a number that looks right."""
    stride, least = min(stride, length), 1 if bos else 2
    if max(tokens) < least:
        tokens = [*tokens, least]
    windows = windows_of(
        tokens, cut="sliding", lengths=(length,), stride=stride, bos="always" if bos else "never"
    )
    for number, count in enumerate(tokens):
        own = [window for window in windows if window.document.endswith(f"-{number}")]
        expected = list(range(0 if bos else 1, count)) if count >= least else []
        assert [place for window in own for place in measured(window)] == expected
        for window in own:
            assert len(window.ids) <= length
            context = len(window.ids) - window.scored
            # The first window apart, a token is predicted from all the context that the stride leaves.
            assert window.start == 0 or context >= max(1, length - stride)


def test_spans_with_a_bos_measure_the_same_text_at_each_length() -> None:
    """With BOS a window of n tokens holds n - 1 of the text."""
    windows = windows_of([25], lengths=(4, 7), num_spans=9, bos="always")
    for length in (4, 7):
        own = [window for window in windows if window.length == length]
        assert all(len(window.ids) == length and window.ids[0] == BOS for window in own)
        assert [place for window in own for place in measured(window)] == list(range(24))


def test_bos_follows_the_tokenizer_unless_told(tokenizer: Tokenizer) -> None:
    """A BOS that a model never saw, or misses, is worth several points of perplexity."""
    for adds, bos, first in [
        (False, "auto", 100),
        (True, "auto", BOS),
        (True, "never", 100),
        (False, "always", BOS),
    ]:
        plan = plan_windows(
            PplConfig(lengths=(4,), bos=bos),  # type: ignore[arg-type]
            Ids({"a": [9]}),
            Words(adds_bos=adds),  # type: ignore[arg-type]
        )
        assert plan.windows[0].ids[0] == first
        assert ("begin-of-text token 1" in plan.first_token) == (first == BOS)
    with pytest.raises(ArgumentError, match="no begin-of-text token"):
        windows_of([9], Words(None), lengths=(4,), bos="always")


def test_a_document_that_begins_with_bos_gets_no_second_one() -> None:
    """A template writes BOS itself: windows of conversations began with two, as no model was trained."""

    class Begun(Ids):
        def ids(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
            ids = super().ids(document)
            return np.concatenate([ids[:1] * 0 + BOS, ids[1:]])[start:stop] if self.domain[document] else ids

    documents = Begun({"a": [4], "b": [7]})
    plan = plan_windows(PplConfig(cut="sliding", stride=4, lengths=(4,), bos="always"), documents, Words())  # type: ignore[arg-type]
    assert [window.ids.tolist() for window in plan.windows] == [
        [BOS, 100, 101, 102],
        [BOS, 103],
        [BOS, 101, 102, 103],
        [BOS, 104, 105, 106],
    ]
    never = plan_windows(PplConfig(cut="full", bos="never"), documents, Words())  # type: ignore[arg-type]
    assert never.windows[1].ids.tolist() == [BOS, *range(101, 107)]


def test_documents_are_filtered_and_drawn() -> None:
    """Which documents are measured follows from lengths and seed alone."""
    sizes = [5, 30, 12, 80, 20, 40]
    chosen = windows_of(sizes, cut="truncate", lengths=(4,), min_tokens=10, max_tokens=40)
    assert [window.document[-1] for window in chosen] == ["1", "2", "4", "5"]
    drawn = [
        [window.document for window in windows_of(sizes, cut="full", num_documents=3, seed=seed)]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1] != drawn[2] or drawn[0] != drawn[3] or drawn[0] != drawn[4]
    assert all(len(documents) == 3 for documents in drawn)
    first = windows_of(sizes, cut="full", num_documents=2, min_tokens=10, first=True, seed=7)
    assert [window.document[-1] for window in first] == ["1", "2"], "as others take the first so many"
    with pytest.raises(ConfigError, match="the first of how many"):
        PplConfig.from_dict({"cut": "full", "first": True})
    with pytest.raises(
        DataError, match=r"as many tokens as asked for\n.*longest has 80 tokens\n.*100 tokens"
    ):
        windows_of(sizes, cut="full", min_tokens=100)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cut": "full", "lengths": [4]}, "lengths of their own"),
        ({"cut": "truncate"}, "windows need lengths"),
        ({"lengths": [4], "stride": 2}, "a stride is for sliding windows"),
        ({"lengths": [4], "cut": "sliding"}, "a stride is for sliding windows"),
        ({"lengths": [8, 4], "cut": "sliding", "stride": 5}, "would skip tokens between windows of 4"),
    ],
)
def test_settings_that_contradict_each_other(wrong: dict[str, Any], message: str) -> None:
    """A stride that is ignored is a result under another name."""
    with pytest.raises(ConfigError, match=message):
        PplConfig.from_dict(wrong)


def test_header_of_old_settings_is_as_it_was() -> None:
    """A run folder that an earlier version began goes on."""
    assert PplConfig(lengths=(4, 8)).params() == {
        "lengths": [4, 8],
        "num_spans": 16,
        "num_buckets": 16,
        "seed": 0,
        "split": "test",
    }
    assert (
        PplConfig(lengths=(8,), cut="sliding", stride=2).params().items()
        >= {"cut": "sliding", "stride": 2}.items()
    )


def brute_force(model: torch.nn.Module, window: np.ndarray) -> np.ndarray:
    """Losses of every token of a window but the first, from its whole logits, in double precision."""
    from longspan.models.hf import Documents

    ids = torch.from_numpy(window.astype(np.int64))
    with torch.no_grad():
        hidden = model.double().model(
            input_ids=ids[None],
            position_ids=torch.arange(len(ids))[None],
            documents=Documents.single(len(ids)),
            use_cache=False,
        )
        log_probs = torch.log_softmax(model.lm_head(hidden.last_hidden_state[0]), dim=-1)
    model.float()
    return -log_probs[:-1].gather(1, ids[1:, None])[:, 0].numpy()


@pytest.mark.parametrize("stride", [1, 7, 63, 64])
@pytest.mark.parametrize("bos", ["never", "always"])
def test_sliding_perplexity_equals_brute_force(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    documents: list[HeldOutDocument],
    model_info: dict[str, Any],
    tmp_path: Path,
    stride: int,
    bos: str,
) -> None:
    """Each token's loss from its own context, computed one token at a time, in double precision."""
    length = 64
    texts = [
        HeldOutDocument(one.id, one.text[: 230 * (number + 1)], one.source)
        for number, one in enumerate(documents[:2])
    ]
    task = PplConfig(lengths=(length,), cut="sliding", stride=stride, bos=bos)  # type: ignore[arg-type]
    measure = partial(token_nll, model, batch_tokens=300)
    summary = run_ppl(
        measure,
        tokenizer,
        task,
        documents=texts,
        label="x",
        out=tmp_path / "ppl-x.jsonl",
        model_info=model_info,
    )
    rows = {row["source"]: row for row in summary["by_length"]}
    frame = 1 if bos == "always" else 0
    for text in texts:
        ids = tokenizer.encode(text.text)
        total, by_window = 0.0, defaultdict(list)
        advance = min(stride, length - 1)
        for place in range(1 - frame, len(ids)):
            # The window that measures a token is the first that reaches it.
            number = max(0, -(-(place + 1 - (length - frame)) // advance))
            start = number * advance
            window = ids[start : place + 1]
            if frame:
                window = np.concatenate([[tokenizer.bos_id], window])
            by_window[number].append(brute_force(model, window)[-1])
            total += by_window[number][-1]
        row = rows[text.source]
        assert row["tokens"] == len(ids) - (1 - frame)
        assert row["nll"] == pytest.approx(total, rel=1e-6)
        assert row["perplexity"] == pytest.approx(math.exp(total / row["tokens"]), rel=1e-6)
        # EasyContext's `torch.exp(torch.stack(nlls).mean())`, each of `nlls` the mean of a window.
        means = [sum(losses) / len(losses) for losses in by_window.values()]
        assert row["perplexity_by_window"] == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-6)


def test_tokenised_sets_give_what_their_texts_give(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    documents: list[HeldOutDocument],
    model_info: dict[str, Any],
    tmp_path: Path,
) -> None:
    """A token store, an MDS folder of another tool, and the texts themselves."""
    with TokenStoreWriter(tmp_path / "store", config={}, tokenizer=tokenizer) as writer:
        for number, document in enumerate(documents):
            writer.add(tokenizer.encode(document.text), source=document.source, key=number)
    columns = [Column("domain", "str"), Column("input_ids", "ndarray:uint32")]
    (tmp_path / "mds").mkdir()
    mds = MDSWriter(tmp_path / "mds", columns, size_limit=1 << 20)
    for document in documents:
        mds.write({"domain": document.source, "input_ids": tokenizer.encode(document.text)})
    mds.finish()
    assert is_tokenised(tmp_path / "store")
    assert is_tokenised(tmp_path / "mds")
    assert not is_tokenised(tmp_path)
    opened = [open_tokenised([tmp_path / "store"]), open_tokenised([tmp_path / "mds"])]
    assert [type(one) for one in opened] == [StoreDocuments, MdsDocuments]
    task = PplConfig(lengths=(64,), cut="truncate")
    summaries = [
        run_ppl(
            partial(token_nll, model, batch_tokens=4000),
            tokenizer,
            task,
            documents=given,
            label=f"l{number}",
            out=tmp_path / f"ppl-{number}.jsonl",
            model_info=model_info,
        )["by_length"]
        for number, given in enumerate([documents, *opened])
    ]
    assert [row["tokens"] for row in summaries[0]] == [6 * 63, 6 * 63]
    for other in summaries[1:]:
        for one, two in zip(summaries[0], other):
            assert one["nll"] == pytest.approx(two["nll"], rel=1e-6)
    assert read_records(tmp_path / "ppl-1.jsonl").header["params"]["documents"].keys() == {
        "count",
        "tokens_fingerprint",
    }


def test_ids_of_another_tokenizer_are_refused() -> None:
    """Ids mean other words there, and the perplexity would look like that of a bad model."""
    with pytest.raises(DataError, match="another tokenizer"):
        plan_windows(PplConfig(lengths=(4,)), Ids({"a": [9]}, tokenizer="other"), Words())  # type: ignore[arg-type]
