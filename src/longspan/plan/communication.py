"""Bytes that one rank sends in one attention layer, forward and backward, for every schedule of `parallel`.

Exact for what the schedules do, not a bound: counting in the schedules themselves gives the same numbers. Tokens
that no query of another rank sees need not travel, so all that a schedule has to know of the documents is

    needed[q, k]    rows of rank k that some query of rank q sees

None stands for one causal document in the layout that suits the schedule: zigzag or striped for a ring, contiguous
for dist_flash. Then, with b bytes an element, a = max(b, 4) of a sum, T tokens a rank, W ranks, U a Ulysses degree:

    ring, striped   forward 2TKD b (W-1)             backward 2TKD (a + b) (W-1)
    ulysses         forward (2H + 2K) TDb (U-1)/U    backward the same          where U divides K
    usp             both: the ring sees U*T tokens, K/U heads
    all_gather      forward 2TKD b (W-1)             backward 2TKD (a + b) (W-1)
    dist_flash      depends on the rank: keys to those behind, queries and partial outputs of the helped

Papers: arXiv 2310.01889 (ring), 2310.03294 (dist_flash), 2309.14509 (Ulysses), 2405.07719 (USP), 2407.21783
(all_gather).
Shape legend: T = tokens of a rank, H = query heads, K = key/value heads, D = head dim, W = ranks of the sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError

__all__ = ["SEND_BY_NEED", "AttentionShape", "Sent", "bytes_sent", "kv_heads_of_rank"]

SEND_BY_NEED = 0.75
"""all_gather sends rows by need if the rank that sends most then sends at most this share of all its rows."""


class AttentionShape(NamedTuple):
    """One rank's tensors of one attention layer."""

    tokens: int
    """Tokens of the rank, padding included."""
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int = 2

    @property
    def sum_bytes(self) -> int:
        """Bytes of an element of a sum over ranks: fp32 or better."""
        return max(4, self.element_bytes)

    @property
    def query_elements(self) -> int:
        return self.tokens * self.heads * self.head_dim

    @property
    def pair_elements(self) -> int:
        """Elements of the keys and the values together."""
        return 2 * self.tokens * self.kv_heads * self.head_dim


class Sent(NamedTuple):
    """Bytes to other ranks."""

    forward: int
    backward: int

    def plus(self, other: Sent) -> Sent:
        """Return both together."""
        return Sent(self.forward + other.forward, self.backward + other.backward)


def bytes_sent(
    schedule: str,
    shape: AttentionShape,
    *,
    ring_degree: int = 1,
    ulysses_degree: int = 1,
    rank: int = 0,
    needed: NDArray[np.int64] | None = None,
) -> Sent:
    """Return what one rank sends in one attention layer.

    Args:
        schedule: none, ring, striped, dist_flash, ulysses, usp or all_gather.
        shape: tensors of the rank.
        ring_degree: ranks among which keys travel.
        ulysses_degree: ranks that trade heads.
        rank: ring rank * ulysses_degree + ulysses rank.
        needed: int64 [W, W], see the module; None = one causal document.

    Raises:
        ArgumentError: an unknown schedule, or a Ulysses degree that does not divide the heads.
    """
    if schedule == "none":
        return Sent(0, 0)
    if schedule in ("ring", "striped"):
        return _ring(shape, ring_degree, rank, needed)
    if schedule == "dist_flash":
        return _dist_flash(shape, ring_degree, rank, needed)
    if schedule == "all_gather":
        return _all_gather(shape, ring_degree, rank, needed)
    if schedule in ("ulysses", "usp"):
        place, place_rank = divmod(rank, ulysses_degree)
        traded = _ulysses(shape, ulysses_degree, place_rank)
        of_places = None if needed is None else _by_place(needed, ulysses_degree)
        return traded.plus(_ring(_inside(shape, ulysses_degree, place_rank), ring_degree, place, of_places))
    raise ArgumentError(
        "unknown context-parallel schedule",
        found=schedule,
        allowed="none, ring, striped, dist_flash, ulysses, usp, all_gather",
    )


def kv_heads_of_rank(heads: int, kv_heads: int, degree: int, rank: int) -> int:
    """Return how many key/value heads the H/U query heads of a Ulysses rank look at.

    Raises:
        ArgumentError: `degree` does not divide the heads.
    """
    if heads % degree:
        raise ArgumentError(
            "the heads cannot be spread over the ranks of Ulysses attention",
            found=f"num_heads {heads}, num_kv_heads {kv_heads}, ulysses degree {degree}",
            allowed=f"degrees that divide {heads}",
        )
    per_rank, group = heads // degree, heads // kv_heads
    return ((rank + 1) * per_rank - 1) // group - rank * per_rank // group + 1


def _ring(shape: AttentionShape, degree: int, place: int, needed: NDArray[np.int64] | None) -> Sent:
    """A block goes forward as far as a place has a query for it; its gradient starts one step later and comes home."""
    if needed is None:
        blocks = gradients = degree - 1
    else:
        steps = np.arange(degree)
        reach = [int((steps * (needed[(p + steps) % degree, p] > 0)).max()) for p in range(degree)]
        visitors = [reach[(place - step) % degree] for step in range(degree)]
        blocks = sum(step < far for step, far in enumerate(visitors))
        gradients = sum(1 <= step <= far for step, far in enumerate(visitors))
    forward = blocks * shape.pair_elements * shape.element_bytes
    return Sent(forward, forward + gradients * shape.pair_elements * shape.sum_bytes)


def _dist_flash(shape: AttentionShape, world: int, rank: int, needed: NDArray[np.int64] | None) -> Sent:
    """Step s computes queries p on keys p - s: at p, or at the owner of the keys if fewer than W/2 are ahead of it."""

    def crossed(q: int, k: int) -> bool:
        return 0 <= k < q < world and (needed is None or bool(needed[q, k]))

    own = range(1, world // 2 + 1)
    # Keys j of queries p more than W/2 behind: `W - s` of them, never the opposite rank of an even ring.
    far = [world - step for step in own if 2 * step != world]
    keys_lent = sum(crossed(rank + step, rank) for step in own)
    keys_borrowed = sum(crossed(rank, rank - step) for step in own)
    queries_lent = sum(crossed(rank, rank - distance) for distance in far)
    queries_helped = sum(crossed(rank + distance, rank) for distance in far)
    b, a = shape.element_bytes, shape.sum_bytes
    lse_bytes = shape.tokens * shape.heads * a
    query, pair = shape.query_elements, shape.pair_elements
    forward = keys_lent * pair * b + queries_lent * query * b + queries_helped * (query * a + lse_bytes)
    # Backward: queries travel with dout, out and lse; gradients of borrowed keys and of helped queries return.
    backward = keys_lent * pair * b + keys_borrowed * pair * a
    backward += queries_lent * (3 * query * b + lse_bytes) + queries_helped * query * a
    return Sent(forward, backward)


def _all_gather(shape: AttentionShape, world: int, rank: int, needed: NDArray[np.int64] | None) -> Sent:
    """Every row to every rank, or, where few are seen, each to those that see it; fp32 gradients come back likewise."""
    rows_out = rows_in = (world - 1) * shape.tokens
    if needed is not None:
        others = needed * (1 - np.eye(world, dtype=np.int64))
        if others.sum(axis=0).max(initial=0) <= SEND_BY_NEED * (world - 1) * shape.tokens:
            rows_out, rows_in = int(others[:, rank].sum()), int(others[rank].sum())
    of_row = 2 * shape.kv_heads * shape.head_dim
    forward = rows_out * of_row * shape.element_bytes
    return Sent(forward, forward + rows_in * of_row * shape.sum_bytes)


def _ulysses(shape: AttentionShape, degree: int, rank: int) -> Sent:
    """q, k, v out and the output back; dout out and dq, dk, dv back. A copied head's gradient travels once a copy."""
    per_rank = shape.heads // degree
    kv = [kv_heads_of_rank(shape.heads, shape.kv_heads, degree, other) for other in range(degree)]
    others = degree - 1
    of_head = shape.tokens * shape.head_dim * shape.element_bytes
    forward = 2 * others * per_rank + 2 * (sum(kv) - kv[rank])
    backward = 2 * others * per_rank + 2 * others * kv[rank]
    return Sent(forward * of_head, backward * of_head)


def _inside(shape: AttentionShape, degree: int, rank: int) -> AttentionShape:
    """Return what the ring of USP sees: all tokens of a place, some heads.

    Query heads that share their key/value heads unevenly get a copy of them each: 12 heads on 4 key/value heads and 3
    ranks are heads 4..7 of key/value heads 1 1 2 2 on rank 1, but 0 0 0 1 on rank 0.
    """
    per_rank, group = shape.heads // degree, shape.heads // shape.kv_heads
    used = [head // group for head in range(rank * per_rank, (rank + 1) * per_rank)]
    counts = {used.count(head) for head in used}
    kv_heads = len(set(used)) if len(counts) == 1 else per_rank
    return shape._replace(tokens=shape.tokens * degree, heads=per_rank, kv_heads=kv_heads)


def _by_place(needed: NDArray[np.int64], degree: int) -> NDArray[np.int64]:
    places = len(needed) // degree
    return needed.reshape(places, degree, places, degree).sum(axis=(1, 3))
