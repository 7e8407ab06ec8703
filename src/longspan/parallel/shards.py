"""A sequence spread over ranks: who holds what, and who sees whom between any two sets of ranks.

Masks never travel. Every rank knows the document table and the layout, so it can work out the bands between
the queries of some ranks and the keys of others by itself:

    ring          bands((r,), (s,))           my queries, the visiting keys
    all-gather    bands((r,), everyone)       my queries, all keys
    ulysses       bands(everyone, everyone)   all queries and keys, some heads
    usp           bands(group, other group)

Tokens of several ranks are taken in the order of their places in the sequence, which joins what the layout
cut into long runs again; `order` is the permutation from rank after rank to that order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError
from longspan.kernels.attention.bands import Bands, Places, cut_documents, matches
from longspan.parallel.layout import IntColumn, Layout, local_runs, padded_borders, padded_length

__all__ = ["Ranks", "SequenceShards"]

Ranks = tuple[int, ...]
"""Ranks of the group that shares the sequence, taken together."""


class SequenceShards:
    """One packed sequence under one layout, as every rank of the group knows it.

    Args:
        layout: see `parallel.layout`.
        cu_seqlens: document borders, [documents + 1], from 0 to the number of tokens.
        world: ranks that share the sequence.
        window: sliding window that `balanced` balances for; masks take theirs by call.
        first_positions: see `parallel.layout.local_runs`.

    Raises:
        ArgumentError: an unknown layout, borders that do not fit, or a window below 1.
    """

    def __init__(
        self,
        layout: Layout,
        cu_seqlens: IntColumn,
        world: int,
        *,
        window: int | None = None,
        first_positions: IntColumn | None = None,
    ) -> None:
        _check_window(window)
        borders = np.asarray(cu_seqlens, dtype=np.int64).reshape(-1)
        if not len(borders):
            raise ArgumentError("a sequence needs document borders", found="none", allowed="[0, ..., tokens]")
        self.layout, self.world = layout, world
        self.num_tokens = int(borders[-1])
        self.num_padded = padded_length(layout, self.num_tokens, world)
        self.num_local = self.num_padded // world
        self.runs = local_runs(layout, self.num_tokens, world, borders, window, first_positions)
        borders = padded_borders(borders, self.num_padded)
        self.cu_seqlens = borders[np.concatenate([[True], np.diff(borders) > 0])]
        self._longest = int(np.diff(self.cu_seqlens).max())
        self._segments: dict[Ranks, _Segments] = {}
        self._order: dict[Ranks, NDArray[np.int64] | None] = {}
        self._bands: dict[tuple[Ranks, Ranks, int | None], Bands] = {}
        self._reach: dict[tuple[tuple[Ranks, ...], int | None], list[int]] = {}
        self._cuts: dict[int, SequenceShards] = {}

    def cut(self, attention_chunk: int | None) -> SequenceShards:
        """Return the same tokens on the same ranks, with documents cut at multiples of so many; None = uncut."""
        if attention_chunk is None or attention_chunk >= self._longest:
            return self
        if attention_chunk not in self._cuts:
            found = copy.copy(self)
            found._longest = attention_chunk
            found._segments, found._bands, found._reach, found._cuts = {}, {}, {}, {}
            found._cut_documents(attention_chunk)
            self._cuts[attention_chunk] = found
        return self._cuts[attention_chunk]

    def _cut_documents(self, attention_chunk: int) -> None:
        self.cu_seqlens = cut_documents(self.cu_seqlens, attention_chunk)

    def state_borders(self) -> NDArray[np.int64]:
        """Return where layers with a state start anew in the padded sequence, [documents + 1]."""
        return self.cu_seqlens

    def __repr__(self) -> str:
        return f"SequenceShards({self.layout}, {self.num_tokens} tokens over {self.world} ranks)"

    def indices(self, rank: int) -> NDArray[np.int64]:
        """Return the places of the rank's tokens in the padded sequence, ascending: int64 [num_local]."""
        return np.concatenate(
            [np.arange(s, s + n * step, step, dtype=np.int64) for s, n, step in self.runs[rank]]
        )

    def positions(self, rank: int) -> NDArray[np.int64]:
        """Return the position of each of the rank's tokens in its document: int64 [num_local]."""
        places = self.indices(rank)
        document = np.searchsorted(self.cu_seqlens, places, side="right") - 1
        return places - self.cu_seqlens[document]

    def order(self, ranks: Ranks) -> NDArray[np.int64] | None:
        """Return, for each token of `ranks` in the order of `bands`, its row when the ranks' tokens are laid end
        to end; None if that is the same order.

        Ascending, but for some ranks of a strided layout, whose tokens stay rank after rank.
        """
        if self.runs[0][0].stride > 1 and 1 < len(ranks) < self.world:
            return None
        if ranks not in self._order:
            places = np.concatenate([self.indices(rank) for rank in ranks])
            ascends = bool((np.diff(places) > 0).all())
            self._order[ranks] = None if ascends else np.argsort(places, kind="stable")
        return self._order[ranks]

    def bands(self, q_ranks: Ranks, k_ranks: Ranks, *, window: int | None = None) -> Bands:
        """Return who sees whom between the tokens of `q_ranks` and those of `k_ranks`, each in the order of `order`.

        Causal within each document; a query sees the `window` keys up to itself, None = all before it.
        """
        window = self._normal(window)
        key = (q_ranks, k_ranks, window)
        if key not in self._bands:
            self._bands[key] = self._make_bands(q_ranks, k_ranks, window)
        return self._bands[key]

    def _make_bands(self, q_ranks: Ranks, k_ranks: Ranks, window: int | None) -> Bands:
        q, k = self._of(q_ranks), self._of(k_ranks)
        own = q_ranks == k_ranks and window is None and (len(q_ranks) == 1 or q.stride == 1)
        return _own_bands(q) if own else _bands_between(q, k, window)

    def needed_rows(self, q_rank: int, k_rank: int, *, window: int | None = None) -> NDArray[np.int64]:
        """Return the rows of `k_rank` that some query of `q_rank` sees, ascending."""
        bands = self.bands((q_rank,), (k_rank,), window=window)
        change = np.zeros(self.num_local + 1, dtype=np.int64)
        np.add.at(change, bands.k_start, 1)
        np.add.at(change, bands.k_start + bands.k_len, -1)
        return np.flatnonzero(np.cumsum(change[:-1]) > 0)

    def reach(self, places: Sequence[Ranks], *, window: int | None = None) -> list[int]:
        """Return how many steps the keys of each place of a ring travel: to the last that has a query for them.

        `places` are the ranks that stand at each place: one each, or a group of them (USP).
        """
        window = self._normal(window)
        key = (tuple(places), window)
        if key not in self._reach:
            size = len(places)
            sees = self._sight(places, window)
            self._reach[key] = [
                next((step for step in range(size - 1, 0, -1) if sees((place + step) % size, place)), 0)
                for place in range(size)
            ]
        return self._reach[key]

    def _sight(self, places: Sequence[Ranks], window: int | None) -> Callable[[int, int], bool]:
        """Return what tells whether some query of one of `places` sees some key of another."""
        extents = [self._extents(ranks) for ranks in places]

        def sees(q: int, k: int) -> bool:
            may_see = _may_see(extents[q], extents[k], window)
            if window is None or not may_see:
                return may_see
            return len(self.bands(places[q], places[k], window=window)) > 0

        return sees

    def _extents(self, ranks: Ranks) -> _Extents:
        document, _, start, length, stride = self._of(ranks)
        num_documents = len(self.cu_seqlens) - 1
        first, last = np.full(num_documents, self.num_padded), np.full(num_documents, -1)
        np.minimum.at(first, document, start)
        np.maximum.at(last, document, start + (length - 1) * stride)
        return _Extents(np.flatnonzero(last >= 0), first, last)

    def needed_counts(self, *, window: int | None = None) -> NDArray[np.int64]:
        """Return how many rows `needed_rows` has for any two ranks, int64 [query rank, key rank]; not for striped."""
        everyone = tuple(range(self.world))
        runs = sorted(
            (start, start + length, rank) for rank in everyone for start, length, _ in self.runs[rank]
        )
        starts, ends, owners = np.array(runs, dtype=np.int64).T
        counts = np.zeros((self.world, self.world), dtype=np.int64)
        for rank in everyone:
            # Taken together, keys stand at their places in the sequence.
            bands = self.bands((rank,), everyone, window=window)
            seen = _Union(bands.k_start, bands.k_start + bands.k_len)
            np.add.at(counts[rank], owners, seen.up_to(ends) - seen.up_to(starts))
        return counts

    def work(self, *, window: int | None = None) -> NDArray[np.int64]:
        """Return the visible (query, key) pairs between any two ranks: int64 [query rank, key rank]."""
        ranks = range(self.world)
        return np.array([[self.bands((q,), (k,), window=window).num_pairs() for k in ranks] for q in ranks])

    def _normal(self, window: int | None) -> int | None:
        """Return the window as tables are kept by it: one that no document fills is full attention."""
        _check_window(window)
        return None if window is None or window >= self._longest else window

    def _of(self, ranks: Ranks) -> _Segments:
        if ranks not in self._segments:
            self._segments[ranks] = _segments_of(self._places(ranks), self.cu_seqlens)
        return self._segments[ranks]

    def _places(self, ranks: Ranks) -> Places:
        """Return the tokens of `ranks` in the order of `order`, runs that touch made one."""
        starts, lengths, strides = (
            np.array(column, dtype=np.int64)
            for column in zip(*(run for rank in ranks for run in self.runs[rank]))
        )
        stride = int(strides[0])
        if stride > 1 and len(starts) == stride:
            return Places.between(0, int(lengths.sum()))
        if stride > 1:
            return Places(starts, lengths, stride)
        order = np.argsort(starts, kind="stable")
        starts, lengths = starts[order], lengths[order]
        first = np.flatnonzero(np.concatenate([[True], starts[1:] != (starts + lengths)[:-1]]))
        return Places(starts[first], np.add.reduceat(lengths, first))


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ArgumentError(
            "a sliding window must keep at least the token itself", found=window, allowed=">= 1"
        )


class _Union:
    """Places that lie in at least one of some ranges."""

    def __init__(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        first = np.flatnonzero(np.concatenate([[True], starts[1:] > ends[:-1]])) if len(starts) else order
        last = np.append(first[1:], len(starts)) - 1 if len(starts) else order
        self._starts, self._ends = starts[first], ends[last]
        self._before = np.concatenate([[0], np.cumsum(self._ends - self._starts)])

    def up_to(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many of the union lie before each of `places`."""
        index = np.searchsorted(self._starts, places, side="right") - 1
        if not len(self._starts):
            return np.zeros(len(places), dtype=np.int64)
        inside = np.minimum(places, self._ends[index]) - self._starts[index]
        return np.where(index < 0, 0, self._before[index] + inside)


class _Extents(NamedTuple):
    """Where the tokens of some ranks begin and end in each document."""

    documents: NDArray[np.int64]
    """Those that they have tokens of."""
    first: NDArray[np.int64]
    """First place, [all documents]."""
    last: NDArray[np.int64]


def _may_see(q: _Extents, k: _Extents, window: int | None) -> bool:
    """Return whether some query can see some key: exact without a window; with one, some say yes that do not.

    A table of bands would say the same, but those of all pairs of ranks are many on every rank.
    """
    here = k.documents
    sees = q.last[here] >= k.first[here]
    if window is not None:
        sees &= q.first[here] - k.last[here] < window
    return bool(sees.any())


class _Segments(NamedTuple):
    """Runs cut at document borders, by document: int64 columns [segments]."""

    document: NDArray[np.int64]
    row: NDArray[np.int64]
    """First row among the tokens of the ranks, in the order of `SequenceShards.order`."""
    place: NDArray[np.int64]
    """First place in the sequence."""
    length: NDArray[np.int64]
    stride: int


def _segments_of(places: Places, borders: NDArray[np.int64]) -> _Segments:
    starts, lengths, stride = places
    ends = starts + (lengths - 1) * stride + 1
    # Every document that a run touches is a segment of it.
    first_document = np.searchsorted(borders, starts, side="right") - 1
    counts = np.searchsorted(borders, ends, side="left") - first_document
    run = np.repeat(np.arange(len(starts)), counts)
    document = first_document[run] + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    # Tokens of the run before the document's begin and before its end, rounded up to whole strides.
    low = np.maximum(-((starts[run] - borders[document]) // stride), 0)
    high = np.minimum(-((starts[run] - borders[document + 1]) // stride), lengths[run])
    rows = (np.cumsum(lengths) - lengths)[run] + low
    order = np.argsort(document, kind="stable")
    order = order[(high > low)[order]]
    place = starts[run] + low * stride
    return _Segments(document[order], rows[order], place[order], (high - low)[order], stride)


def _bands_between(q: _Segments, k: _Segments, window: int | None) -> Bands:
    if q.stride != k.stride:
        raise ArgumentError("queries and keys of different strides", found=f"{q.stride} and {k.stride}")
    q_index, k_index = matches(q.document, k.document)
    # Query a + s*i sees key b + s*j iff 0 <= a + s*i - b - s*j <= window - 1.
    ahead = q.place[q_index] - k.place[k_index]
    lo = -(ahead // q.stride)
    if window is not None:
        hi = (window - 1 - ahead) // q.stride
        return Bands(q.row[q_index], q.length[q_index], k.row[k_index], k.length[k_index], lo=lo, hi=hi)
    columns = np.stack((q.row[q_index], q.length[q_index], k.row[k_index], k.length[k_index], lo))
    columns = _joined_queries(_joined_keys(columns[:, lo < q.length[q_index]]))
    return Bands(*columns[:4], lo=columns[4])


def _own_bands(own: _Segments) -> Bands:
    """Return who sees whom among the same tokens without a window: rows ascend, so each document is one triangle."""
    first = np.flatnonzero(np.diff(own.document, prepend=-1))
    rows, lengths = own.row[first], np.add.reduceat(own.length, first)
    return Bands(rows, lengths, rows, lengths)


def _sees_all(columns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which bands have every query see every key; the columns are q row, q length, k row, k length, lo."""
    return columns[4] <= 1 - columns[3]


def _joined_keys(columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join bands of the same queries whose keys follow each other: all of the first, then a triangle or all.

    A kernel is called once instead of twice, and there is nothing to merge: for a zigzag rank this halves the calls.
    """
    columns = columns[:, np.lexsort((columns[2], columns[0]))]
    q_row, _, k_row, k_len, lo = columns
    follows = (q_row[1:] == q_row[:-1]) & (k_row[1:] == (k_row + k_len)[:-1])
    joins = follows & _sees_all(columns)[:-1] & (lo[1:] <= 1)
    first = np.flatnonzero(np.concatenate([[True], ~joins])) if len(q_row) else np.array([], dtype=np.int64)
    if len(first) == len(q_row):
        return columns
    last = np.append(first[1:], len(q_row)) - 1
    total = np.add.reduceat(k_len, first)
    return np.stack((*columns[:3, first], total, lo[last] - (total - k_len[last])))


def _joined_queries(columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join bands whose queries follow each other and see all of the same keys."""
    columns = columns[:, np.lexsort((columns[0], columns[3], columns[2]))]
    q_row, q_len, k_row, k_len, lo = columns
    same = (k_row[1:] == k_row[:-1]) & (k_len[1:] == k_len[:-1]) & (q_row[1:] == (q_row + q_len)[:-1])
    everything = _sees_all(columns)
    joins = same & everything[1:] & everything[:-1]
    first = np.flatnonzero(np.concatenate([[True], ~joins])) if len(q_row) else np.array([], dtype=np.int64)
    if len(first) == len(q_row):
        return columns
    total = np.add.reduceat(q_len, first)
    # i - j is smallest at the first query, so a limit that hides nothing from it hides nothing from those after it.
    return np.stack((q_row[first], total, k_row[first], k_len[first], lo[first]))
