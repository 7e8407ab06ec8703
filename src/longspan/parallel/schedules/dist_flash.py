"""DistFlashAttention: contiguous tokens, and ranks that would be idle compute for those that are behind.

In a causal row cut into contiguous pieces rank r has r + 1 blocks to compute, so the first ranks of a plain ring
wait for the last. Here the block of queries p and keys j goes to p while p - j <= world / 2, and to j beyond:

    4 ranks     step 0       step 1       step 2
    rank 0      q0 k0        q3 k0 help   -
    rank 1      q1 k1        q1 k0        -
    rank 2      q2 k2        q2 k1        q2 k0
    rank 3      q3 k3        q3 k2        q3 k1

Helpers get the queries and send the partial output and its lse back, in fp32 or better. Blocks that no document
crosses are neither computed nor sent. LightSeq / DistFlashAttention (arXiv:2310.03294, section 3.2).
"""

from __future__ import annotations

from typing import NamedTuple

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

__all__ = ["DistFlash", "WorkBlock", "blocks_at"]


class WorkBlock(NamedTuple):
    """One block of work: the queries of one rank, the keys of another, computed on one of the two."""

    q_rank: int
    k_rank: int
    worker: int


def blocks_at(step: int, world: int) -> list[WorkBlock]:
    """Return the blocks of a step, 1..world//2, at most one a worker; step 0 is every rank's own block."""
    owned = [WorkBlock(rank, rank - step, rank) for rank in range(step, world)]
    if 2 * step == world:
        return owned
    return owned + [WorkBlock(world - step + rank, rank, rank) for rank in range(step)]


class DistFlash:
    """Balanced causal attention over contiguous pieces; any head count.

    Args:
        group: the ranks that share the sequence; None = this process alone.
    """

    name = "dist_flash"
    layouts: tuple[Layout, ...] = ("contiguous",)

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.channel = Channel(group)
        self.channels: tuple[Channel, ...] = (self.channel,)
        self.rank, self.world = self.channel.rank, self.channel.world

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Accept any: heads stay where they are."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall) -> Forward:
        """Return out of this rank's queries; see `CpSchedule.forward`."""
        partial = Partial(q)
        owned, helped = [torch.stack((k, v))], [q]
        steps = self._steps(call)
        inputs = self._trade(steps, 1, owned, helped)
        bands = call.shards.bands((self.rank,), (self.rank,), window=call.window)
        if len(bands):
            partial.add(*block_forward(q, k, v, bands, call))
        results: list[_Returned] = []
        for step in range(1, len(steps)):
            inputs.transfer.wait()
            coming = self._trade(steps, step + 1, owned, helped)
            block, from_helper = self._mine(steps, step), self._helped(steps, step)
            sends: list[tuple[torch.Tensor, int]] = []
            if block is not None:
                q_block = q if inputs.queries is None else inputs.queries[0]
                k_block, v_block = (k, v) if inputs.keys is None else inputs.keys[0].unbind(0)
                out, lse = block_forward(q_block, k_block, v_block, self._bands(call, block), call)
                if block.q_rank == self.rank:
                    partial.add(out, lse)
                else:
                    dtype = accumulation_dtype(q)
                    sends = [(x.to(dtype).contiguous(), block.q_rank) for x in (out, lse)]
            buffers = [] if from_helper is None else [_buffer(partial.out), _buffer(partial.lse)]
            receives = [] if from_helper is None else [(x, from_helper.worker) for x in buffers]
            results.append(_Returned(buffers, self.channel.exchange(sends, receives)))
            inputs = coming
        for returned in results:
            returned.transfer.wait()
            if returned.buffers:
                partial.add(*returned.buffers)
        out, lse = call.finish(partial, q)
        return out, (q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: tuple[torch.Tensor, ...], call: AttentionCall
    ) -> AllGradients:
        """Return dq, dk, dv of this rank's tokens."""
        q, k, v, out, lse = saved
        dtype = accumulation_dtype(q)
        owned, helped = [torch.stack((k, v))], [torch.stack((q, dout, out)), lse.contiguous()]
        steps = self._steps(call)
        inputs = self._trade(steps, 1, owned, helped)
        dq = torch.zeros_like(q, dtype=dtype)
        dkv_2TKD = torch.zeros((2, *k.shape), dtype=dtype, device=k.device)
        bands = call.shards.bands((self.rank,), (self.rank,), window=call.window)
        if len(bands):
            dq_part, dk, dv = block_backward(dout, q, k, v, out, lse, bands, call)
            dq += dq_part
            dkv_2TKD += torch.stack((dk.to(dtype), dv.to(dtype)))
        results: list[_Returned] = []
        for step in range(1, len(steps)):
            inputs.transfer.wait()
            coming = self._trade(steps, step + 1, owned, helped)
            block = self._mine(steps, step)
            sends: list[tuple[torch.Tensor, int]] = []
            if block is not None:
                q_, dout_, out_ = (q, dout, out) if inputs.queries is None else inputs.queries[0].unbind(0)
                lse_ = lse if inputs.queries is None else inputs.queries[1]
                k_, v_ = (k, v) if inputs.keys is None else inputs.keys[0].unbind(0)
                dq_part, dk, dv = block_backward(
                    dout_, q_, k_, v_, out_, lse_, self._bands(call, block), call
                )
                dkv_part = torch.stack((dk.to(dtype), dv.to(dtype)))
                if block.q_rank == self.rank:
                    dq += dq_part
                    sends = [(dkv_part, block.k_rank)]
                else:
                    dkv_2TKD += dkv_part
                    sends = [(dq_part.to(dtype).contiguous(), block.q_rank)]
            results.append(self._gradients_at(steps, step, sends, dq, dkv_2TKD))
            inputs = coming
        for returned in results:
            returned.transfer.wait()
            for buffer in returned.buffers:
                total = dq if buffer.shape == dq.shape else dkv_2TKD
                total += buffer
        grads = dq.to(q.dtype), dkv_2TKD[0].to(k.dtype), dkv_2TKD[1].to(v.dtype)
        return call.all_gradients(dout, out, lse, grads)

    def _steps(self, call: AttentionCall) -> list[list[WorkBlock]]:
        """Return the blocks of each step that some document crosses and that are this rank's business."""
        return [[]] + [
            [
                b
                for b in blocks_at(step, self.world)
                if self.rank in (b.q_rank, b.k_rank) and len(self._bands(call, b))
            ]
            for step in range(1, self.world // 2 + 1)
        ]

    def _bands(self, call: AttentionCall, block: WorkBlock) -> Bands:
        return call.shards.bands((block.q_rank,), (block.k_rank,), window=call.window)

    def _mine(self, steps: list[list[WorkBlock]], step: int) -> WorkBlock | None:
        return next((block for block in steps[step] if block.worker == self.rank), None)

    def _helped(self, steps: list[list[WorkBlock]], step: int) -> WorkBlock | None:
        """Return the block of this rank's queries that another computes."""
        return next((b for b in steps[step] if b.q_rank == self.rank and b.worker != self.rank), None)

    def _trade(
        self, steps: list[list[WorkBlock]], step: int, owned: list[torch.Tensor], helped: list[torch.Tensor]
    ) -> _Inputs:
        """Start to bring what the blocks of `step` need: keys to those behind, queries to their helpers."""
        if step >= len(steps):
            return _Inputs(None, None, Transfer((), ()))
        sends: list[tuple[torch.Tensor, int]] = []
        for block in steps[step]:
            if block.worker != self.rank:
                tensors = owned if block.k_rank == self.rank else helped
                sends += [(tensor, block.worker) for tensor in tensors]
        mine = self._mine(steps, step)
        keys = queries = None
        receives: list[tuple[torch.Tensor, int]] = []
        if mine is not None and mine.q_rank == self.rank:
            keys = [_buffer(tensor) for tensor in owned]
            receives = [(tensor, mine.k_rank) for tensor in keys]
        elif mine is not None:
            queries = [_buffer(tensor) for tensor in helped]
            receives = [(tensor, mine.q_rank) for tensor in queries]
        return _Inputs(keys, queries, self.channel.exchange(sends, receives))

    def _gradients_at(
        self,
        steps: list[list[WorkBlock]],
        step: int,
        sends: list[tuple[torch.Tensor, int]],
        dq: torch.Tensor,
        dkv_2TKD: torch.Tensor,
    ) -> _Returned:
        """Start to send a gradient to the rank it belongs to and to receive those of this rank."""
        receives: list[tuple[torch.Tensor, int]] = []
        for block in steps[step]:
            if block.worker == self.rank:
                continue
            if block.q_rank == self.rank:
                receives.append((_buffer(dq), block.worker))
            else:
                receives.append((_buffer(dkv_2TKD), block.worker))
        return _Returned([x for x, _ in receives], self.channel.exchange(sends, receives))


def _buffer(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


class _Inputs(NamedTuple):
    """What was sent for one block: keys and values, or queries with what their backward needs."""

    keys: list[torch.Tensor] | None
    queries: list[torch.Tensor] | None
    transfer: Transfer


class _Returned(NamedTuple):
    """What others computed for this rank."""

    buffers: list[torch.Tensor]
    transfer: Transfer
