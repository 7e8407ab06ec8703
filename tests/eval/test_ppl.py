from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError, DataError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.ppl import PplConfig, bucket_sums, perplexities, plan_windows

Documents = list[HeldOutDocument]


def test_all_lengths_read_the_same_text(documents: Documents, tokenizer: Tokenizer) -> None:
    """Short windows from other documents than long ones would compare texts, not lengths."""
    task = PplConfig(lengths=(64, 256, 128), num_spans=3)
    windows = plan_windows(task, documents, tokenizer).windows
    texts: dict[tuple[str, int], list[int]] = {}
    for window in windows:
        assert len(window.ids) == window.length
        texts.setdefault((window.source, window.length), []).extend(window.ids.tolist())
    for source in ("code", "prose"):
        assert len(texts[source, 256]) == 3 * 256
        assert sorted(texts[source, 64]) == sorted(texts[source, 128]) == sorted(texts[source, 256])


def test_windows_are_parts_of_their_documents(documents: Documents, tokenizer: Tokenizer) -> None:
    """A window that ran over a document border would be harder than the text is."""
    tokens = {document.id: tokenizer.encode(document.text) for document in documents}
    windows = plan_windows(PplConfig(lengths=(100, 333), num_spans=4), documents, tokenizer).windows
    for window in windows:
        assert np.array_equal(
            window.ids, tokens[window.document][window.start : window.start + window.length]
        )
    places = [(window.document, window.start) for window in windows if window.length == 333]
    assert len(set(places)) == len(places)


def test_choice_of_spans_follows_the_seed(documents: Documents, tokenizer: Tokenizer) -> None:
    """Two runs of one setting see the same text; another seed sees other text."""

    def places(seed: int) -> list[tuple[str, int]]:
        windows = plan_windows(
            PplConfig(lengths=(128,), num_spans=5, seed=seed), documents, tokenizer
        ).windows
        return [(window.document, window.start) for window in windows]

    assert places(1) == places(1) != places(2)


def test_source_without_long_documents_is_named(documents: Documents, tokenizer: Tokenizer) -> None:
    """A source that is left out silently looks like a source that was measured."""
    short = HeldOutDocument("short", "A line.\n", "chat")
    windows = plan_windows(PplConfig(lengths=(128, 256)), [*documents, short], tokenizer).windows
    reasons = [(window.length, window.reason) for window in windows if window.source == "chat"]
    found = len(tokenizer.encode(short.text))
    reason = f"no document of 256 tokens or more; the longest has {found}"
    assert reasons == [(128, reason), (256, reason)]
    with pytest.raises(DataError, match=r"no held-out document is as long.*\n.*longest has"):
        plan_windows(PplConfig(lengths=(100_000,)), documents, tokenizer)


def test_wrong_lengths_are_named() -> None:
    """A window of one token predicts nothing and would divide by zero."""
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        PplConfig.from_dict({"lengths": [1, 256]})
    with pytest.raises(ConfigError, match="stands twice"):
        PplConfig.from_dict({"lengths": [256, 256]})


def test_buckets_hold_the_position_they_say() -> None:
    """Off by one, the first bucket would hold the loss of a token of the second."""
    nll = np.array([1, 2, 3, 4], dtype=np.float32)  # of positions 1, 2, 3, 4
    assert bucket_sums(nll, length=5, width=2) == [
        {"start": 0, "end": 2, "tokens": 1, "nll": 1.0},
        {"start": 2, "end": 4, "tokens": 2, "nll": 5.0},
        {"start": 4, "end": 5, "tokens": 1, "nll": 4.0},
    ]


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 300), width=st.integers(1, 400))
def test_buckets_lose_no_token(length: int, width: int) -> None:
    """Every predicted token is in exactly one bucket, whatever the widths."""
    nll = np.arange(1, length, dtype=np.float32)
    buckets = bucket_sums(nll, length=length, width=width)
    assert sum(bucket["tokens"] for bucket in buckets) == length - 1
    assert sum(bucket["nll"] for bucket in buckets) == nll.sum(dtype=np.float64)
    assert [bucket["end"] for bucket in buckets[:-1]] == [bucket["start"] for bucket in buckets[1:]]


def test_perplexity_is_over_tokens_not_over_windows() -> None:
    """A mean of window means gives a short window the weight of a long one."""
    samples = [
        {"source": "a", "length": 8, "buckets": [{"tokens": 1, "nll": 3.0}]},
        {"source": "a", "length": 8, "buckets": [{"tokens": 2, "nll": 1.0}, {"tokens": 1, "nll": 0.0}]},
        {"source": "b", "length": 8, "buckets": []},
    ]
    first, second = perplexities(samples)
    assert first == {
        "source": "a",
        "length": 8,
        "tokens": 4,
        "nll": 4.0,
        "perplexity": math.e,
        "perplexity_by_window": pytest.approx(math.exp((3 + 1 / 3) / 2)),
        "bits_per_byte": None,
    }
    sized = [
        {**sample, "buckets": [{**b, "bytes": 2 * b["tokens"]} for b in sample["buckets"]]}
        for sample in samples
    ]
    assert perplexities(sized)[0]["bits_per_byte"] == pytest.approx(4.0 / math.log(2) / 8)
    assert second["perplexity"] is None
