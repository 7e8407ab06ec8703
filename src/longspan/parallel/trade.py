"""Tokens for heads: ranks that share a row trade what they hold, so that each has all tokens of some heads.

Ulysses attention does so, and every layer whose heads (or channels) go over the tokens one after the other. Where the
ranks form a grid (USP), they trade along one side and then along the other.

Shape legend: T = tokens of this rank, R = ranks.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from longspan.kernels.attention.merging import accumulation_dtype
from longspan.parallel.channel import Channel

__all__ = ["HeadShare", "HeadTrade", "even_ranges", "reordered", "shared_heads", "to_heads", "to_tokens"]

Ranges = Sequence[tuple[range, ...]]
"""Of each rank, the heads that it takes of each tensor."""


class HeadShare(NamedTuple):
    """The heads that one rank computes."""

    q_heads: range
    kv_heads: range
    """The heads that `q_heads` look at."""
    expand: list[int] | None
    """For each of `q_heads` the index into `kv_heads`; None where those are shared evenly already."""


def shared_heads(q_heads: range, group: int) -> HeadShare:
    """Return the share of a rank that computes `q_heads`, where so many next to each other look at one head."""
    kv_heads = range(q_heads.start // group, (q_heads.stop - 1) // group + 1)
    used = [head // group - kv_heads.start for head in q_heads]
    per_head = len(q_heads) // len(kv_heads)
    even = len(q_heads) % len(kv_heads) == 0 and used == [i // per_head for i in range(len(used))]
    return HeadShare(q_heads, kv_heads, None if even else used)


def to_heads(channel: Channel, tensors: Sequence[torch.Tensor], ranges: Ranges) -> list[torch.Tensor]:
    """Trade: of each tensor [T, heads, ...] rank r gets `ranges[r]`; returns [R * T, its own range, ...]."""
    out: list[torch.Tensor] = list(tensors)
    for places in _by_type(tensors):
        parts = [
            torch.cat([tensors[i][:, of_rank[i].start : of_rank[i].stop].flatten() for i in places])
            for of_rank in ranges
        ]
        shapes = [(tensors[i].shape[0], len(ranges[channel.rank][i]), *tensors[i].shape[2:]) for i in places]
        sizes = [prod(shape) for shape in shapes]
        received, transfer = channel.all_to_all(parts, [(sum(sizes),)] * channel.world)
        transfer.wait()
        split = [chunk.split(sizes) for chunk in received]
        for index, (i, (tokens, *rest)) in enumerate(zip(places, shapes)):
            out[i] = torch.cat([chunk[index] for chunk in split]).view(channel.world * tokens, *rest)
    return out


def to_tokens(
    channel: Channel, tensors: Sequence[torch.Tensor], ranges: Ranges, num_heads: Sequence[int]
) -> list[torch.Tensor]:
    """Trade back: from [R * T, heads of this rank, ...] to [T, all heads, ...]; copies of a head add up."""
    out: list[torch.Tensor] = list(tensors)
    for places in _by_type(tensors):
        chunks = [tensors[i].chunk(channel.world) for i in places]
        parts = [torch.cat([chunk[rank].flatten() for chunk in chunks]) for rank in range(channel.world)]
        tokens = tensors[places[0]].shape[0] // channel.world
        shapes = [[(tokens, len(of_rank[i]), *tensors[i].shape[2:]) for i in places] for of_rank in ranges]
        sizes = [[prod(shape) for shape in of_rank] for of_rank in shapes]
        received, transfer = channel.all_to_all(parts, [(sum(size),) for size in sizes])
        transfer.wait()
        split = [chunk.split(size) for chunk, size in zip(received, sizes)]
        for index, i in enumerate(places):
            x = tensors[i]
            taken = sum(len(of_rank[i]) for of_rank in ranges)
            dtype = x.dtype if taken == num_heads[i] else accumulation_dtype(x)
            whole = x.new_zeros(tokens, num_heads[i], *x.shape[2:], dtype=dtype)
            for rank, of_rank in enumerate(ranges):
                part = split[rank][index].view(shapes[rank][index])
                whole[:, of_rank[i].start : of_rank[i].stop] += part
            out[i] = whole.to(x.dtype)
    return out


def _by_type(tensors: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Yield the places of tensors that travel together: one buffer holds one type."""
    places = defaultdict(list)
    for i, x in enumerate(tensors):
        places[x.dtype].append(i)
    yield from places.values()


class _GroupTrade(NamedTuple):
    """A trade within one group."""

    channel: Channel
    ranges: list[tuple[range, ...]]
    heads: tuple[int, ...]
    """Of each tensor before the trade."""


class HeadTrade:
    """A trade of some tensors among all ranks that share a row, with gradients.

    Args:
        channels: the groups along the sides of the grid of ranks, ranks next to each other first.
        shares: for each part, as many as ranks, the heads that it has of each tensor; parts follow each other.
        num_heads: heads of each tensor.
    """

    def __init__(
        self, channels: Sequence[Channel], shares: Sequence[tuple[range, ...]], num_heads: tuple[int, ...]
    ) -> None:
        self._stages: list[_GroupTrade] = []
        for channel in channels:
            size = len(shares) // channel.world
            blocks = [shares[i * size : (i + 1) * size] for i in range(channel.world)]
            unions = [
                tuple(range(first.start, last.stop) for first, last in zip(block[0], block[-1]))
                for block in blocks
            ]
            self._stages.append(_GroupTrade(channel, unions, num_heads))
            mine = unions[channel.rank]
            num_heads = tuple(len(heads) for heads in mine)
            shares = [
                tuple(range(part.start - all_.start, part.stop - all_.start) for part, all_ in zip(of, mine))
                for of in blocks[channel.rank]
            ]

    @staticmethod
    def part(channels: Sequence[Channel]) -> int:
        """Return which of the parts is this rank's."""
        place = 0
        for channel in channels:
            place = place * channel.world + channel.rank
        return place

    def to_heads(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return all tokens, rank after rank, of this rank's heads: [R * T, heads, ...] from [T, all heads, ...]."""
        return _Trading.apply(self._forth, self._back, *tensors)

    def to_tokens(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Undo `to_heads`."""
        return _Trading.apply(self._back, self._forth, *tensors)

    def _forth(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        for stage in self._stages:
            tensors = to_heads(stage.channel, tensors, stage.ranges)
        return tuple(tensors)

    def _back(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        for stage in reversed(self._stages):
            tensors = to_tokens(stage.channel, tensors, stage.ranges, stage.heads)
        return tuple(tensors)


_Way = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]


class _Trading(torch.autograd.Function):
    """One way forward, the other way back: where a head is copied, its gradients add up."""

    @staticmethod
    def forward(ctx: Any, way: _Way, undo: _Way, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.undo = undo
        return way(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, None, *ctx.undo(grads))


def reordered(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Return rows of x in another order; None: as they are."""
    return x if order is None else x.index_select(0, order)


def even_ranges(number: int, parts: int) -> list[range]:
    """Return `number` things next to each other in so many parts, as even as can be."""
    edges = np.linspace(0, number, parts + 1).astype(int).tolist()
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]
