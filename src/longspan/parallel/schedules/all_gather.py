"""All-gather attention: every rank collects the keys it needs, one key/value head at a time.

The way of Llama 3 (arXiv:2407.21783, section 3.3.2): simple, works with every mask, and cheap where keys are few
heads. Keys of the next head are on their way while one is computed, so two heads of the whole sequence are in
memory, never all. Gradients of keys are summed over ranks in fp32 or better.

Where documents are short most keys are seen by no other rank: if the ranks need clearly less than everything, each
is sent just the rows that its queries see (an all-to-all in place of the all-gather).

Shape legend: T = tokens of this rank, N = tokens of the sequence, H = query heads, K = key/value heads,
G = H / K, D = head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist

from longspan.kernels.attention import Bands, with_sinks
from longspan.kernels.attention.merging import accumulation_dtype
from longspan.parallel.channel import Channel, Transfer
from longspan.parallel.layout import Layout
from longspan.parallel.schedules.base import (
    AllGradients,
    AttentionCall,
    Forward,
    block_backward,
    block_forward,
)
from longspan.parallel.shards import SequenceShards

__all__ = ["AllGather", "sends_only_needed"]

WORTHWHILE = 0.75
"""Only needed rows are sent if the rank that sends most then sends at most this share of an all-gather."""


class AllGather:
    """Keys and values of the whole sequence on every rank, a head at a time; any head count.

    Args:
        group: the ranks that share the sequence; None = this process alone.
    """

    name = "all_gather"
    layouts: tuple[Layout, ...] = ("balanced", "zigzag", "contiguous")

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.channel = Channel(group)
        self.channels: tuple[Channel, ...] = (self.channel,)
        self.rank, self.world = self.channel.rank, self.channel.world
        self._routes: WeakKeyDictionary[SequenceShards, dict[tuple[int | None, torch.device], _Route]] = (
            WeakKeyDictionary()
        )

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Accept any: heads stay where they are."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall) -> Forward:
        """Return out of this rank's queries; see `CpSchedule.forward`."""
        route = self._route(call, q.device)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))
        coming = route.gather(_head(k, v, 0))
        for head in range(k.shape[1]):
            kv_N2D = coming.wait()
            if head + 1 < k.shape[1]:
                coming = route.gather(_head(k, v, head + 1))
            queries = _queries(q, k, head)
            part, part_lse = block_forward(q[:, queries], kv_N2D[:, :1], kv_N2D[:, 1:], route.bands, call)
            sinks = None if call.sinks is None else call.sinks[queries]
            part, lse[:, queries] = with_sinks(part, part_lse, sinks)
            out[:, queries] = part.to(q.dtype)
        return out, (q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: tuple[torch.Tensor, ...], call: AttentionCall
    ) -> AllGradients:
        """Return dq, dk, dv of this rank's tokens; keys are gathered again."""
        q, k, v, out, lse = saved
        route = self._route(call, q.device)
        dq = torch.empty_like(q)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        coming, leaving = route.gather(_head(k, v, 0)), None
        for head in range(k.shape[1]):
            kv_N2D = coming.wait()
            if head + 1 < k.shape[1]:
                coming = route.gather(_head(k, v, head + 1))
            queries = _queries(q, k, head)
            dq_part, dk_part, dv_part = block_backward(
                dout[:, queries],
                q[:, queries],
                kv_N2D[:, :1],
                kv_N2D[:, 1:],
                out[:, queries],
                lse[:, queries],
                route.bands,
                call,
            )
            dq[:, queries] = dq_part.to(q.dtype)
            if leaving is not None:
                _store(leaving.wait(), dk, dv, head - 1)
            dtype = accumulation_dtype(q)
            leaving = route.scatter(torch.cat((dk_part.to(dtype), dv_part.to(dtype)), dim=1))
        if leaving is not None:
            _store(leaving.wait(), dk, dv, k.shape[1] - 1)
        return call.all_gradients(dout, out, lse, (dq, dk, dv))

    def _route(self, call: AttentionCall, device: torch.device) -> _Route:
        # Kept for the layers, and with its indices on the device: moving them there stops the host.
        routes = self._routes.setdefault(call.shards, {})
        key = call.window, device
        if key not in routes:
            only_needed = sends_only_needed(call.shards, window=call.window)
            routes[key] = (_NeededRows if only_needed else _AllRows)(
                self.channel, call.shards, call.window, device
            )
        return routes[key]


class _Pending(NamedTuple):
    """A tensor on its way."""

    transfer: Transfer
    finish: Callable[[], torch.Tensor]

    def wait(self) -> torch.Tensor:
        self.transfer.wait()
        return self.finish()


class _Route(Protocol):
    """How rows of keys reach this rank, and how their gradients go back."""

    bands: Bands

    def gather(self, local: torch.Tensor) -> _Pending:
        """Start to bring the keys of all ranks: [N, 2, D] in the order of `bands` from [T, 2, D]."""
        ...

    def scatter(self, whole: torch.Tensor) -> _Pending:
        """Start to sum gradients [N, 2, D] over ranks, each keeping its own rows: [T, 2, D]."""
        ...


class _AllRows:
    """Everything to everyone."""

    def __init__(
        self, channel: Channel, shards: SequenceShards, window: int | None, device: torch.device
    ) -> None:
        everyone = tuple(range(shards.world))
        self._channel = channel
        order = shards.order(everyone)
        self._order = None if order is None else torch.from_numpy(order).to(device)
        self.bands = shards.bands((channel.rank,), everyone, window=window)

    def gather(self, local: torch.Tensor) -> _Pending:
        whole, transfer = self._channel.all_gather(local)
        order = self._order
        return _Pending(transfer, lambda: whole if order is None else whole.index_select(0, order))

    def scatter(self, whole: torch.Tensor) -> _Pending:
        if self._order is not None:
            whole = torch.empty_like(whole).index_copy_(0, self._order, whole)
        local, transfer = self._channel.reduce_scatter(whole)
        return _Pending(transfer, lambda: local)


class _NeededRows:
    """To each rank the rows that its queries see; they lie at their place in the sequence, the rest is zero."""

    def __init__(
        self, channel: Channel, shards: SequenceShards, window: int | None, device: torch.device
    ) -> None:
        ranks = range(shards.world)
        self._channel, self._num_padded, self._num_local = channel, shards.num_padded, shards.num_local
        self.bands = shards.bands((channel.rank,), tuple(ranks), window=window)
        me = channel.rank
        sent = [shards.needed_rows(q, me, window=window) for q in ranks]
        self._num_sent = [len(rows_of_rank) for rows_of_rank in sent]
        self._sent = torch.from_numpy(np.concatenate(sent)).to(device)
        rows = [shards.needed_rows(me, k, window=window) for k in ranks]
        self._num_received = [len(rows_of_rank) for rows_of_rank in rows]
        places = np.concatenate([shards.indices(k)[rows[k]] for k in ranks])
        self._places = torch.from_numpy(places).to(device)

    def gather(self, local: torch.Tensor) -> _Pending:
        parts = local.index_select(0, self._sent).split(self._num_sent)
        chunks, transfer = self._channel.all_to_all(
            parts, [(n, *local.shape[1:]) for n in self._num_received]
        )

        def finish() -> torch.Tensor:
            whole = local.new_zeros(self._num_padded, *local.shape[1:])
            return whole.index_copy_(0, self._places, torch.cat(chunks))

        return _Pending(transfer, finish)

    def scatter(self, whole: torch.Tensor) -> _Pending:
        parts = whole.index_select(0, self._places).split(self._num_received)
        chunks, transfer = self._channel.all_to_all(parts, [(n, *whole.shape[1:]) for n in self._num_sent])

        def finish() -> torch.Tensor:
            local = whole.new_zeros(self._num_local, *whole.shape[1:])
            for rows, chunk in zip(self._sent.split(self._num_sent), chunks):
                local.index_add_(0, rows, chunk)
            return local

        return _Pending(transfer, finish)


def sends_only_needed(shards: SequenceShards, *, window: int | None) -> bool:
    """Return whether ranks send rows by need instead of all of them; the same answer on every rank."""
    needed = shards.needed_counts(window=window)
    np.fill_diagonal(needed, 0)
    return bool(needed.sum(axis=0).max() <= WORTHWHILE * (shards.world - 1) * shards.num_local)


def _head(k: torch.Tensor, v: torch.Tensor, head: int) -> torch.Tensor:
    """Return keys and values of one head side by side, [T, 2, D]."""
    return torch.stack((k[:, head], v[:, head]), dim=1)


def _queries(q: torch.Tensor, k: torch.Tensor, head: int) -> slice:
    group = q.shape[1] // k.shape[1]
    return slice(head * group, (head + 1) * group)


def _store(grad_T2D: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, head: int) -> None:
    dk[:, head], dv[:, head] = grad_T2D[:, 0].to(dk.dtype), grad_T2D[:, 1].to(dv.dtype)
