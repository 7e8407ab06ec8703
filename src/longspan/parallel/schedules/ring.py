"""Ring attention: keys and values go round, each rank computes its queries against the visiting block.

At step t rank r holds the keys of rank r - t. While it computes on them the next ones are on their way: two
buffers, one transfer in flight. A block goes only as far as some rank still has a query that sees one of its
keys (`SequenceShards.reach`): the last block of a causal row goes nowhere, a row of short documents hardly sends.
In the backward pass keys go round again, and their gradients, summed in fp32, travel with them and then home.

Ring Attention (arXiv:2310.01889); the zigzag order after github.com/zhuzilin/ring-flash-attention; striped order
after arXiv:2311.09431. With zigzag every rank has the same work in one long causal document; with striped also
at every step and whatever the documents; `contiguous` and `balanced` run too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from longspan.kernels.attention import Bands
from longspan.kernels.attention.merging import accumulation_dtype
from longspan.parallel.channel import Channel, Transfer
from longspan.parallel.layout import Layout
from longspan.parallel.schedules.base import (
    AllGradients,
    AttentionCall,
    Forward,
    Partial,
    block_backward,
    block_forward,
)
from longspan.parallel.shards import Ranks

__all__ = ["Ring"]


class Ring:
    """Keys and values visit every place of the ring in turn; any head count, any layout.

    Args:
        group: one process of each place; None = there is one place.
        name: as in a recipe.
        layouts: layouts to accept, the schedule's own choice first.
        ranks_per_place: consecutive ranks of the sequence whose tokens stand together at one place.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        name: str = "ring",
        layouts: tuple[Layout, ...] = ("zigzag", "contiguous", "balanced", "striped"),
        ranks_per_place: int = 1,
    ) -> None:
        self.name, self.layouts = name, layouts
        self.channel = Channel(group)
        self.channels: tuple[Channel, ...] = (self.channel,)
        self.place, self.num_places = self.channel.rank, self.channel.world
        self.rank, self.world = self.place * ranks_per_place, self.num_places * ranks_per_place
        self._places: list[Ranks] = [
            tuple(range(start, start + ranks_per_place)) for start in range(0, self.world, ranks_per_place)
        ]

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Accept any: heads stay where they are."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall) -> Forward:
        """Return out of this place's queries; see `CpSchedule.forward`."""
        reach = call.shards.reach(self._places, window=call.window)
        partial = Partial(q)
        kv_2TKD: torch.Tensor | None = torch.stack((k, v))
        for step in range(self.num_places):
            arriving, transfer = self._pass_on(kv_2TKD, k, reach, step)
            bands = self._bands(call, step)
            if kv_2TKD is not None and len(bands):
                partial.add(*block_forward(q, kv_2TKD[0], kv_2TKD[1], bands, call))
            transfer.wait()
            kv_2TKD = arriving
        out, lse = call.finish(partial, q)
        return out, (q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: tuple[torch.Tensor, ...], call: AttentionCall
    ) -> AllGradients:
        """Return dq, dk, dv of this place's tokens.

        The gradient of a block starts at the first visitor, is passed on with the block, and comes home from
        the last one, all in fp32 or better; what this place adds to its own block never travels.
        """
        q, k, v, out, lse = saved
        if self.num_places == 1:
            # Nothing to sum: no copies in fp32.
            parts = block_backward(dout, q, k, v, out, lse, self._bands(call, 0), call)
            dq_own, dk_own, dv_own = (part.to(x.dtype) for part, x in zip(parts, (q, k, v)))
            return call.all_gradients(dout, out, lse, (dq_own, dk_own, dv_own))
        reach = call.shards.reach(self._places, window=call.window)
        dtype = accumulation_dtype(q)
        dq: torch.Tensor | None = None
        own_2TKD: torch.Tensor | None = None
        home_2TKD: torch.Tensor | None = None
        kv_2TKD: torch.Tensor | None = torch.stack((k, v))
        # Gradient of the visiting block so far, and the transfer that brings it.
        carried_2TKD: torch.Tensor | None = None
        carrying = Transfer((), ())
        for step in range(self.num_places):
            arriving, transfer = self._pass_on(kv_2TKD, k, reach, step)
            bands = self._bands(call, step)
            part_2TKD: torch.Tensor | None = None
            if kv_2TKD is not None and len(bands):
                dq_part, dk, dv = block_backward(dout, q, kv_2TKD[0], kv_2TKD[1], out, lse, bands, call)
                dq = dq_part.to(dtype) if dq is None else dq.add_(dq_part)
                part_2TKD = torch.stack((dk.to(dtype), dv.to(dtype)))
            carrying.wait()
            if step == 0:
                own_2TKD = part_2TKD
            # Every token sees itself, so the first step has always a part.
            assert dq is not None and own_2TKD is not None
            if step > 0:
                carried_2TKD, back_2TKD, carrying = self._carry(
                    _sum(carried_2TKD, part_2TKD), own_2TKD, reach, step
                )
                home_2TKD = home_2TKD if back_2TKD is None else back_2TKD
            transfer.wait()
            kv_2TKD = arriving
        carrying.wait()
        assert dq is not None and own_2TKD is not None
        if home_2TKD is not None:
            own_2TKD += home_2TKD
        grads = dq.to(q.dtype), own_2TKD[0].to(k.dtype), own_2TKD[1].to(v.dtype)
        return call.all_gradients(dout, out, lse, grads)

    def _bands(self, call: AttentionCall, step: int) -> Bands:
        visitor = (self.place - step) % self.num_places
        return call.shards.bands(self._places[self.place], self._places[visitor], window=call.window)

    def _pass_on(
        self, kv_2TKD: torch.Tensor | None, k: torch.Tensor, reach: list[int], step: int
    ) -> tuple[torch.Tensor | None, Transfer]:
        """Start sending the block of this step to the next place and receiving the one of the next step."""
        here, before = (self.place - step) % self.num_places, (self.place - step - 1) % self.num_places
        sends, receives = [], []
        if kv_2TKD is not None and step < reach[here]:
            sends.append((kv_2TKD, (self.place + 1) % self.num_places))
        arriving = k.new_empty((2, *k.shape)) if step < reach[before] else None
        if arriving is not None:
            receives.append((arriving, (self.place - 1) % self.num_places))
        return arriving, self.channel.exchange(sends, receives)

    def _carry(
        self, carried_2TKD: torch.Tensor | None, like_2TKD: torch.Tensor, reach: list[int], step: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Transfer]:
        """Start sending the visiting block's gradient on, or home from its last place; step >= 1.

        Returns the buffer for the next visitor's gradient and the one for this place's own, None if none comes.
        """
        size = self.num_places
        here, before = (self.place - step) % size, (self.place - step - 1) % size
        sends, receives = [], []
        if step <= reach[here]:
            # A rank that only handed the block on has nothing to add, but the sum of those before it to pass.
            gradient = torch.zeros_like(like_2TKD) if carried_2TKD is None else carried_2TKD
            sends.append((gradient, (self.place + 1) % size if step < reach[here] else here))
        next_2TKD = torch.empty_like(like_2TKD) if step < reach[before] else None
        if next_2TKD is not None:
            receives.append((next_2TKD, (self.place - 1) % size))
        back_2TKD = torch.empty_like(like_2TKD) if step == reach[self.place] else None
        if back_2TKD is not None:
            receives.append((back_2TKD, (self.place + step) % size))
        return next_2TKD, back_2TKD, self.channel.exchange(sends, receives)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a.add_(b)
