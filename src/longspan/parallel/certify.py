"""The certificate: every schedule, on every mask, proven equal to one device.

One process group runs its cells: schedule x layout x mask x heads x length. In each the ranks compute a sequence
together, forward and backward, and compare their rows with the plain reference in fp64 over the whole sequence:

    exact     fp64 inputs through the reference kernel         largest difference of any number
    fast      the kernel that trains, in the type it takes     relative 2-norm of the difference, by tensor
    leak      one token of the first document changed          nothing of another document may change, to the bit
    zero      a gradient into the first document only          gradients of all other documents are exactly 0

The kernel that trains takes fp32 on a CPU and bf16 on CUDA, where the flash kernels take nothing wider. A cell that
cannot be (heads that cannot be spread) is listed with its reason. Inputs are N(0, 1), as the narrowest type holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import AttentionForm, AttentionKernel, Bands, attention, choose_kernel
from longspan.kernels.attention.reference import ReferenceKernel
from longspan.parallel.layout import Layout
from longspan.parallel.schedules import (
    SCHEDULES,
    CpSchedule,
    ScheduleName,
    build_schedule,
    sequence_attention,
)
from longspan.parallel.shards import SequenceShards

__all__ = [
    "EXACT_LIMIT",
    "FAST_LIMITS",
    "HALF_GROWTH_LIMIT",
    "CertifyCase",
    "CertifyResult",
    "FastLimits",
    "certify_world",
    "half_growth",
    "half_precision_error",
    "schedules_of",
]

EXACT_LIMIT = 1e-12


class FastLimits(NamedTuple):
    """Of the relative 2-norm of what the kernel that trains gives."""

    forward: float
    gradient: float


FAST_LIMITS = {"float32": FastLimits(2e-6, 1e-5), "bfloat16": FastLimits(6e-3, 1e-2)}
"""By the type that it computes in. One rounding to bf16 is 2e-3, and a lost key is 1e-1."""
HALF_GROWTH_LIMIT = 1.3
"""Allowed growth of bf16's error from the smallest to the largest ring."""

HEADS = ((8, 8), (8, 2), (8, 1), (12, 3))
"""(query heads, key/value heads): no sharing, sharing, one head for all, and a count that few degrees divide."""
LENGTHS = (61, 131)
"""Primes: no world divides them."""
HEAD_DIM = 8
WINDOW = 9
HALF_LENGTH = 512

NOT_RUN = math.nan


class Tensors(NamedTuple):
    """The inputs of one pass over the whole sequence."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
        return Tensors(*map(change, self))


class CertifyCase(NamedTuple):
    """One thing to prove."""

    schedule: str
    degrees: str
    """Ring x Ulysses degree."""
    layout: str
    mask: str
    """causal, documents, window, or documents+window."""
    num_heads: int
    num_kv_heads: int
    length: int


class CertifyResult(NamedTuple):
    """What one cell gave; errors are the worst over ranks, NaN where the cell cannot be."""

    cell: CertifyCase
    world: int
    reason: str
    """Why the cell cannot be; empty if it ran."""
    exact_error: float
    """fp64 against the reference, forward and gradients, largest difference."""
    fast_dtype: str
    """Type that the kernel that trains was given."""
    fast_forward_error: float
    """In that type, relative 2-norm."""
    fast_gradient_error: float
    leaks: int
    """Numbers of other documents that moved, or were not zero."""
    sent_bytes: int
    """Bytes that the busiest rank sent for one forward and backward pass in `fast_dtype`."""

    @property
    def passed(self) -> bool | None:
        """Whether all is within its limit; None for a cell that cannot be."""
        if self.reason:
            return None
        return (
            self.exact_error <= EXACT_LIMIT
            and self.fast_forward_error <= FAST_LIMITS[self.fast_dtype].forward
            and self.fast_gradient_error <= FAST_LIMITS[self.fast_dtype].gradient
            and self.leaks == 0
        )


def certify_world(
    rank: int, names: Sequence[ScheduleName], device_type: str = "cpu"
) -> tuple[list[CertifyResult], dict[str, list[float]]]:
    """Run every cell of the given schedules in the process group there is; all ranks call it.

    Returns:
        The results, and the bf16 error of each schedule by seed; the same on every rank.
    """
    results: list[CertifyResult] = []
    half: dict[str, list[float]] = {}
    device = torch.device(device_type)
    world = dist.get_world_size()
    for name in names:
        schedules = list(schedules_of(name, world, device_type))
        if not schedules:
            cell = CertifyCase(name, "-", "-", "-", 0, 0, 0)
            reason = f"no two degrees above 1 make {world} ranks"
            results.append(_not_run(cell, world, reason))
        for degrees, schedule in schedules:
            for cell in _cells(name, degrees, schedule.layouts):
                results.append(_run(cell, schedule, device))
            key = name if len(schedules) == 1 else f"{name} {degrees}"
            half[key] = [half_precision_error(schedule, seed=seed, device=device) for seed in range(3)]
    return results, half


def schedules_of(name: ScheduleName, world: int, device_type: str) -> Iterator[tuple[str, CpSchedule]]:
    """Yield the degrees and the schedule for every way to split the world that `name` allows."""
    if name == "none":
        raise ArgumentError("there is nothing to certify without context parallelism", found=name)
    entry = SCHEDULES[name]
    if not (entry.rings and entry.trades_heads):
        group = dist.group.WORLD
        on_ring = entry.rings
        yield (
            f"{world}x1" if on_ring else f"1x{world}",
            build_schedule(
                name, ring_group=group if on_ring else None, ulysses_group=None if on_ring else group
            ),
        )
        return
    for ring in range(2, world):
        if world % ring == 0 and world // ring > 1:
            mesh = init_device_mesh(device_type, (ring, world // ring), mesh_dim_names=("ring", "ulysses"))
            groups = mesh["ring"].get_group(), mesh["ulysses"].get_group()
            yield (
                f"{ring}x{world // ring}",
                build_schedule(name, ring_group=groups[0], ulysses_group=groups[1]),
            )


def _cells(name: str, degrees: str, layouts: Sequence[Layout]) -> Iterator[CertifyCase]:
    for layout in layouts:
        for mask in ("causal", "documents", "window", "documents+window"):
            for num_heads, num_kv_heads in HEADS:
                for length in LENGTHS:
                    yield CertifyCase(name, degrees, layout, mask, num_heads, num_kv_heads, length)


def _not_run(cell: CertifyCase, world: int, reason: str) -> CertifyResult:
    return CertifyResult(cell, world, reason, NOT_RUN, "", NOT_RUN, NOT_RUN, 0, 0)


def _run(cell: CertifyCase, schedule: CpSchedule, device: torch.device) -> CertifyResult:
    try:
        schedule.check_heads(cell.num_heads, cell.num_kv_heads)
    except ArgumentError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        return _not_run(cell, schedule.world, reason)
    # Document borders that no layout shares: 7 tokens, 2, an empty one, about half, the rest.
    borders = [0, 7, 9, 9, cell.length // 2, cell.length] if "documents" in cell.mask else [0, cell.length]
    window = WINDOW if "window" in cell.mask else None
    shards = SequenceShards(cell.layout, borders, schedule.world, window=window)  # type: ignore[arg-type]
    seed = cell.length * 1000 + cell.num_heads * 10 + cell.num_kv_heads
    kernel = choose_kernel(device)
    dtype = _trained_dtype(kernel)
    whole = _inputs(shards.num_padded, cell.num_heads, cell.num_kv_heads, seed, dtype)
    reference = [x.to(device) for x in _whole(whole, shards, window)]
    exact = _parallel(whole, shards, schedule, window, device, torch.float64, ReferenceKernel())
    before = _sent(schedule)
    fast = _parallel(whole, shards, schedule, window, device, dtype, kernel)
    sent = _sent(schedule) - before
    mine = torch.from_numpy(shards.indices(schedule.rank)).to(device)
    expected = [x[mine] for x in reference]
    exact_error = _worst([float((a - b).abs().max()) for a, b in zip(exact, expected)])
    # Norms are of whole tensors: sums of squares over ranks, then the root.
    squares = [((a.double() - b).square().sum(), b.square().sum()) for a, b in zip(fast, expected)]
    sums = torch.stack([torch.stack(pair) for pair in squares])
    dist.all_reduce(sums)
    relative = [_worst([error]) for error in (sums[:, 0] / sums[:, 1]).sqrt().tolist()]
    leaks = 0
    if len(borders) > 2:
        leaks = _leaks(whole, fast, shards, schedule, window, device, kernel)
    most = torch.tensor([exact_error, float(leaks), float(sent)], dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return CertifyResult(
        cell, schedule.world, "", float(most[0]), str(dtype).removeprefix("torch."), relative[0],
        max(relative[1:]), int(most[1]), int(most[2]),
    )  # fmt: skip


def _trained_dtype(kernel: AttentionKernel) -> torch.dtype:
    return torch.float32 if kernel.upcasts else torch.bfloat16


def _worst(errors: Sequence[float]) -> float:
    """Return the largest error. What is not a number is infinitely wrong: `max` alone may pass over it."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def _leaks(
    whole: Tensors,
    fast: list[torch.Tensor],
    shards: SequenceShards,
    schedule: CpSchedule,
    window: int | None,
    device: torch.device,
    kernel: AttentionKernel,
) -> int:
    """Return how many numbers of other documents move with a token of the first, or get a gradient from it."""
    first = int(shards.cu_seqlens[1])
    others = torch.from_numpy(shards.indices(schedule.rank) >= first).to(device)
    dtype = fast[0].dtype
    moved = whole.map(torch.clone)
    for x in moved:
        x[first // 2] += 1.0
    again = _parallel(moved, shards, schedule, window, device, dtype, kernel)
    # On CUDA the backward may add in any order, so only the output is held to the bit.
    exact = list(zip(fast, again)) if device.type == "cpu" else [(fast[0], again[0])]
    leaks = sum(int((a[others] != b[others]).sum()) for a, b in exact)
    only = whole.dout.clone()
    only[first:] = 0
    into_first = _parallel(whole._replace(dout=only), shards, schedule, window, device, dtype, kernel)
    return leaks + sum(int((grad[others] != 0).sum()) for grad in into_first[1:])


def _inputs(num_tokens: int, num_heads: int, num_kv_heads: int, seed: int, dtype: torch.dtype) -> Tensors:
    """Return q, k, v and dout of the whole sequence in fp64, N(0, 1) as `dtype` holds it; the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return Tensors(
        *(torch.randn(num_tokens, count, HEAD_DIM, generator=generator).to(dtype).double() for count in heads)
    )


def _whole(whole: Tensors, shards: SequenceShards, window: int | None) -> list[torch.Tensor]:
    """Return out, dq, dk, dv of the whole sequence on one device."""
    q, k, v = (x.clone().requires_grad_() for x in (whole.q, whole.k, whole.v))
    bands = Bands.from_documents(shards.cu_seqlens, window=window)
    out = attention(q, k, v, bands, kernel=ReferenceKernel())
    grads = torch.autograd.grad(out, (q, k, v), whole.dout)
    return [out.detach(), *grads]


def _parallel(
    whole: Tensors,
    shards: SequenceShards,
    schedule: CpSchedule,
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
    kernel: AttentionKernel,
) -> list[torch.Tensor]:
    """Return out, dq, dk, dv of this rank's tokens."""
    mine = torch.from_numpy(shards.indices(schedule.rank))
    q, k, v, dout = (x[mine].to(device, dtype) for x in whole)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = sequence_attention(q, k, v, shards, schedule, AttentionForm(window=window), kernel=kernel)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def half_precision_error(schedule: CpSchedule, *, seed: int, device: torch.device) -> float:
    """Return the RMS error of bf16 against fp64 of the same bf16 numbers, as a share of their RMS.

    One causal document of a fixed length, whatever the world, so that figures of several worlds compare; the
    worst of out, dq, dk and dv.
    """
    shards = SequenceShards(schedule.layouts[0], [0, HALF_LENGTH], schedule.world)
    heads = math.lcm(8, schedule.world)  # what Ulysses can spread
    whole = _inputs(shards.num_padded, heads, heads, seed, torch.bfloat16)
    reference = _whole(whole, shards, None)
    got = _parallel(whole, shards, schedule, None, device, torch.bfloat16, choose_kernel(device))
    mine = torch.from_numpy(shards.indices(schedule.rank))
    pairs = [(a.cpu().double() - b[mine], b[mine]) for a, b in zip(got, reference)]
    sums = torch.tensor([[float(d.square().sum()), float(b.square().sum())] for d, b in pairs], device=device)
    dist.all_reduce(sums)
    return float((sums[:, 0] / sums[:, 1]).sqrt().max())


def half_growth(by_world: dict[int, list[float]]) -> float:
    """Return how many times larger bf16's error is on the largest world than on the smallest, mean over seeds."""
    small, large = by_world[min(by_world)], by_world[max(by_world)]
    return (sum(large) / len(large)) / (sum(small) / len(small))


def _sent(schedule: CpSchedule) -> int:
    return sum(sum(channel.sent.values()) for channel in schedule.channels)
