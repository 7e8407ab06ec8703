"""Seconds of a training step from bytes, FLOPs and link speeds: which schedule suits which context and how many GPUs.

A layer of one micro-step (one sequence over the ranks of the sequence group), per pass:

    compute   FLOPs / (peak * share * rows / (rows + half)),  rows = queries of one kernel call; the share of
              matrices and of attention, forward and backward: plan.efficiency
    ring      degree blocks; the next one travels while a block is computed: max of the two, degree - 1 times
    dist_flash   the same with half as many steps of whole blocks; in an even world half the ranks idle in the last
    ulysses   trades are waited for: compute + trades
    usp       both: trades, and between them a ring
    all_gather a head at a time, the next on its way meanwhile: the first gather and the last scatter are waited for
    FSDP      parameters of the next layer travel meanwhile: max of it with all the rest

Passes: forward, and in the backward pass the recomputed forward and the backward itself (attention 2.5 times the
forward: scores are recomputed; matrices twice). The sequence is one causal document. Of the links:

    inside a node       NVLink, all GPUs at once
    ring between nodes  neighbours talk: where one rank a node is at the border, one adapter carries it all
    collectives         all adapters of a node at once (as NCCL's rings do)

What is not in it: stragglers, memory traffic of merges and norms, data loading, checkpoints, pipeline or tensor
parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from longspan.core.mesh_config import MeshConfig
from longspan.plan.communication import AttentionShape, bytes_sent
from longspan.plan.efficiency import gpu_shares
from longspan.plan.hardware import CPU, Gpu
from longspan.plan.memory import BYTES, SUM_BYTES
from longspan.plan.models import FLOPS_OF_STATE, ModelShape

__all__ = [
    "HALF_ROWS",
    "LINK_EFFICIENCY",
    "LayerSeconds",
    "arrangement_name",
    "arrangements",
    "attention_seconds",
    "half_rows",
    "kind_seconds",
    "layer_seconds",
    "sum_seconds",
]

HALF_ROWS = 512
"""Rows at which a kernel call reaches half of that: a guess, which decides little (see benchmarks/parallel.md)."""
CPU_HALF_ROWS = 16
LINK_EFFICIENCY = 0.8
"""Share of a link's paper bandwidth that large messages reach."""
LATENCY = 10e-6
"""Seconds before the first byte of a message, inside a node; twice that between nodes."""
LAUNCH = 20e-6
"""Seconds to start one block of a ring."""


class LayerSeconds(NamedTuple):
    """Seconds of one layer on one rank, and of the output head."""

    linear: float
    """A forward pass of the matrices."""
    forward: float
    """Attention, forward, with what it waits for."""
    backward: float
    gather: float
    """FSDP: the parameters of a layer."""
    scatter: float
    """FSDP: their gradients."""
    head: float
    """A forward pass of the output head."""
    free: tuple[float, float]
    """Attention forward and backward, if communication took no time."""


class _Links(NamedTuple):
    """Bytes a second and latency between the ranks of a group that lie next to each other or in every `stride`-th."""

    neighbour: float
    collective: float
    latency: float


def layer_seconds(
    model: ModelShape,
    gpu: Gpu,
    parallel: MeshConfig,
    *,
    context: int,
    num_gpus: int,
    kernel: str | None = None,
) -> list[LayerSeconds]:
    """Return what a layer of each kind takes in one micro-step; parameters are sharded over all GPUs."""
    return [
        kind_seconds(kind, gpu, parallel, context=context, num_gpus=num_gpus, kernel=kernel)
        for kind in model.kinds
    ]


def kind_seconds(
    model: ModelShape,
    gpu: Gpu,
    parallel: MeshConfig,
    *,
    context: int,
    num_gpus: int,
    kernel: str | None = None,
) -> LayerSeconds:
    """Return what a layer of one kind takes in one micro-step, part by part."""
    tokens = -(-context // parallel.cp)
    shares = gpu_shares(gpu, kernel)
    linear = _seconds(
        tokens * (2 * model.layer_active + FLOPS_OF_STATE * model.state), gpu, tokens, shares.linear
    )
    forward, forward_free = attention_seconds(
        model, gpu, parallel, context=context, backward=False, kernel=kernel
    )
    backward, backward_free = attention_seconds(
        model, gpu, parallel, context=context, backward=True, kernel=kernel
    )
    gather, scatter = _fsdp(model, gpu, num_gpus)
    head = _seconds(2 * tokens * model.vocab * model.hidden, gpu, tokens, shares.linear)
    return LayerSeconds(linear, forward, backward, gather, scatter, head, (forward_free, backward_free))


def arrangements(model: ModelShape, gpu: Gpu, world: int) -> Iterator[MeshConfig]:
    """Yield every schedule and arrangement of `world` ranks; heads are traded inside a node where a ring goes round."""
    if world == 1:
        yield MeshConfig(schedule="none")
        return
    yield MeshConfig(cp_ring=world, schedule="ring")
    yield MeshConfig(cp_ring=world, schedule="dist_flash")
    yield MeshConfig(cp_ring=world, schedule="all_gather")
    if all(kind.heads % world == 0 for kind in model.kinds):
        yield MeshConfig(cp_ulysses=world, schedule="ulysses")
    for ulysses in (2, 4, 8, 16, 32, 64):
        if (
            ulysses <= gpu.per_node
            and ulysses < world
            and world % ulysses == 0
            and all(kind.heads % ulysses == 0 for kind in model.kinds)
        ):
            yield MeshConfig(cp_ring=world // ulysses, cp_ulysses=ulysses, schedule="usp")


def arrangement_name(parallel: MeshConfig) -> str:
    """Return the schedule and its degrees in short: `usp 2x4`, `ring 8`."""
    name = parallel.schedule_name
    if name == "usp":
        return f"usp {parallel.cp_ulysses}x{parallel.cp_ring}"
    return name if parallel.cp == 1 else f"{name} {parallel.cp}"


def half_rows(gpu: Gpu) -> int:
    """Return the rows at which a kernel call reaches half its speed."""
    return CPU_HALF_ROWS if gpu.family == CPU else HALF_ROWS


def sum_seconds(gpu: Gpu, world: int, size: float) -> float:
    """Return seconds in which `world` GPUs have the sum of what each has, `size` bytes: a ring sends it twice."""
    if world == 1:
        return 0.0
    links = _links(gpu, world, 1)
    return 2 * size * (world - 1) / world / links.collective + links.latency * math.log2(2 * world)


def _seconds(flops: float, gpu: Gpu, rows: int, share: float) -> float:
    return flops / (gpu.flops * share * rows / (rows + half_rows(gpu)))


def _links(gpu: Gpu, world: int, stride: int) -> _Links:
    """Return the links of `world` ranks, every `stride`-th of those that lie side by side."""
    inside = gpu.nvlink * LINK_EFFICIENCY
    if world * stride <= gpu.per_node:
        return _Links(inside, inside, LATENCY)
    adapter = gpu.network * LINK_EFFICIENCY
    # Ranks of the group in one node share its adapters in a collective; the other groups need theirs.
    in_node = max(1, gpu.per_node // stride)
    return _Links(adapter, min(inside, in_node * adapter), 2 * LATENCY)


def attention_seconds(
    model: ModelShape,
    gpu: Gpu,
    parallel: MeshConfig,
    *,
    context: int,
    backward: bool,
    kernel: str | None = None,
) -> tuple[float, float]:
    """Return seconds of one layer's attention on one rank, one pass, and what they were with free communication."""
    schedule, ring, ulysses = parallel.planned_schedule, parallel.cp_ring, parallel.cp_ulysses
    tokens = -(-context // parallel.cp)
    if not model.heads:
        return 0.0, 0.0
    # What attention computes: values that are narrower than keys are filled up.
    flops = (
        4
        * float(model.pairs(context))
        * model.heads
        * model.held_dim
        / parallel.cp
        * (2.5 if backward else 1.0)
    )
    shape = AttentionShape(tokens, model.heads, model.kv_heads, model.held_dim, BYTES)
    direction = int(backward)
    share = gpu_shares(gpu, kernel)[1 + direction]
    # Ranks differ in dist_flash only, where the first sends most forward and the last most backward.
    total = max(
        bytes_sent(schedule, shape, ring_degree=ring, ulysses_degree=ulysses, rank=rank)[direction]
        for rank in (0, parallel.cp - 1)
    )
    traded = bytes_sent("ulysses", shape, ulysses_degree=ulysses)[direction]
    trade = _trade(gpu, ulysses, traded)
    if ring == 1:
        compute = _seconds(flops, gpu, context, share)
        return compute + trade, compute
    rows = tokens * ulysses
    links = _links(gpu, ring, ulysses)
    if schedule == "all_gather":
        compute = _seconds(flops, gpu, rows, share)
        return _by_head(compute, total, links, model.kv_heads, ring, backward=backward), compute
    if schedule == "dist_flash":
        # Whole blocks after half a one; perfect balance would be `ring` half blocks.
        steps = ring // 2
        block = _seconds(flops, gpu, rows, share) * 2 / ring + LAUNCH
        first = block / 2
    else:
        # Zigzag: half the queries see a whole block, or all of them half of one.
        steps = ring - 1
        block = _seconds(flops, gpu, rows // 2, share) / ring + LAUNCH
        first = block
    transfer = (total - traded) / steps / links.neighbour + links.latency
    return trade + first + steps * max(block, transfer), first + steps * block


def _trade(gpu: Gpu, degree: int, total: int) -> float:
    """Return seconds of the two all-to-alls of a pass, nothing else running."""
    if degree == 1:
        return 0.0
    outside = max(0, degree - gpu.per_node) / (degree - 1)
    inside_seconds = total * (1 - outside) / (gpu.nvlink * LINK_EFFICIENCY)
    outside_seconds = total * outside / (gpu.network * LINK_EFFICIENCY)
    return max(inside_seconds, outside_seconds) + 2 * LATENCY * math.log2(2 * degree)


def _by_head(
    compute: float, total: float, links: _Links, heads: int, degree: int, *, backward: bool
) -> float:
    """Return seconds of all-gather attention: head i + 1 arrives, and gradients of head i - 1 leave, meanwhile."""
    latency = links.latency * math.log2(2 * degree)
    of_head = total / heads / links.collective + latency
    first = of_head * BYTES / (BYTES + SUM_BYTES) if backward else of_head
    last = of_head - first
    head = compute / heads
    return first + (heads - 1) * max(head, of_head) + head + last


def _fsdp(model: ModelShape, gpu: Gpu, num_gpus: int) -> tuple[float, float]:
    """Return seconds to gather one layer's parameters and to scatter its gradients, fp32 sums."""
    if num_gpus == 1:
        return 0.0, 0.0
    links = _links(gpu, num_gpus, 1)
    elements = model.layer_parameters * (num_gpus - 1) / num_gpus
    latency = links.latency * math.log2(2 * num_gpus)
    return (
        elements * BYTES / links.collective + latency,
        elements * SUM_BYTES / links.collective + latency,
    )
