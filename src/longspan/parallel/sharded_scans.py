"""Layers that go over the tokens one after the other, on a row that several ranks share.

A rank's tokens lie anywhere in the row, so ranks trade them for heads (of a convolution: channels), each goes over the
whole row with its own, and they trade back. What a layer has for each head is sliced; its gradient is what this rank's
heads add to it, to be summed over the ranks as that of every parameter. Beside any schedule of attention.
"""

from __future__ import annotations

import functools

import torch

from longspan.core.errors import ArgumentError
from longspan.kernels.scans import Convolution, Scan, convolve_documents, scan_documents
from longspan.parallel.schedules.base import CpSchedule
from longspan.parallel.shards import SequenceShards
from longspan.parallel.trade import HeadTrade, even_ranges, reordered, shared_heads

__all__ = ["check_state_heads", "sharded_convolution", "sharded_scan"]


def check_state_heads(num_heads: int, world: int) -> None:
    """Refuse a layer with a state that has fewer heads than ranks share a row.

    Raises:
        ArgumentError: with both numbers.
    """
    if num_heads < world:
        raise ArgumentError(
            "a layer with a state has fewer heads than ranks that share a row",
            found=f"{num_heads} heads of the state, {world} ranks",
            allowed=f"at most {num_heads} ranks to a row",
            fix="lower cp_ring x cp_ulysses and raise dp_shard",
        )


def sharded_convolution(call: Convolution, shards: SequenceShards, schedule: CpSchedule) -> torch.Tensor:
    """Return this rank's tokens of a causal convolution of each document, [tokens of this rank, channels].

    Differentiable in x, weight and bias. All ranks of the schedule's group call it with their own tokens.
    """
    channels = call.x.shape[1]
    check_state_heads(channels, schedule.world)
    parts = even_ranges(channels, schedule.world)
    trade = HeadTrade(schedule.channels, [(part,) for part in parts], (channels,))
    mine = parts[HeadTrade.part(schedule.channels)]
    (x,) = trade.to_heads(call.x)
    there, back = _orders(shards, x.device)
    own = slice(mine.start, mine.stop)
    bias = None if call.bias is None else call.bias[own]
    row = call._replace(x=reordered(x, there), weight=call.weight[own], bias=bias)
    (out,) = trade.to_tokens(reordered(convolve_documents(row, shards.state_borders()), back))
    return out


def sharded_scan(scan: Scan, shards: SequenceShards, schedule: CpSchedule) -> torch.Tensor:
    """Return this rank's tokens of a recurrence over each document, [tokens of this rank, heads, ...].

    Differentiable in all tensors and weights. All ranks of the schedule's group call it with their own tokens. Heads
    that do not divide are spread as evenly as can be.

    Raises:
        ArgumentError: fewer heads than ranks.
    """
    check_state_heads(scan.num_heads, schedule.world)
    parts = even_ranges(scan.num_heads, schedule.world)
    counts = tuple(x.shape[1] for x in scan.tensors)
    shares = [[shared_heads(part, scan.num_heads // count) for count in counts] for part in parts]
    mine = shares[HeadTrade.part(schedule.channels)]
    trade = HeadTrade(
        schedule.channels, [tuple(share.kv_heads for share in of_rank) for of_rank in shares], counts
    )
    received = trade.to_heads(*scan.tensors)
    there, back = _orders(shards, received[0].device)
    tensors = []
    for x, share in zip(received, mine):
        ordered = reordered(x, there)
        tensors.append(ordered if share.expand is None else ordered[:, share.expand])
    heads = mine[0].q_heads
    own = slice(heads.start, heads.stop)
    row = scan._replace(
        tensors=tuple(tensors),
        weights=tuple(None if weight is None else weight[own] for weight in scan.weights),
        num_heads=len(heads),
    )
    out, _ = scan_documents(row, shards.state_borders())
    back_trade = HeadTrade(schedule.channels, [(part,) for part in parts], (scan.num_heads,))
    (out,) = back_trade.to_tokens(reordered(out, back))
    return out


@functools.lru_cache(maxsize=2)
def _orders(shards: SequenceShards, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the permutations from rank after rank to the order of the row, and back; None where they are the same."""
    order = shards.order(tuple(range(shards.world)))
    if order is None:
        return None, None
    there = torch.from_numpy(order).to(device)
    return there, torch.argsort(there)
