"""Sums of masses survive half precision, and a cut to a given mass moves the rest into the tail."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from longspan.annotate.rounding import cut_to_mass, round_masses, words_for_mass
from longspan.infer.teacher import TopK


def topk_of(masses: np.ndarray, k: int) -> TopK:
    """The k largest of masses [N, V]."""
    ids = np.argsort(-masses, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(masses, ids, 1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - kept.sum(1), 0))
        return TopK(ids.astype(np.int32), np.log(kept).astype(np.float32), tail.astype(np.float32))


def total(logprobs: np.ndarray, tail: np.ndarray) -> np.ndarray:
    return np.exp(logprobs.astype(np.float64)).sum(1) + np.exp(tail.astype(np.float64))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 0.01, 1.0, 6.0]),
    k=st.sampled_from([1, 50, 900]),
)
def test_masses_sum_to_one(seed, spread, k):
    """Rounding to the nearest puts equally likely words off alike: 900 of them by 2e-3 in all."""
    logits = np.random.default_rng(seed).normal(0, spread + 1e-9, (4, 1000))
    masses = np.exp(logits - logits.max(1, keepdims=True))
    logprobs, tail = round_masses(topk_of(masses / masses.sum(1, keepdims=True), k), "float16")
    assert logprobs.dtype == tail.dtype == np.float16
    assert np.abs(total(logprobs, tail) - 1).max() < 5e-4


def test_a_mass_is_off_by_less_than_a_step():
    """Carrying the error along must not move a value further than to one of its two neighbours."""
    found = topk_of(np.full((1, 600), 1 / 600), 600)
    logprobs, _ = round_masses(found, "float16")
    exact = np.log(1 / 600)
    assert set(logprobs[0].tolist()) <= {-6.3984375, -6.39453125} and -6.3984375 < exact < -6.39453125


def test_nothing_beyond_the_words_stays_nothing():
    logprobs, tail = round_masses(topk_of(np.array([[0.25, 0.75]]), 2), "float16")
    assert tail[0] == -np.inf and total(logprobs, tail)[0] == pytest.approx(1, abs=4e-4)


@pytest.mark.parametrize(("mass", "words"), [(0.5, 1), (0.6, 1), (0.9, 2), (0.94, 3), (0.99, 3)])
def test_fewest_words_for_a_mass(mass, words):
    """Masses 0.6 0.3 0.05, 0.05 beyond; a mass that is not reached keeps all k."""
    found = topk_of(np.array([[0.3, 0.6, 0.05, 0.05]]), 3)
    assert words_for_mass(found.logprobs, mass).tolist() == [words]
    cut, counts = cut_to_mass(found, mass)
    assert counts.tolist() == [words]
    assert (cut.logprobs[0] > -np.inf).sum() == words
    assert total(cut.logprobs, cut.tail)[0] == pytest.approx(1, abs=1e-6)
