"""The closed forms of communication equal what the schedules really send, to the byte."""

from __future__ import annotations

import pytest
from benchmarks.parallel_count import Case, count, needed_rows

from longspan.core.errors import ArgumentError
from longspan.parallel.schedules import all_gather
from longspan.parallel.shards import SequenceShards
from longspan.plan.communication import SEND_BY_NEED, AttentionShape, bytes_sent, kv_heads_of_rank

ONE = (0, 48)
PACKED = (0, 5, 9, 30, 33, 48)
SHORT = tuple(range(0, 49, 4))


def cases_of(world: int) -> list[Case]:
    cases = []
    for cu_seqlens, window in ((ONE, None), (PACKED, None), (SHORT, None), (ONE, 7), (PACKED, 3)):
        for schedule, layout in (
            ("ring", "zigzag"),
            ("ring", "contiguous"),
            ("ring", "balanced"),
            ("striped", "striped"),
            ("dist_flash", "contiguous"),
            ("all_gather", "zigzag"),
            ("all_gather", "balanced"),
        ):
            cases.append(Case(schedule, layout, world, 1, 4, 2, cu_seqlens, window))
        # Heads that divide, that travel in copies, and that are shared unevenly.
        for heads, kv_heads in ((4, 4), (8, 2), (4, 1)) if world == 4 else ((3, 3), (6, 2), (12, 4)):
            cases.append(Case("ulysses", "contiguous", 1, world, heads, kv_heads, cu_seqlens, window))
        if world == 4:
            for layout in ("zigzag", "striped"):
                cases.append(Case("usp", layout, 2, 2, 4, 2, cu_seqlens, window))
    cases.append(Case("ring", "zigzag", world, 1, 4, 2, (0, 41), None, "bfloat16"))
    cases.append(Case("dist_flash", "contiguous", world, 1, 4, 2, (0, 41), None, "bfloat16"))
    cases.append(Case("all_gather", "balanced", world, 1, 4, 2, (0, 41), None, "bfloat16"))
    cases.append(Case("ulysses", "contiguous", 1, world, 12, 1, (0, 41), None, "bfloat16"))
    cases.append(Case("ring", "zigzag", world, 1, 4, 2, ONE, None, "float64"))
    return cases


@pytest.mark.parametrize("world", [3, 4])
def test_closed_forms_equal_counted_bytes(world):
    """A message too many (or one forgotten in the formula) on any rank, in either direction, under any mask."""
    cases = cases_of(world)
    for case, of_ranks in zip(cases, count(cases, world)):
        shards = SequenceShards(case.layout, case.cu_seqlens, world, window=case.window)
        element_bytes = {"bfloat16": 2, "float32": 4, "float64": 8}[case.dtype]
        shape = AttentionShape(shards.num_local, case.heads, case.kv_heads, case.head_dim, element_bytes)
        degrees = {"ring_degree": case.ring, "ulysses_degree": case.ulysses}
        needed = needed_rows(shards, case.window)
        for rank, counted in enumerate(of_ranks):
            assert bytes_sent(case.schedule, shape, **degrees, rank=rank, needed=needed) == counted, (
                case,
                rank,
            )
            usual = case.layout != "contiguous" or case.schedule in ("dist_flash", "ulysses")
            if case.cu_seqlens == ONE and case.window is None and usual and case.layout != "balanced":
                assert bytes_sent(case.schedule, shape, **degrees, rank=rank) == counted, (case, rank)


def test_one_document_by_hand():
    """The table of the module, in numbers that fit a head: 10 tokens a rank, 4 heads, 2 key/value heads of 8."""
    shape = AttentionShape(10, 4, 2, 8)
    block = 2 * 10 * 2 * 8
    assert bytes_sent("none", shape) == (0, 0)
    assert bytes_sent("ring", shape, ring_degree=3) == (2 * block * 2, 2 * block * (2 + 4))
    assert bytes_sent("all_gather", shape, ring_degree=3) == bytes_sent("ring", shape, ring_degree=3)
    traded = (2 * 4 + 2 * 2) * 10 * 8 * 2 // 2
    assert bytes_sent("ulysses", shape, ulysses_degree=2) == (traded, traded)
    # Two places of two ranks: one block of 20 tokens and one head goes on.
    inner = bytes_sent("ring", AttentionShape(20, 2, 1, 8), ring_degree=2)
    assert bytes_sent("usp", shape, ring_degree=2, ulysses_degree=2) == (traded + inner[0], traded + inner[1])


@pytest.mark.parametrize(("degree", "copies"), [(4, 8), (8, 8), (16, 16), (32, 32)])
def test_key_heads_are_copied_only_as_far_as_needed(degree, copies):
    """8 key/value heads on 16 ranks travel twice each, not four times as 32 query heads would suggest."""
    assert sum(kv_heads_of_rank(32, 8, degree, rank) for rank in range(degree)) == copies


def test_heads_that_do_not_divide_are_refused_by_name():
    """A planner that says 'possible' where the schedule then stops."""
    with pytest.raises(ArgumentError, match="num_heads 6, num_kv_heads 2, ulysses degree 4"):
        bytes_sent("ulysses", AttentionShape(8, 6, 2, 8), ulysses_degree=4)
    with pytest.raises(ArgumentError, match="tree"):
        bytes_sent("tree", AttentionShape(8, 6, 2, 8))


def test_sending_by_need_starts_where_the_schedule_starts_it():
    """The planner cannot import the schedule, so the threshold is written twice."""
    assert SEND_BY_NEED == all_gather.WORTHWHILE
