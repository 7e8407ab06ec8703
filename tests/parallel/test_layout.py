"""Layouts and the masks between ranks, against places written out and a dense mask."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError
from longspan.kernels.attention.reference import dense_mask
from longspan.parallel.layout import Layout, local_indices, padded_length
from longspan.parallel.shards import SequenceShards


def borders_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("zigzag", [[0, 1, 6, 7], [2, 3, 4, 5]]),
        ("striped", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        # Causal work of place p is p + 1: 1+2+7+8 = 3+4+5+6.
        ("balanced", [[0, 1, 6, 7], [2, 3, 4, 5]]),
    ],
)
def test_eight_tokens_on_two_ranks(layout: Layout, expected: list[list[int]]) -> None:
    """Guards the definition of each layout, on places that can be counted by eye."""
    assert [sorted(local_indices(layout, 8, rank, 2).tolist()) for rank in range(2)] in (
        expected,
        expected[::-1],
    )


documents = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 0)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(get_args(Layout)),
    lengths=documents,
    world=st.sampled_from([1, 2, 3, 4, 8]),
    window=st.none() | st.integers(1, 9),
)
def test_every_place_once_equally_many_and_the_mask_of_the_whole(
    layout: Layout, lengths: list[int], world: int, window: int | None
) -> None:
    """Guards against dropped remainders, places twice, and bands that are not the whole mask's rows and columns."""
    shards = SequenceShards(layout, borders_of(lengths), world, window=window)
    ranks = [(rank,) for rank in range(world)]
    places: dict[tuple[int, ...], np.ndarray] = {rank: shards.indices(rank[0]) for rank in ranks}
    assert sorted(np.concatenate(list(places.values()))) == list(range(shards.num_padded))
    assert {len(mine) for mine in places.values()} == {shards.num_local}
    everyone = tuple(range(world))
    whole = np.concatenate(list(places.values()))
    order = shards.order(everyone)
    places[everyone] = whole if order is None else whole[order]
    document = np.searchsorted(shards.cu_seqlens, np.arange(shards.num_padded), side="right")
    pairs = list(itertools.product(ranks, ranks)) + [(everyone, everyone)]
    sees = np.zeros((world, world), dtype=np.int64)
    for q_ranks, k_ranks in pairs:
        q, k = places[q_ranks], places[k_ranks]
        bands = shards.bands(q_ranks, k_ranks, window=window)
        mask = dense_mask(bands, num_queries=len(q), num_keys=len(k), device=torch.device("cpu")).numpy()
        apart = q[:, None] - k[None, :]
        seen = (apart >= 0) & (document[q][:, None] == document[k][None, :])
        expected = seen if window is None else seen & (apart < window)
        assert (mask == expected).all()
        assert bands.num_pairs() == expected.sum()
        if len(q_ranks) == len(k_ranks) == 1:
            needed = shards.needed_rows(q_ranks[0], k_ranks[0], window=window)
            assert np.flatnonzero(expected.any(axis=0)).tolist() == needed.tolist()
            sees[q_ranks[0], k_ranks[0]] = len(needed)
    if layout != "striped":
        assert shards.needed_counts(window=window).tolist() == sees.tolist()
    steps = np.arange(world)
    reach = [int(max(steps * (sees[(place + steps) % world, place] > 0))) for place in steps]
    assert shards.reach(ranks, window=window) == reach


def test_positions_restart_in_every_document_and_in_the_padding() -> None:
    """Guards against positions counted from the start of the row or of the rank: 3 + 4 tokens, one of padding."""
    shards = SequenceShards("striped", [0, 3, 7], 2)
    assert shards.positions(0).tolist() == [0, 2, 1, 3]  # places 0 2 | 4 6
    assert shards.positions(1).tolist() == [1, 0, 2, 0]  # places 1 | 3 5 | 7 is padding


def test_documents_that_end_together_and_empty_ones_change_nothing() -> None:
    """Guards the search for a token's document against borders that stand twice."""
    with_empty = SequenceShards("zigzag", [0, 5, 5, 5, 12], 2)
    assert with_empty.cu_seqlens.tolist() == SequenceShards("zigzag", [0, 5, 12], 2).cu_seqlens.tolist()


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4000), min_size=1, max_size=60),
    world=st.sampled_from([2, 3, 4, 7, 8, 16]),
    window=st.none() | st.integers(1, 500),
)
def test_balanced_gives_equal_work_up_to_one_token_a_cut(
    lengths: list[int], world: int, window: int | None
) -> None:
    """Guards the necklace split: equal tokens, equal work, at most 2 * world cuts, whatever the documents."""
    shards = SequenceShards("balanced", borders_of(lengths), world, window=window)
    work = shards.work(window=window).sum(axis=1)
    # Each halving is exact up to the work of one token, of which there are log2(world) in a row; what fills the ranks
    # up is a document too.
    longest = max(max(lengths), -sum(lengths) % (2 * world))
    most_of_a_token = min(longest, window or longest)
    assert work.max() - work.min() <= 2 * most_of_a_token * (1 + np.log2(world))
    assert sum(len(runs) for runs in shards.runs) <= 3 * world


def test_one_document_is_one_band_between_any_two_zigzag_ranks() -> None:
    """Guards the joining of bands: three calls and two merges where one call does is what makes zigzag slow."""
    shards = SequenceShards("zigzag", [0, 64], 4)
    counts = [len(shards.bands((q,), (k,))) for q in range(4) for k in range(4)]
    assert counts == [1] * 16


def test_short_documents_make_zigzag_uneven_and_striped_and_balanced_even() -> None:
    """Guards the reason for `balanced`: one long document after many short ones."""
    borders = borders_of([64] * 32 + [2048])
    skew = {}
    for layout in get_args(Layout):
        work = SequenceShards(layout, borders, 8).work().sum(axis=1)
        skew[layout] = work.max() / work.mean()
    assert skew["zigzag"] > 1.5
    assert skew["striped"] < 1.02
    assert skew["balanced"] < 1.02


def test_reach_stops_where_no_document_crosses() -> None:
    """Guards the skipping of transfers: documents that end at rank borders need none, a causal row all but the last."""
    places = [(rank,) for rank in range(4)]
    assert SequenceShards("contiguous", [0, 4, 8, 12, 16], 4).reach(places) == [0, 0, 0, 0]
    assert SequenceShards("contiguous", [0, 16], 4).reach(places) == [3, 2, 1, 0]
    assert SequenceShards("contiguous", [0, 16], 4).reach(places, window=3) == [1, 1, 1, 0]
    assert SequenceShards("zigzag", [0, 16], 4).reach(places) == [3, 3, 3, 3]


@pytest.mark.parametrize("layout", get_args(Layout))
def test_lengths_below_the_world_are_padded(layout: Layout) -> None:
    """Guards against ranks without tokens or with fewer than others."""
    assert padded_length(layout, 3, 8) == (16 if layout == "zigzag" else 8)
    assert {len(local_indices(layout, 3, rank, 8)) for rank in range(8)} == {2 if layout == "zigzag" else 1}


def test_user_mistakes_are_named() -> None:
    """Guards the messages for a misspelt layout, a rank too many and borders of another row."""
    with pytest.raises(ArgumentError, match="zig-zag"):
        padded_length("zig-zag", 8, 2)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="rank 2 of 2"):
        local_indices("zigzag", 8, 2, 2)
    with pytest.raises(ArgumentError, match="do not fit"):
        local_indices("zigzag", 8, 0, 2, documents=[0, 9])
    with pytest.raises(ArgumentError, match="at least the token itself"):
        SequenceShards("balanced", [0, 8], 2, window=0)
    with pytest.raises(ArgumentError, match="tokens and ranks"):
        local_indices("zigzag", 0, 0, 2)
