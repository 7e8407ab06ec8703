"""Which tokens of a sequence each rank holds.

    contiguous   rank r holds the r-th of `world` equal pieces
    zigzag       of 2*world pieces, r and its mirror image 2*world-1-r: equal causal work in one document
    striped      every world-th token, from r: nearly equal work at every step of a ring, whatever the documents
    balanced     a few runs, cut where the document table makes tokens and attention work equal at once

Every rank holds equally many tokens: a length that does not divide is padded at its end, and the padding is
a document of its own. Inputs, labels, positions and masks are all indexed by `local_indices`.

`balanced` is a necklace split: on a circle of tokens, windows of a share p of the tokens do on average a share
p of the work, and moving a window by one token changes its work by little, so one of them does exactly p (up
to one token's work). Halving the ranks this way, again and again, needs at most 2*world cuts in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError

__all__ = [
    "LAYOUTS",
    "Layout",
    "StridedRun",
    "local_indices",
    "local_runs",
    "padded_borders",
    "padded_length",
]

Layout = Literal["contiguous", "zigzag", "striped", "balanced"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

IntColumn = Sequence[int] | NDArray[np.integer]

SEARCH_POINTS = 4096
"""Windows looked at on the way round a circle before the exact place is found by bisection."""


class StridedRun(NamedTuple):
    """`length` tokens of the sequence: start, start + stride, start + 2*stride, ..."""

    start: int
    length: int
    stride: int = 1


def padded_length(layout: Layout, total: int, world: int) -> int:
    """Return the number of tokens, padding included, that `layout` spreads over `world` ranks.

    Raises:
        ArgumentError: an unknown layout, no token or no rank.
    """
    if layout not in LAYOUTS:
        raise ArgumentError("unknown sequence layout", found=layout, allowed=", ".join(LAYOUTS))
    if total < 1 or world < 1:
        raise ArgumentError(
            "a layout needs tokens and ranks", found=f"{total} tokens, {world} ranks", allowed=">= 1"
        )
    unit = 2 * world if layout == "zigzag" and world > 1 else world
    return -(-total // unit) * unit


def padded_borders(cu_seqlens: IntColumn, padded: int) -> NDArray[np.int64]:
    """Return document borders up to `padded` tokens: what is past the last document is one of its own."""
    borders = np.asarray(cu_seqlens, dtype=np.int64).reshape(-1)
    return borders if borders[-1] >= padded else np.append(borders, padded)


def local_indices(
    layout: Layout,
    total: int,
    rank: int,
    world: int,
    documents: IntColumn | None = None,
    window: int | None = None,
) -> NDArray[np.int64]:
    """Return the places in the padded sequence of the tokens that `rank` holds, ascending.

    Args:
        layout: see the module.
        total: tokens of the sequence; places from `total` on are padding.
        rank, world: rank and size of the context-parallel group.
        documents: cu_seqlens of the tokens, [documents + 1]; None = one document. Only `balanced` looks.
        window: sliding window of the attention, in tokens; None = none. Only `balanced` looks.

    Returns:
        int64 [padded_length(layout, total, world) / world].

    Raises:
        ArgumentError: an unknown layout, a rank outside the world, or borders that do not fit `total`.
    """
    if not 0 <= rank < world:
        raise ArgumentError("no such rank", found=f"rank {rank} of {world}", allowed=f"0..{world - 1}")
    runs = local_runs(layout, total, world, documents, window)[rank]
    return np.concatenate(
        [np.arange(start, start + length * stride, stride, dtype=np.int64) for start, length, stride in runs]
    )


def local_runs(
    layout: Layout,
    total: int,
    world: int,
    documents: IntColumn | None = None,
    window: int | None = None,
    first_positions: IntColumn | None = None,
) -> list[list[StridedRun]]:
    """Return the runs of every rank, ascending; `local_indices` spells them out. See there for the arguments.

    `first_positions` are those of the documents' first tokens, [documents], where they go on from what stands
    elsewhere; None = 0. Only `balanced` looks.
    """
    padded = padded_length(layout, total, world)
    borders = np.asarray([0, total] if documents is None else documents, dtype=np.int64).reshape(-1)
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != total or (np.diff(borders) < 0).any():
        raise ArgumentError(
            "the document borders do not fit the sequence",
            found=borders[:8].tolist(),
            allowed=f"[0, ..., {total}], never going back",
        )
    share = padded // world
    if world == 1:
        return [[StridedRun(0, padded)]]
    if layout == "contiguous":
        return [[StridedRun(rank * share, share)] for rank in range(world)]
    if layout == "zigzag":
        half = share // 2
        mirror = 2 * world - 1
        pieces = [[rank * half, (mirror - rank) * half] for rank in range(world)]
        # The two middle pieces touch: they are one run.
        return [_joined([StridedRun(start, half) for start in starts]) for starts in pieces]
    if layout == "striped":
        return [[StridedRun(rank, share, world)] for rank in range(world)]
    work = _Work(padded_borders(borders, padded), window, first_positions)
    ranks: list[list[StridedRun]] = [[] for _ in range(world)]
    _split(work, [StridedRun(0, padded)], range(world), share, ranks)
    return ranks


class _Work:
    """Attention work of a prefix of the sequence: visible (query, key) pairs of its queries.

    A query at position p of its document sees min(p + 1, window) keys.
    """

    def __init__(
        self, borders: NDArray[np.int64], window: int | None, first_positions: IntColumn | None
    ) -> None:
        self._borders = borders
        self._first = np.zeros(len(borders) - 1, dtype=np.int64)
        if first_positions is not None:
            self._first[: len(first_positions)] = first_positions
        # More than any position: as many keys as there are tokens in the row.
        self._window = int(borders[-1]) if window is None else window
        everything = np.arange(len(borders) - 1)
        self._before = np.concatenate([[0], np.cumsum(self._document(everything, np.diff(borders)))])

    def _document(self, documents: NDArray[np.int64], queries: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the pairs of the first so many `queries` of each of `documents`."""
        first = self._first[documents]
        return self._ramp(first + queries) - self._ramp(first)

    def _ramp(self, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the pairs of so many queries from position 0 on."""
        ramp = np.minimum(queries, self._window)
        return ramp * (ramp + 1) // 2 + (queries - ramp) * self._window

    def up_to(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the pairs of all queries before each of `places`."""
        index = np.searchsorted(self._borders, places, side="right") - 1
        index = np.minimum(index, len(self._borders) - 2)
        return self._before[index] + self._document(index, places - self._borders[index])


class _Chain:
    """Runs laid end to end, and the work up to any point of the chain."""

    def __init__(self, work: _Work, runs: list[StridedRun]) -> None:
        self.runs, self._work = runs, work
        starts = np.array([run.start for run in runs], dtype=np.int64)
        lengths = np.array([run.length for run in runs], dtype=np.int64)
        self._starts = starts
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        of_runs = work.up_to(starts + lengths) - work.up_to(starts)
        self._before = np.concatenate([[0], np.cumsum(of_runs)])
        self.length, self.total = int(self._offsets[-1]), int(self._before[-1])

    def up_to(self, points: NDArray[np.int64]) -> NDArray[np.int64]:
        index = np.minimum(np.searchsorted(self._offsets, points, side="right") - 1, len(self.runs) - 1)
        starts = self._starts[index]
        inside = self._work.up_to(starts + points - self._offsets[index]) - self._work.up_to(starts)
        return self._before[index] + inside

    def window(self, starts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Return the work of the `size` tokens from each of `starts`, going round at the end."""
        ends = starts + size
        beyond = ends > self.length
        work = self.up_to(np.minimum(ends, self.length)) - self.up_to(starts)
        return work + np.where(beyond, self.up_to(np.where(beyond, ends - self.length, 0)), 0)

    def cut(self, start: int, end: int) -> list[StridedRun]:
        """Return the tokens from point `start` to point `end` of the chain as runs."""
        out = []
        for run, offset in zip(self.runs, self._offsets.tolist()):
            first, last = max(start - offset, 0), min(end - offset, run.length)
            if first < last:
                out.append(StridedRun(run.start + first, last - first))
        return out


def _split(
    work: _Work, runs: list[StridedRun], ranks: range, share: int, out: list[list[StridedRun]]
) -> None:
    """Deal `runs` to `ranks`, `share` tokens and equal work to each, by halving the ranks."""
    if len(ranks) == 1:
        out[ranks[0]] = _joined(runs)
        return
    chain = _Chain(work, runs)
    first = len(ranks) // 2
    size = share * first
    start = _fair_window(chain, size, chain.total * first / len(ranks))
    end = start + size
    if end <= chain.length:
        inside = chain.cut(start, end)
        outside = chain.cut(0, start) + chain.cut(end, chain.length)
    else:
        inside = chain.cut(0, end - chain.length) + chain.cut(start, chain.length)
        outside = chain.cut(end - chain.length, start)
    # The part with the earliest token goes to the lower ranks, so that ranks follow the sequence.
    parts = [(inside, first), (outside, len(ranks) - first)]
    if outside and inside and outside[0].start < inside[0].start and 2 * first == len(ranks):
        parts.reverse()
    lower, upper = parts
    _split(work, lower[0], ranks[: lower[1]], share, out)
    _split(work, upper[0], ranks[lower[1] :], share, out)


def _fair_window(chain: _Chain, size: int, target: float) -> int:
    """Return the start of a window of `size` tokens whose work is as near to `target` as one token allows."""
    starts = np.unique(np.linspace(0, chain.length - 1, min(chain.length, SEARCH_POINTS)).astype(np.int64))
    excess = chain.window(starts, size) - target
    best = int(starts[np.abs(excess).argmin()])
    if len(starts) == chain.length:
        return best
    turns = np.flatnonzero(np.sign(excess[:-1]) != np.sign(excess[1:]))
    if not len(turns):
        return best
    low, high = int(starts[turns[0]]), int(starts[turns[0] + 1])
    sign = np.sign(excess[turns[0]])
    while high - low > 1:
        middle = (low + high) // 2
        value = float(chain.window(np.array([middle]), size)[0]) - target
        low, high = (middle, high) if np.sign(value) == sign else (low, middle)
    near = np.array([low, high, best])
    return int(near[np.abs(chain.window(near, size) - target).argmin()])


def _joined(runs: list[StridedRun]) -> list[StridedRun]:
    """Return ascending runs with those that touch made one."""
    out: list[StridedRun] = []
    for run in sorted(runs):
        if out and out[-1].start + out[-1].length == run.start:
            out[-1] = StridedRun(out[-1].start, out[-1].length + run.length)
        else:
            out.append(run)
    return out
