"""Best-fit-decreasing against a plain one-piece-at-a-time version, and as a packing strategy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError
from longspan.data.plans.best_fit import best_fit_decreasing
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import PAD_DOCUMENT, plan_packing
from tests.data.made_stores import make_table


def one_at_a_time(tokens: list[int], capacity: int) -> list[int]:
    """The textbook: each piece, longest first, to the fullest bin that has room."""
    free: list[int] = []
    for length in sorted(tokens, reverse=True):
        fitting = [space for space in free if space >= length]
        space = min(fitting, default=capacity)
        if fitting:
            free.remove(space)
        free.append(space - length)
    return sorted(capacity - space for space in free)


def test_the_fullest_bin_that_has_room_takes_the_piece() -> None:
    """First fit would put the 2 beside the 6 and leave no room for the 4."""
    assert best_fit_decreasing(np.array([6, 3, 5, 4, 2]), 10).tolist() == [0, 1, 1, 0, 1]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_bins_are_filled_as_one_at_a_time(case: tuple[int, list[int]]) -> None:
    """Placing equal lengths together must not change how full the bins are."""
    capacity, tokens = case
    bins = best_fit_decreasing(np.array(tokens, np.int64), capacity)
    loads = np.bincount(bins, weights=tokens).astype(int).tolist() if tokens else []
    assert sorted(loads) == one_at_a_time(tokens, capacity)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(2, 12))
def test_no_document_that_fits_a_row_is_cut(tokens: list[int], length: int) -> None:
    """ProLong's packer cut documents that would have fitted whole; no token may be lost or repeated either."""
    spec = PackConfig(length=length, strategy="best_fit", remainder="pad", pad_id=0)
    table = make_table([("a", count) for count in tokens])
    plan = plan_packing(spec, table, np.arange(len(tokens), dtype=np.uint32), 0)
    seen: dict[int, list[tuple[int, int]]] = {}
    for document, start, count in zip(plan.span_document, plan.span_start, plan.span_tokens):
        if document != PAD_DOCUMENT:
            seen.setdefault(int(document), []).append((int(start), int(start + count)))
    for document, total in enumerate(tokens):
        pieces = sorted(seen[document])
        assert [piece[0] for piece in pieces] == list(range(0, total, length))
        assert pieces[-1][1] == total


def test_rows_that_must_be_full_are_refused() -> None:
    """Dropping rows that are not full would drop nearly everything, in silence."""
    with pytest.raises(ConfigError, match="remainder pad"):
        PackConfig.from_dict({"length": 8, "strategy": "best_fit"})
