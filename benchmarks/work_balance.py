"""How evenly a layout spreads attention work: 1 is perfect, 2 means that the step takes twice as long as it could.

total   the rank with most work / the mean rank        what all-gather attention waits for
ring    sum over steps of the busiest rank / of the mean   what a ring waits for, rank by rank at every step
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from longspan.parallel.shards import SequenceShards

__all__ = ["Balance", "balance_of"]


class Balance(NamedTuple):
    """Visible (query, key) pairs; ratios of sums, so rows can be added up."""

    mean: float
    """Pairs of the mean rank."""
    busiest: float
    """Pairs of the rank with most."""
    ring: float
    """Sum over the steps of a ring of the pairs of the rank with most at that step."""

    @property
    def total_ratio(self) -> float:
        """Return busiest / mean."""
        return self.busiest / self.mean

    @property
    def ring_ratio(self) -> float:
        """Return ring / mean."""
        return self.ring / self.mean

    def plus(self, other: Balance) -> Balance:
        """Return both sequences together, one after the other."""
        return Balance(self.mean + other.mean, self.busiest + other.busiest, self.ring + other.ring)


def balance_of(shards: SequenceShards, *, window: int | None = None) -> Balance:
    """Return the balance of one sequence; costs world^2 band tables."""
    work = shards.work(window=window)
    ranks = np.arange(shards.world)
    # At step t rank r holds the keys of rank r - t.
    steps = [int(work[ranks, (ranks - step) % shards.world].max()) for step in ranks]
    of_rank = work.sum(axis=1)
    return Balance(float(of_rank.mean()), float(of_rank.max()), float(sum(steps)))
