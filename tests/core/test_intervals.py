"""Differences with their intervals, and the length up to which a model holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.intervals import (
    Effective,
    clustered_interval,
    effective_context,
    holm,
    independent_difference,
    paired_difference,
    paired_p,
    samples_needed,
    score_interval,
    t_95,
    two_sided_p,
    wilson_interval,
)


def test_effective_context_needs_every_shorter_length_too() -> None:
    """Guards against a lucky long length, few samples, and a hole in the grid counted as reached."""

    def reached(threshold: float = 0.8, **right: tuple[int, int]) -> Effective:
        rows = {int(length[1:]): (wilson_interval(*counts), counts[1]) for length, counts in right.items()}
        return effective_context(rows, threshold=threshold)

    assert reached(n1024=(40, 40), n2048=(39, 40), n4096=(30, 40))[:3] == (2048, 4096, "below")
    assert reached(n4096=(40, 40), n1024=(40, 40), n2048=(20, 40)).length == 1024
    assert reached(n1024=(40, 40), n2048=(0, 0), n4096=(40, 40))[:3] == (1024, 2048, "unscored")
    assert reached().text == "not measured"
    assert reached(0.5, n1024=(30, 40)) == (1024, None, "", 0, 4)


def test_too_few_samples_are_not_a_model_that_fails() -> None:
    """8 of 8 says no more than 68 %: that was "< 1,024" for a perfect model; 2 of 8 rules it out."""

    def of(right: int, samples: int, threshold: float = 0.8) -> Effective:
        return effective_context({1024: (wilson_interval(right, samples), samples)}, threshold=threshold)

    assert (
        of(8, 8).text == "not shown" and of(8, 8).note == "8 samples at 1,024 tokens, at least 16 are needed"
    )
    assert of(2, 8).text == "< 1,024" and of(2, 8).note == ""
    assert of(12, 16).text == "< 1,024", "with 16 it could have been shown"
    assert of(0, 0).text == "not measured" and of(0, 0).note == "nothing is scored at 1,024 tokens"
    assert of(1, 1).note.startswith("1 sample at")
    for count in range(1, 120):
        assert "no number is enough" in of(count, count, threshold=1.0).note


@settings(max_examples=50, deadline=None)
@given(threshold=st.floats(0.0, 0.99))
def test_the_number_of_samples_that_is_named_is_the_least_that_will_do(threshold: float) -> None:
    needed = samples_needed(threshold)
    assert needed is not None
    low, before = wilson_interval(needed, needed), wilson_interval(needed - 1, needed - 1)
    assert low is not None and low[0] > threshold - 1e-9
    assert before is None or before[0] <= threshold + 1e-9


def test_paired_difference_by_hand() -> None:
    """98 pairs, 10 got better and 4 worse: centre 6/100, variance 15/100 - 0.0036, half 1.96 * 0.03826."""
    low, high = paired_difference([1] * 10 + [-1] * 4 + [0] * 84) or (0, 0)
    assert (low, high) == pytest.approx((0.06 - 0.075, 0.06 + 0.075), abs=1e-4)
    assert paired_difference([]) is None
    low, high = paired_difference([0.0] * 8) or (0, 0)
    assert low < -0.1 and high > 0.1, "eight unchanged answers do not prove that nothing changed"


def test_independent_difference_matches_newcombe() -> None:
    """Newcombe (1998), table II: 56/70 - 48/80 by method 10 is 0.0524 to 0.3339."""
    assert independent_difference((48, 80), (56, 70)) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert independent_difference((0, 0), (1, 2)) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.25, 0.0, 0.5, 1.0]), min_size=1, max_size=200))
def test_a_paired_interval_holds_zero_shrunk_mean_and_stays_in_range(differences: list[float]) -> None:
    """Guards against bounds outside of what a difference of scores can be."""
    low, high = paired_difference(differences) or (1.0, -1.0)
    centre = sum(differences) / (len(differences) + 2)
    assert -1 <= low <= centre <= high <= 1 and low < high


def test_samples_on_one_text_are_fewer_than_they_look():
    """The interval of 220 independent answers says more than 20 texts with 11 questions each can say."""
    right = [1.0] * 10 + [0.0] * 10
    scores, texts = (
        [score for score in right for _ in range(11)],
        [text for text in range(20) for _ in range(11)],
    )
    assert clustered_interval(scores, texts) == pytest.approx(wilson_interval(9.5, 19, z=2.0930), abs=1e-3)
    assert clustered_interval(right, list(range(20))) == score_interval(right)
    assert clustered_interval([1.0] * 22, [0] * 11 + [1] * 11) == wilson_interval(2, 2)
    assert clustered_interval([1.0, 0.0], ["one", "one"]) is None and clustered_interval([], []) is None
    low, high = paired_difference([1.0] * 11 + [0.0] * 11, [0] * 11 + [1] * 11)
    plain = paired_difference([1.0] * 11 + [0.0] * 11)
    assert low < plain[0] < plain[1] < high
    assert paired_difference([1.0, 0.0], [1, 2]) == paired_difference([1.0, 0.0])


def drawn(share: float, alike: float, texts: int, size: int, *, draws: int) -> tuple[float, float]:
    """Return how often the interval of clusters and that of independent samples hold the mean.

    Answers are `alike` within a text: their intraclass correlation.
    """
    draw = np.random.default_rng(texts)
    a, b = share * (1 - alike) / alike, (1 - share) * (1 - alike) / alike
    names = [text for text in range(texts) for _ in range(size)]
    held = np.zeros(2)
    for _ in range(draws):
        right = draw.random((texts, size)) < draw.beta(a, b, size=(texts, 1))
        scores = right.astype(float).ravel().tolist()
        found = clustered_interval(scores, names), score_interval(scores)
        held += [low <= share <= high for low, high in found]
    return tuple(held / draws)


def test_few_texts_that_differ_say_little_of_the_others():
    """One wrong answer among 400, of 20 texts: a text that is wrong as a whole may just not have been drawn.

    Its interval held the mean in 85 % of draws; where every text is as wrong as the others it is as it was.
    """
    texts = [text for text in range(20) for _ in range(20)]
    low, high = clustered_interval([0.0] + [1.0] * 399, texts)
    assert low < 0.97 and high > 399 / 400
    evenly = ([0.0] * 5 + [1.0] * 15 + [0.0] * 7 + [1.0] * 13) * 10
    low, high = clustered_interval(evenly, texts)
    plain = score_interval(evenly)
    assert plain[1] - plain[0] < high - low < 1.1 * (plain[1] - plain[0])
    clustered, _ = drawn(0.95, 0.5, 20, 20, draws=300)
    assert clustered > 0.91
    changed = paired_difference([-1.0] + [0.0] * 399, texts)
    assert changed[0] == pytest.approx((-1 - 4.3027 * 20 / 20) / 400, abs=1e-4), (
        "2 degrees of freedom, not 19"
    )
    # At worst each text is one sample, of which the larger ones are more.
    uneven = clustered_interval([1.0] * 12 + [1.0, 1.0], [0] * 12 + [1, 2])
    assert uneven == wilson_interval(196 / 146, 196 / 146)
    for alike in ([1.0, 0.0], [0.25, 0.75]):
        low, high = clustered_interval(alike * 20, [text for text in range(20) for _ in range(2)])
        assert 0.25 < low < 0.5 < high < 0.75, "texts that do not differ"
    graded = clustered_interval([0.5, 0.6] * 20, list(range(20)) * 2)
    assert 0.5 < graded[0] < 0.55 < graded[1] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.95, 0.98])
@pytest.mark.parametrize("alike", [0.2, 0.5, 0.8])
def test_clustered_intervals_near_one_hold_nearly_as_often(share, alike):
    """The corner where they held the mean in 85 % of the draws: few wrong answers, in few texts."""
    for texts, size in ((5, 11), (20, 20), (60, 20)):
        assert drawn(share, alike, texts, size, draws=1000)[0] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("alike", [0.05, 0.2, 0.5])
def test_clustered_intervals_hold_what_they_promise(share, alike):
    """95 % intervals that hold the mean in half of the draws make noise look like progress.

    20 and 50 texts, 11 questions each, whose answers are `alike` within a text (their intraclass correlation).
    """
    for texts in (20, 50):
        clustered, plain = drawn(share, alike, texts, 11, draws=2000)
        assert 0.93 <= clustered <= 0.97
        assert plain < clustered - 0.03


def test_p_values_are_those_of_published_tables() -> None:
    """Guards against a series that begins at the wrong term for odd or even degrees of freedom."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 29: 2.045, 30: 2.042}
    for freedom, t in table.items():
        assert two_sided_p(t, freedom) == pytest.approx(0.05, abs=4e-5)
        assert two_sided_p(-t, freedom) == two_sided_p(t, freedom)
        assert t_95(freedom) == pytest.approx(t, abs=0.004)
    # Between whole degrees, as Welch's intervals have them: never too narrow. By numerical integration of the density.
    for freedom, t in {1.2: 8.6488, 1.5: 6.0167, 2.5: 3.5747, 3.5: 2.9401}.items():
        assert t - 1e-3 <= t_95(freedom) <= 1.026 * t
    assert two_sided_p(9.925, 2) == pytest.approx(0.01, abs=2e-5) and two_sided_p(0.0, 7) == 1.0
    assert two_sided_p(1.959964) == pytest.approx(0.05, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from((-1.0, 0.0, 1.0)), st.integers(0, 5)), min_size=1, max_size=30))
def test_a_p_value_agrees_with_its_interval(pairs: list[tuple[float, int]]) -> None:
    """Guards against a change that the interval shows and the p-value does not."""
    differences, clusters = [d for d, _ in pairs], [c for _, c in pairs]
    low, high = paired_difference(differences, clusters) or (0.0, 0.0)
    p = paired_p(differences, clusters)
    assert p is not None and 0 <= p <= 1
    if abs(p - 0.05) > 0.001:
        assert (p > 0.05) == (low <= 0 <= high)


def test_holm_corrects_as_published() -> None:
    """Guards against Bonferroni's factor for all, and against a corrected value below that of a smaller one."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
