"""Differences with their intervals, and the length up to which a model holds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.intervals import (
    effective_context,
    independent_difference,
    paired_difference,
    wilson_interval,
)


def test_effective_context_needs_every_shorter_length_too() -> None:
    """Guards against a lucky long length, few samples, and a hole in the grid counted as reached."""

    def reached(threshold: float = 0.8, **right: tuple[int, int]) -> int | None:
        intervals = {int(length[1:]): wilson_interval(*counts) for length, counts in right.items()}
        return effective_context(intervals, threshold=threshold)

    assert reached(n1024=(40, 40), n2048=(39, 40), n4096=(30, 40)) == 2048
    assert reached(n4096=(40, 40), n1024=(40, 40), n2048=(20, 40)) == 1024
    assert reached(n1024=(8, 8)) is None, "8 of 8 says no more than 68 %"
    assert reached(n1024=(40, 40), n2048=(0, 0), n4096=(40, 40)) == 1024
    assert reached() is None
    assert reached(0.5, n1024=(30, 40)) == 1024


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
