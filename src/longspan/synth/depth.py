"""Where in a context the evidence lies: spread evenly, by choosing among places what fills the emptiest depths.

Depth 0 is the beginning of a context and 1 its end, in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BINS = 10
_GOLDEN = (math.sqrt(5) - 1) / 2


def stratified(count: int, number: int, start: float) -> NDArray[np.float64]:
    """Return `count` depths for sample `number`, one in each of `count` equal strata, in order.

    Their place inside a stratum runs through the golden-ratio sequence with the number of the sample, so the
    depths of many samples are even too, a single one a sample included. `start` in 0..1 shifts the sequence.
    """
    inside = (start + number * _GOLDEN) % 1.0
    return (np.arange(count) + inside) / max(1, count)


def bin_of(depth: float, bins: int = BINS) -> int:
    """Return the bin of a depth; 1 is in the last one."""
    return min(bins - 1, max(0, int(depth * bins)))


class DepthBalance:
    """Counts evidence by depth over all samples so far, and says which next step keeps it even."""

    def __init__(self, bins: int = BINS) -> None:
        self.counts = np.zeros(bins, dtype=np.int64)

    def add(self, depths: Sequence[float]) -> None:
        """Count the evidence of a sample."""
        for depth in depths:
            self.counts[bin_of(depth, len(self.counts))] += 1

    def cost(self, depths: Sequence[float]) -> float:
        """Return how much more uneven these depths would make it, for each of them; lower is better."""
        more = np.bincount([bin_of(depth, len(self.counts)) for depth in depths], minlength=len(self.counts))
        # The growth of the sum of squared counts.
        return float(np.sum(more * (2 * self.counts + more))) / max(1, len(depths))

    def best(self, places: Sequence[Sequence[float]]) -> int:
        """Return the number of the place whose depths keep it most even, the first of equals."""
        return int(np.argmin([self.cost(depths) for depths in places]))

    def pick(self, depths: Sequence[Sequence[float]], limit: int) -> list[int]:
        """Return which `limit` questions, given the depths of each, fill the emptiest bins; in their order."""
        if limit >= len(depths):
            return list(range(len(depths)))
        counts = DepthBalance(len(self.counts))
        counts.counts = self.counts.copy()
        left = list(range(len(depths)))
        picked: list[int] = []
        while left and len(picked) < limit:
            choice = min(left, key=lambda index: counts.cost(depths[index]))
            left.remove(choice)
            picked.append(choice)
            counts.add(depths[choice])
        return sorted(picked)
