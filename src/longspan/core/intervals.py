"""Confidence intervals of proportions and of their differences, and the context length they vouch for."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

Z_95 = 1.959963984540054
EFFECTIVE_THRESHOLD = 0.8
_T_95 = (12.7062, 4.3027, 3.1824, 2.7764)


def wilson_interval(correct: float, samples: float, *, z: float = Z_95) -> tuple[float, float] | None:
    """Return the score interval of Wilson (1927) for a proportion, 95 % by its default; None for no samples.

    Unlike mean +- 1.96 s.e. it stays inside 0..1 and is not empty at 0 or at 1: 8 of 8 gives (0.676, 1).
    """
    if samples == 0:
        return None
    share, z2 = correct / samples, z * z
    centre = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = z / (1 + z2 / samples) * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    # At 0 and at 1 rounding can put a bound just inside of the share itself.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def samples_needed(threshold: float = EFFECTIVE_THRESHOLD) -> int | None:
    """Return how many right answers, all of them, put the lower bound of Wilson's interval above `threshold`.

    None: no number does.

    >>> samples_needed(0.8)
    16
    """
    if threshold >= 1.0:
        return None
    # The bound of n of n is n / (n + z^2).
    return math.floor(threshold * Z_95 * Z_95 / (1.0 - threshold)) + 1


def clustered_interval(scores: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of scores in 0..1 that come in clusters, such as questions on one text.

    Wilson's with the effective number of samples that the variance between clusters leaves, by Student's t: as for
    surveys (Korn and Graubard 1998). Where a few clusters make up most of that variance, as near 0 and 1, it is not
    known well: t has fewer degrees of freedom then, which widens the interval at most to where each cluster is one
    sample (as it is where all scores are equal). Samples of a cluster count as no less alike than independent ones.

    It covers the mean in 93 to 98 % of draws from 20 clusters on for means of 0.2 to 0.8, and in 92 % or more from 5
    clusters on for means of up to 0.98 (benchmarks/eval.md); that of independent samples does so in as few as half.
    None: there are fewer than two clusters.
    """
    groups = _groups(scores, clusters)
    if len(groups) == len(scores):
        return score_interval(scores)
    if len(groups) < 2:
        return None
    mean, total = math.fsum(scores) / len(scores), len(scores)
    sums = _sums(groups, mean)
    single = total**2 / sum(len(group) ** 2 for group in groups)
    worst = wilson_interval(mean * single, single)
    independent = math.fsum((score - mean) ** 2 for score in scores) / (total * (total - 1))
    variance = max(_variance_of_sums(sums) / total**2, independent)
    if worst is None or variance <= 0.0:
        return worst
    samples = mean * (1.0 - mean) / variance
    near, far = (
        wilson_interval(mean * samples, samples, z=t_95(freedom)) or worst
        for freedom in (len(sums) - 1, _freedom(sums))
    )
    return min(near[0], max(far[0], worst[0])), max(near[1], min(far[1], worst[1]))


def _groups(values: Sequence[float], clusters: Iterable[Hashable]) -> list[list[float]]:
    """Return the values of each cluster."""
    groups: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    return list(groups.values())


def _sums(groups: Sequence[Sequence[float]], mean: float) -> list[float]:
    """Return the sum of each group's distances from the mean of all."""
    return [math.fsum(value - mean for value in group) for group in groups]


def _variance_of_sums(sums: Sequence[float]) -> float:
    """Return the variance of the sum of clusters' sums, which are 0 together."""
    return len(sums) / (len(sums) - 1) * math.fsum(each * each for each in sums)


def _freedom(sums: Sequence[float]) -> float:
    """Return the degrees of freedom of the variance of clusters' sums: one less than there are, or fewer.

    Those that match the variance of that variance (Satterthwaite 1946), by the excess kurtosis of the sums.
    """
    count, squares = len(sums), math.fsum(each * each for each in sums)
    if count < 4 or squares <= _ROUNDING**2:
        return count - 1
    kurtosis = count * math.fsum(each**4 for each in sums) / squares**2
    excess = (count - 1) / ((count - 2) * (count - 3)) * ((count + 1) * (kurtosis - 3) + 6)
    return max(1.0, 2 / (2 / (count - 1) + max(0.0, excess) / count))


def t_95(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t, from 4 degrees of freedom on by its expansion.

    Right to 0.004 at whole degrees; between the first ones up to 2.6 % too large.
    """
    if freedom <= len(_T_95):
        low = min(math.floor(freedom), len(_T_95) - 1)
        # Its logarithm is nearly linear in 1 / freedom.
        way = (1 / low - 1 / freedom) / (1 / low - 1 / (low + 1))
        return math.exp((1 - way) * math.log(_T_95[low - 1]) + way * math.log(_T_95[low]))
    z = Z_95
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


class Effective(NamedTuple):
    """The longest length up to which a model holds, and what ended it."""

    length: int | None
    """The longest length at which, as at every shorter one, the lower 95 % bound is above the threshold."""
    ended: int | None = None
    """The first length that is not shown to hold; None: all hold, or there is none."""
    why: Literal["", "below", "few samples", "unscored"] = ""
    """What ended it; `few samples`: too few to show it even if all were right, and not so bad as to rule it out."""
    samples: int = 0
    """Scored samples at `ended`."""
    needed: int | None = None
    """Samples of a length that can show it."""

    @property
    def text(self) -> str:
        """The length, or what stands in its place: `< 1,024`, `not shown`, `not measured`."""
        if self.length is not None:
            return f"{self.length:,}"
        if self.ended is None or self.why == "unscored":
            return "not measured"
        return "not shown" if self.why == "few samples" else f"< {self.ended:,}"

    @property
    def note(self) -> str:
        """What has to be said beside the length; empty where it ended because the model did not hold."""
        if self.why == "unscored":
            return f"nothing is scored at {self.ended:,} tokens"
        if self.why != "few samples":
            return ""
        needed = "no number is enough" if self.needed is None else f"at least {self.needed} are needed"
        return f"{self.samples} sample{'' if self.samples == 1 else 's'} at {self.ended:,} tokens, {needed}"


Measured = tuple[tuple[float, float] | None, int]
"""The 95 % interval of the mean score at a length, None without a scored sample, and the number of these."""


_ROUNDING = 1e-9


def effective_context(
    by_length: Mapping[int, Measured], *, threshold: float = EFFECTIVE_THRESHOLD
) -> Effective:
    """Return the longest length at which, as at every shorter one, the lower 95 % bound exceeds `threshold`.

    `by_length` is pooled over depths, subtasks and questions. A length without a score ends the search.

    >>> rows = {n: (wilson_interval(right, 40), 40) for n, right in {1024: 40, 2048: 39, 4096: 30}.items()}
    >>> effective_context(rows).length
    2048
    """
    reached, needed = None, samples_needed(threshold)
    for length, (interval, samples) in sorted(by_length.items()):
        if interval is None:
            return Effective(reached, length, "unscored", 0, needed)
        if interval[0] <= threshold:
            # Where all answers are right the upper bound is 1, but for rounding.
            possible = interval[1] >= threshold - _ROUNDING
            undecided = (needed is None or samples < needed) and possible
            return Effective(reached, length, "few samples" if undecided else "below", samples, needed)
        reached = length
    return Effective(reached, needed=needed)


class _Estimate(NamedTuple):
    """A mean with its standard error, and the degrees of freedom of the latter; None: as many as one likes."""

    mean: float
    error: float
    freedom: int | None


def _paired_estimates(differences: Sequence[float], clusters: Sequence[Hashable] | None) -> list[_Estimate]:
    """Return the adjusted estimate of matched pairs, then that of clusters where questions come in such."""
    count = len(differences) + 2.0
    mean = math.fsum(differences) / count
    variance = (math.fsum(d * d for d in differences) + 1.0) / count - mean * mean
    estimates = [_Estimate(mean, math.sqrt(max(variance, 0.0) / count), None)]
    groups = _groups(differences, clusters or range(len(differences)))
    if 1 < len(groups) < len(differences):
        centre = math.fsum(differences) / len(differences)
        sums = _sums(groups, centre)
        error = math.sqrt(_variance_of_sums(sums)) / len(differences)
        # Whole degrees, for which the p-value is exact.
        estimates.append(_Estimate(centre, error, math.ceil(_freedom(sums))))
    return estimates


def paired_difference(
    differences: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of `differences`, each -1..1: the same question before and after.

    Adjusted Wald interval for matched pairs (Agresti and Min 2005): half a pair is added to each outcome of
    two right-or-wrong answers, differences 0, 0, 1 and -1, so it is not empty when no answer changed. Where questions
    come in clusters it is mean +- t s.e. of clusters, and never narrower; t has fewer degrees of freedom where a few
    clusters make up most of what changed.
    """
    if not differences:
        return None
    ends = [
        (mean - wide, mean + wide)
        for mean, error, freedom in _paired_estimates(differences, clusters)
        for wide in [(Z_95 if freedom is None else t_95(freedom)) * error]
    ]
    return max(-1.0, min(low for low, _ in ends)), min(1.0, max(high for _, high in ends))


def paired_p(differences: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float | None:
    """Return the two-sided p-value of no difference that belongs to `paired_difference`; None without pairs."""
    if not differences:
        return None
    return max(
        1.0 if mean == 0 else 0.0 if error == 0 else two_sided_p(mean / error, freedom)
        for mean, error, freedom in _paired_estimates(differences, clusters)
    )


class Ratio(NamedTuple):
    """A ratio of two sums with its 95 % interval and the two-sided p-value of a ratio of 0."""

    value: float
    interval: tuple[float, float]
    p: float


def clustered_ratio(parts: Sequence[tuple[float, float]], clusters: Sequence[Hashable]) -> Ratio | None:
    """Return the sum of numerators over that of denominators, parts of one cluster depending on each other.

    By linearization, with Student's t over clusters (Cochran 1977, section 6.4). None: fewer than two clusters.
    """
    whole = math.fsum(size for _, size in parts)
    groups: dict[Hashable, list[tuple[float, float]]] = {}
    for part, cluster in zip(parts, clusters, strict=True):
        groups.setdefault(cluster, []).append(part)
    if len(groups) < 2 or whole <= 0:
        return None
    value = math.fsum(number for number, _ in parts) / whole
    squares = math.fsum(
        math.fsum(number - value * size for number, size in group) ** 2 for group in groups.values()
    )
    error = math.sqrt(len(groups) / (len(groups) - 1) * squares) / whole
    half = t_95(len(groups) - 1) * error
    p = 1.0 if value == 0 else 0.0 if error == 0 else two_sided_p(value / error, len(groups) - 1)
    return Ratio(value, (value - half, value + half), p)


def two_sided_p(t: float, freedom: int | None = None) -> float:
    """Return how often Student's t is farther from 0 than `t`, exactly; `freedom` None: the normal distribution.

    Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    if freedom is None:
        return math.erfc(abs(t) / math.sqrt(2.0))
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    term, series = (math.cos(angle), 0.0) if freedom % 2 else (1.0, 0.0)
    for order in range(freedom % 2, freedom - 1, 2):
        series += term
        term *= square * (order + 1) / (order + 2)
    inside = 2.0 / math.pi * (angle + sine * series) if freedom % 2 else sine * series
    return min(1.0, max(0.0, 1.0 - inside))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for how many there are (Holm 1979): each as it would have to be beside the others.

    >>> holm([0.01, 0.04, 0.03, 0.005])
    [0.03, 0.06, 0.06, 0.02]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        corrected[place] = min(1.0, largest)
    return corrected


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
