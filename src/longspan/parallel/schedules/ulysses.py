"""Ulysses: tokens are traded for heads, each rank computes some heads over all tokens, and heads for tokens again.

One all-to-all brings every rank the queries of its H/U heads and the keys and values of just the heads these
look at: K/U of them where U divides K, else as few copies as the ratio asks for (8 key/value heads on 16 ranks:
each travels twice, not H/K times). With a ring around it (USP, arXiv:2405.07719), U ranks next to each other
trade heads and then stand at one place of the ring together.

DeepSpeed Ulysses (arXiv:2309.14509). Shape legend: T = tokens of this rank, U = ulysses degree, H = query heads,
K = key/value heads, h, k = those of one rank, D = head dim.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist

from longspan.core.errors import ArgumentError
from longspan.kernels.attention.merging import accumulation_dtype
from longspan.parallel.channel import Channel
from longspan.parallel.layout import Layout
from longspan.parallel.schedules.base import AllGradients, AttentionCall, Forward
from longspan.parallel.schedules.ring import Ring
from longspan.parallel.shards import SequenceShards
from longspan.parallel.trade import HeadShare, reordered, shared_heads, to_heads, to_tokens

__all__ = ["Ulysses", "head_share"]


def head_share(num_heads: int, num_kv_heads: int, degree: int, rank: int) -> HeadShare:
    """Return the heads of one of `degree` ranks.

        12 heads, 4 key/value heads, 2 ranks:   rank 1 has 6..11 and 2..3
        12 heads, 4 key/value heads, 3 ranks:   rank 1 has 4..7 and 1..2, used 1 1 2 2: two heads each
        12 heads, 2 key/value heads, 4 ranks:   rank 1 has 3..5 and 0..0

    Raises:
        ArgumentError: `degree` does not divide the heads.
    """
    if num_heads % degree:
        raise ArgumentError(
            "the heads cannot be spread over the ranks of Ulysses attention",
            found=f"num_heads {num_heads}, num_kv_heads {num_kv_heads}, ulysses degree {degree}",
            allowed=f"degrees that divide {num_heads}",
            fix="choose another degree, or a schedule that leaves heads alone (ring, striped, all_gather)",
        )
    per_rank = num_heads // degree
    return shared_heads(range(rank * per_rank, (rank + 1) * per_rank), num_heads // num_kv_heads)


class Ulysses:
    """All tokens, some heads on every rank; with a ring, all tokens of one of its places.

    Args:
        group: ranks that trade heads, next to each other in the sequence; None = this process alone.
        ring_group: one process of each place of the ring around (USP); None = no ring.
        name: as in a recipe.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        ring_group: dist.ProcessGroup | None = None,
        name: str = "ulysses",
    ) -> None:
        self.name = name
        self.channel = Channel(group)
        self.degree = self.channel.world
        self.ring = Ring(ring_group, ranks_per_place=self.degree)
        self.channels: tuple[Channel, ...] = (self.channel, self.ring.channel)
        self.layouts: tuple[Layout, ...] = ("contiguous", "zigzag", "balanced", "striped")
        if self.ring.num_places > 1:
            self.layouts = ("zigzag", "contiguous", "balanced", "striped")
        self.rank, self.world = self.ring.rank + self.channel.rank, self.ring.world
        self._orders: WeakKeyDictionary[SequenceShards, dict[torch.device, torch.Tensor]] = (
            WeakKeyDictionary()
        )

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Refuse a number of query heads that the degree does not divide.

        Raises:
            ArgumentError: naming num_heads, num_kv_heads and the degree.
        """
        head_share(num_heads, num_kv_heads, self.degree, 0)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall) -> Forward:
        """Return out of this rank's queries; see `CpSchedule.forward`."""
        shares = self._shares(q.shape[1], k.shape[1])
        mine, order = shares[self.channel.rank], self._order(call, q.device)
        ranges = [(share.q_heads, share.kv_heads, share.kv_heads) for share in shares]
        q_UThD, k_UTkD, v_UTkD = (reordered(x, order) for x in to_heads(self.channel, (q, k, v), ranges))
        if mine.expand is not None:
            k_UTkD, v_UTkD = k_UTkD[:, mine.expand], v_UTkD[:, mine.expand]
        out_UThD, saved = self.ring.forward(q_UThD, k_UTkD, v_UTkD, _of_heads(call, mine))
        (out,) = to_tokens(
            self.channel, (_put(out_UThD, order),), [(share.q_heads,) for share in shares], (q.shape[1],)
        )
        # The shape of k's heads is not to be read off the expanded ones: keep it by an empty tensor.
        return out, (*saved, k.new_empty(0, k.shape[1]))

    def backward(
        self, dout: torch.Tensor, saved: tuple[torch.Tensor, ...], call: AttentionCall
    ) -> AllGradients:
        """Return dq, dk, dv of this rank's tokens."""
        *inner, kv_shape = saved
        num_heads, num_kv_heads = dout.shape[1], kv_shape.shape[1]
        shares = self._shares(num_heads, num_kv_heads)
        mine, order = shares[self.channel.rank], self._order(call, dout.device)
        (dout_UThD,) = (
            reordered(x, order) for x in to_heads(self.channel, (dout,), [(s.q_heads,) for s in shares])
        )
        dq, dk, dv, dsinks = self.ring.backward(dout_UThD, tuple(inner), _of_heads(call, mine))
        if mine.expand is not None:
            dk, dv = (_fold(grad, mine.expand, len(mine.kv_heads)) for grad in (dk, dv))
        ranges = [(share.q_heads, share.kv_heads, share.kv_heads) for share in shares]
        heads = (num_heads, num_kv_heads, num_kv_heads)
        dq, dk, dv = to_tokens(self.channel, tuple(_put(x, order) for x in (dq, dk, dv)), ranges, heads)
        if dsinks is not None:
            # Of all tokens for this rank's heads: the sum over ranks is that of all heads.
            whole = dsinks.new_zeros(num_heads)
            whole[mine.q_heads.start : mine.q_heads.stop] = dsinks
            dsinks = whole
        return dq, dk, dv, dsinks

    def _shares(self, num_heads: int, num_kv_heads: int) -> list[HeadShare]:
        return [head_share(num_heads, num_kv_heads, self.degree, rank) for rank in range(self.degree)]

    def _order(self, call: AttentionCall, device: torch.device) -> torch.Tensor | None:
        """Return the permutation of the tokens of this place from rank after rank to the order of the bands."""
        start = self.ring.rank
        order = call.shards.order(tuple(range(start, start + self.degree)))
        if order is None:
            return None
        orders = self._orders.setdefault(call.shards, {})
        if device not in orders:
            orders[device] = torch.from_numpy(order).to(device)
        return orders[device]


def _of_heads(call: AttentionCall, share: HeadShare) -> AttentionCall:
    """Return the call for the heads of one rank alone."""
    if call.sinks is None:
        return call
    return call._replace(sinks=call.sinks[share.q_heads.start : share.q_heads.stop])


def _put(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Undo `reordered`."""
    return x if order is None else torch.empty_like(x).index_copy_(0, order, x)


def _fold(grad: torch.Tensor, expand: list[int], heads: int) -> torch.Tensor:
    """Sum the gradients of copied heads: [tokens, len(expand), D] to [tokens, heads, D]."""
    index = torch.from_numpy(np.array(expand)).to(grad.device)
    whole = grad.new_zeros(grad.shape[0], heads, grad.shape[2], dtype=accumulation_dtype(grad))
    return whole.index_add_(1, index, grad.to(whole.dtype)).to(grad.dtype)
