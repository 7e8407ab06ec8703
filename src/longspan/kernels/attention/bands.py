"""Who sees whom, as a table of diagonal bands instead of a mask.

A band joins one segment of queries with one segment of keys. Query i of the segment sees key j of the
segment iff lo <= i - j <= hi, both indices counted from the start of their segments:

    causal document          lo = 0                      hi = no limit
    sliding window w         lo = 0                      hi = w - 1        (keys p-w+1 .. p)
    everything               lo = -no limit              hi = no limit
    4 queries after 6 keys   lo = -6                     hi = no limit     (KV cache: 10 keys, bottom right)
    striped, other rank      lo = 0 or 1                 hi = no limit     (a shift of the diagonal)

A row of packed documents, a chunk against another chunk, and strided positions are all such tables, so
kernels and schedules need no other mask. A table costs a few integers per document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError

__all__ = ["NO_LIMIT", "Bands", "Geometry", "Places", "cut_documents", "matches", "oldest_seen"]

NO_LIMIT = 1 << 62
"""Value of `hi` (and, negated, of `lo`) that bounds nothing."""

IntColumn = Sequence[int] | NDArray[np.integer]


class Geometry(NamedTuple):
    """The shape of one band, without its place: bands of equal geometry can share one batched call."""

    q_len: int
    k_len: int
    lo: int
    hi: int


class Places(NamedTuple):
    """Some tokens of a row by their places in it: runs laid end to end, each start, start + stride, ..."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    stride: int = 1

    @classmethod
    def between(cls, start: int, stop: int) -> Places:
        """Return the places from `start` to `stop`."""
        return cls(np.array([start]), np.array([stop - start]))


class Bands:
    """A table of bands over a query tensor and a key tensor.

    Columns are int64 arrays of equal length: `q_start`, `q_len`, `k_start`, `k_len`, `lo`, `hi`. Bands in
    which nothing is visible are dropped; limits that bound nothing are normalised to `NO_LIMIT`, and
    segments are trimmed to the queries that see and the keys that are seen. Two bands may share queries or
    keys, but no (query, key) pair may be visible in both. Instances are immutable and hashable by identity.

    Args:
        q_start, q_len: query segments, in rows of the query tensor.
        k_start, k_len: key segments, in rows of the key tensor.
        lo, hi: limits of i - j, one number or one per band; `hi=None` sets no upper limit.

    Raises:
        ArgumentError: columns of different lengths, or a negative start or length.
    """

    def __init__(
        self,
        q_start: IntColumn,
        q_len: IntColumn,
        k_start: IntColumn,
        k_len: IntColumn,
        *,
        lo: int | IntColumn = 0,
        hi: int | IntColumn | Sequence[int | None] | None = None,
    ) -> None:
        columns = [
            np.asarray(column, dtype=np.int64).reshape(-1) for column in (q_start, q_len, k_start, k_len)
        ]
        count = len(columns[0])
        limits = [_limit_column(lo, count), _limit_column(hi, count)]
        if any(len(column) != count for column in (*columns, *limits)):
            raise ArgumentError(
                "the columns of a band table differ in length",
                found=[len(column) for column in (*columns, *limits)],
            )
        if count and min(column.min() for column in columns) < 0:
            raise ArgumentError(
                "a band starts or ends before the tensor", found=[c.tolist() for c in columns]
            )
        trimmed = _trim(*columns, *limits)
        self.q_start, self.q_len, self.k_start, self.k_len, self.lo, self.hi = trimmed
        for column in trimmed:
            column.setflags(write=False)
        self.queries_overlap = _overlap(self.q_start, self.q_len)
        self._groups: list[tuple[Geometry, NDArray[np.int64], NDArray[np.int64]]] | None = None

    @classmethod
    def from_documents(cls, cu_seqlens: IntColumn, *, window: int | None = None) -> Bands:
        """Return one causal band per document of a packed row.

        Args:
            cu_seqlens: document borders, [documents + 1], from 0 to the number of tokens.
            window: a query at position p of its document sees keys p-window+1 .. p; None = all before it.

        Raises:
            ArgumentError: borders that do not start at 0 or go back, or a window below 1.
        """
        borders = np.asarray(cu_seqlens, dtype=np.int64).reshape(-1)
        if len(borders) < 1 or borders[0] != 0 or (np.diff(borders) < 0).any():
            raise ArgumentError(
                "cu_seqlens must start at 0 and never go back",
                found=borders[:8].tolist(),
                allowed="[0, ..., tokens]",
            )
        if window is not None and window < 1:
            raise ArgumentError(
                "a sliding window must keep at least the token itself", found=window, allowed=">= 1"
            )
        lengths = np.diff(borders)
        return cls(borders[:-1], lengths, borders[:-1], lengths, hi=None if window is None else window - 1)

    def __len__(self) -> int:
        return len(self.q_start)

    def __repr__(self) -> str:
        return f"Bands({len(self)} bands, {int(self.q_len.sum())} query rows)"

    def check(self, *, num_queries: int, num_keys: int) -> None:
        """Refuse tensors that are shorter than the table says.

        Raises:
            ArgumentError: a band reaches past the end of a tensor.
        """
        need_q = int((self.q_start + self.q_len).max(initial=0))
        need_k = int((self.k_start + self.k_len).max(initial=0))
        if need_q > num_queries or need_k > num_keys:
            raise ArgumentError(
                "a band reaches past the end of the queries or keys",
                found=f"the bands need {need_q} and {need_k} rows, there are {num_queries} and {num_keys}",
            )

    def select(self, queries: Places, keys: Places) -> Bands:
        """Return who sees whom among some queries and some keys, which are numbered anew as they are named.

        Raises:
            ArgumentError: queries and keys of different strides.
        """
        stride = queries.stride
        if keys.stride != stride:
            raise ArgumentError("queries and keys of different strides", found=f"{stride} and {keys.stride}")
        q, k = _pieces(self.q_start, self.q_len, queries), _pieces(self.k_start, self.k_len, keys)
        q_index, k_index = matches(q.band, k.band)
        band = q.band[q_index]
        # Query a + stride * i of the band sees key b + stride * j iff lo <= a - b + stride * (i - j) <= hi.
        ahead = q.inside[q_index] - k.inside[k_index]
        lo, hi = -((ahead - self.lo[band]) // stride), (self.hi[band] - ahead) // stride
        return Bands(q.row[q_index], q.length[q_index], k.row[k_index], k.length[k_index], lo=lo, hi=hi)

    def num_pairs(self) -> int:
        """Return the number of visible (query, key) pairs; each costs 4 * head_dim FLOPs a head."""
        at_least_lo = _pairs_from(self.q_len, self.k_len, np.maximum(self.lo, -self.k_len))
        beyond_hi = _pairs_from(self.q_len, self.k_len, np.minimum(self.hi, self.q_len) + 1)
        return int((at_least_lo - beyond_hi).sum())

    def groups(self) -> list[tuple[Geometry, NDArray[np.int64], NDArray[np.int64]]]:
        """Return bands of equal geometry together: (geometry, query starts, key starts), largest first."""
        if self._groups is None:
            found: dict[Geometry, list[int]] = {}
            rows = zip(self.q_len.tolist(), self.k_len.tolist(), self.lo.tolist(), self.hi.tolist())
            for index, row in enumerate(rows):
                found.setdefault(Geometry(*row), []).append(index)
            self._groups = [
                (geometry, self.q_start[indices], self.k_start[indices])
                for geometry, indices in sorted(found.items(), key=lambda item: (-item[0].q_len, item[0]))
            ]
        return self._groups


def cut_documents(cu_seqlens: NDArray[np.int64], tokens: int | None) -> NDArray[np.int64]:
    """Return the borders of documents that are cut at multiples of `tokens`; None = as they are.

    Chunked attention is attention of such documents: [0, 5, 12] cut at 3 is [0, 3, 5, 8, 11, 12].
    """
    if tokens is None:
        return cu_seqlens
    pieces = -(-np.diff(cu_seqlens) // tokens)
    within = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(cu_seqlens[:-1], pieces) + tokens * within
    return np.concatenate([starts, cu_seqlens[-1:]]).astype(np.int64)


def matches(left: NDArray[np.int64], right: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all pairs of indices at which `left` and `right` are equal; `right` ascends."""
    first = np.searchsorted(right, left, side="left")
    counts = np.searchsorted(right, left, side="right") - first
    left_index = np.repeat(np.arange(len(left)), counts)
    return left_index, first[left_index] + np.arange(counts.sum()) - np.repeat(
        np.cumsum(counts) - counts, counts
    )


def oldest_seen(position: int, window: int | None, attention_chunk: int | None) -> int:
    """Return the first position that a token sees."""
    oldest = 0 if window is None else max(0, position - window + 1)
    return oldest if attention_chunk is None else max(oldest, position // attention_chunk * attention_chunk)


class _Pieces(NamedTuple):
    """Segments of bands cut to runs of places, band by band: int64 columns [pieces]."""

    band: NDArray[np.int64]
    row: NDArray[np.int64]
    """First row in the numbering of the places."""
    inside: NDArray[np.int64]
    """Its place, counted from the start of the band's segment."""
    length: NDArray[np.int64]


def _pieces(start: NDArray[np.int64], length: NDArray[np.int64], places: Places) -> _Pieces:
    # Rows of each run before the segment begins and before it ends, [bands, runs]; rounded up to whole strides.
    ahead = start[:, None] - places.starts
    low = np.maximum(-(-ahead // places.stride), 0)
    high = np.minimum(-(-(ahead + length[:, None]) // places.stride), places.lengths)
    band, run = np.nonzero(high > low)
    low, high, ahead = low[band, run], high[band, run], ahead[band, run]
    before = np.cumsum(places.lengths) - places.lengths
    return _Pieces(band, before[run] + low, low * places.stride - ahead, high - low)


def _limit_column(
    limit: int | Sequence[int | None] | NDArray[np.integer] | None, count: int
) -> NDArray[np.int64]:
    if limit is None or isinstance(limit, (int, np.integer)):
        return np.full(count, NO_LIMIT if limit is None else int(limit), dtype=np.int64)
    if isinstance(limit, np.ndarray):
        return limit.astype(np.int64).reshape(-1)
    return np.array([NO_LIMIT if value is None else value for value in limit], dtype=np.int64).reshape(-1)


def _trim(
    q_start: NDArray[np.int64],
    q_len: NDArray[np.int64],
    k_start: NDArray[np.int64],
    k_len: NDArray[np.int64],
    lo: NDArray[np.int64],
    hi: NDArray[np.int64],
) -> tuple[NDArray[np.int64], ...]:
    """Cut each band to the rows that see something and the keys that are seen, then normalise its limits."""
    lo = np.maximum(lo, -NO_LIMIT)
    hi = np.minimum(hi, NO_LIMIT)
    # Query i sees keys max(0, i - hi) .. min(k_len - 1, i - lo): some iff lo <= i <= k_len - 1 + hi.
    first_row = np.clip(lo, 0, None)
    last_row = np.minimum(q_len - 1, k_len - 1 + hi)
    first_key = np.clip(first_row - hi, 0, None)
    last_key = np.minimum(k_len - 1, last_row - lo)
    keep = (q_len > 0) & (k_len > 0) & (lo <= hi) & (first_row <= last_row) & (first_key <= last_key)
    new_q_len = last_row - first_row + 1
    new_k_len = last_key - first_key + 1
    shift = first_row - first_key
    new_lo = np.where(lo <= -NO_LIMIT, lo, lo - shift)
    new_hi = np.where(hi >= NO_LIMIT, hi, hi - shift)
    # A limit outside the reach of i - j, which is -(k_len - 1) .. q_len - 1, bounds nothing.
    new_lo = np.where(new_lo <= -(new_k_len - 1), -NO_LIMIT, new_lo)
    new_hi = np.where(new_hi >= new_q_len - 1, NO_LIMIT, new_hi)
    columns = (q_start + first_row, new_q_len, k_start + first_key, new_k_len, new_lo, new_hi)
    return tuple(np.ascontiguousarray(column[keep]) for column in columns)


def _pairs_from(
    q_len: NDArray[np.int64], k_len: NDArray[np.int64], limit: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return how many (i, j) of each band have i - j >= limit: row i has min(i - limit + 1, k_len), if positive."""

    def triangle(side: NDArray[np.int64]) -> NDArray[np.int64]:
        side = np.maximum(side, 0)
        return side * (side + 1) // 2

    rows = triangle(q_len - limit) - triangle(-limit)
    return rows - (triangle(q_len - limit - k_len) - triangle(-limit - k_len))


def _overlap(start: NDArray[np.int64], length: NDArray[np.int64]) -> bool:
    order = np.argsort(start, kind="stable")
    ends = (start + length)[order]
    return bool((start[order][1:] < np.maximum.accumulate(ends)[:-1]).any()) if len(start) > 1 else False
