"""Confidence intervals of proportions and of their differences, and the context length they vouch for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Z_95 = 1.959963984540054
EFFECTIVE_THRESHOLD = 0.8


def wilson_interval(correct: float, samples: int) -> tuple[float, float] | None:
    """Return the 95 % score interval of Wilson (1927) for a proportion; None for no samples.

    Unlike mean +- 1.96 s.e. it stays inside 0..1 and is not empty at 0 or at 1: 8 of 8 gives (0.676, 1).
    """
    if samples == 0:
        return None
    share, z2 = correct / samples, Z_95 * Z_95
    centre = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = Z_95 / (1 + z2 / samples) * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    # At 0 and at 1 rounding can put a bound just inside of the share itself.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def effective_context(
    intervals: Mapping[int, tuple[float, float] | None], *, threshold: float = EFFECTIVE_THRESHOLD
) -> int | None:
    """Return the longest length at which, as at every shorter one, the lower 95 % bound exceeds `threshold`.

    `intervals` holds (low, high) of the mean score by length in tokens, pooled over depths, subtasks and
    questions; a length without one (nothing scored) ends the way. None: not even the shortest length holds.

    >>> effective_context({n: wilson_interval(right, 40) for n, right in {1024: 40, 2048: 39, 4096: 30}.items()})
    2048
    """
    reached = None
    for length, interval in sorted(intervals.items()):
        if interval is None or interval[0] <= threshold:
            break
        reached = length
    return reached


def paired_difference(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of `differences`, each -1..1: the same question before and after.

    Adjusted Wald interval for matched pairs (Agresti and Min 2005): half a pair is added to each outcome of
    two right-or-wrong answers, differences 0, 0, 1 and -1, so it is not empty when no answer changed.
    """
    if not differences:
        return None
    count = len(differences) + 2.0
    mean = math.fsum(differences) / count
    variance = (math.fsum(d * d for d in differences) + 1.0) / count - mean * mean
    half = Z_95 * math.sqrt(max(variance, 0.0) / count)
    return max(-1.0, mean - half), min(1.0, mean + half)


def independent_difference(before: tuple[float, int], after: tuple[float, int]) -> tuple[float, float] | None:
    """Return the 95 % interval of after - before for (correct, scored) of different samples.

    Hybrid score interval (Newcombe 1998, method 10). None where one side has no sample.
    """
    old, new = wilson_interval(*before), wilson_interval(*after)
    if old is None or new is None:
        return None
    first, second = before[0] / before[1], after[0] / after[1]
    difference = second - first
    low = difference - math.hypot(second - new[0], old[1] - first)
    high = difference + math.hypot(new[1] - second, first - old[0])
    return low, high


def score_interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of scores in 0..1; None for no scores.

    Wilson's for right-or-wrong scores. For graded ones mean +- 1.96 s.e., kept inside 0..1; a single one has
    no spread to go by and gets Wilson's, which is as wide as scores in 0..1 with that mean can make it.
    """
    count = len(scores)
    if count < 2 or all(score in (0.0, 1.0) for score in scores):
        return wilson_interval(math.fsum(scores), count)
    mean = math.fsum(scores) / count
    variance = math.fsum((score - mean) ** 2 for score in scores) / (count - 1)
    half = Z_95 * math.sqrt(variance / count)
    return max(0.0, mean - half), min(1.0, mean + half)
