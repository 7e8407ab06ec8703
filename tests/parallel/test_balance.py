"""Balance figures of layouts, on sequences small enough to count by hand."""

from __future__ import annotations

import pytest
from benchmarks.work_balance import balance_of

from longspan.parallel.shards import SequenceShards


def test_contiguous_by_hand():
    """8 causal tokens on 2 ranks: 10 and 26 pairs. Steps of the ring: own blocks 10 and 10, then 0 and 16."""
    balance = balance_of(SequenceShards("contiguous", [0, 8], 2))
    assert balance == (18.0, 26.0, 26.0)
    assert balance.total_ratio == pytest.approx(26 / 18)


def test_a_total_that_is_even_can_be_uneven_at_every_step():
    """Zigzag deals work by one long document; with others, ranks may be even in total and not at a step.

    Rank 0 holds tokens 0 1 6 7, rank 1 holds 2 3 4 5, documents are 0..3 and 4..7.
    """
    balance = balance_of(SequenceShards("zigzag", [0, 4, 8], 2))
    assert balance.total_ratio == 1.0
    # Own blocks: 3 + 3 and 3 + 3 pairs. Visitors: 6 7 see 4 5, 2 3 see 0 1: four pairs each.
    assert balance.ring_ratio == 1.0
    balance = balance_of(SequenceShards("zigzag", [0, 2, 8], 2))
    # Rank 0: 3 + 3, then 6 7 see 2 3 4 5. Rank 1: 2 3 4 5 see each other, 10 pairs, then nothing.
    assert balance == (12.0, 14.0, 10.0 + 8.0)


def test_rows_add_up():
    """Ratios are of sums: a short row must not weigh as much as a long one."""
    one = balance_of(SequenceShards("contiguous", [0, 8], 2))
    assert one.plus(one).ring_ratio == one.ring_ratio
