"""Run the real schedules under gloo and count what every rank sends."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from longspan.kernels.attention import AttentionForm
from longspan.kernels.attention.reference import ReferenceKernel
from longspan.parallel.schedules import build_schedule, sequence_attention
from longspan.parallel.shards import SequenceShards


class Case(NamedTuple):
    """One attention call."""

    schedule: str
    layout: str
    ring: int
    ulysses: int
    heads: int
    kv_heads: int
    cu_seqlens: tuple[int, ...]
    window: int | None = None
    dtype: str = "float32"
    head_dim: int = 8


def needed_rows(shards: SequenceShards, window: int | None) -> np.ndarray:
    """Return rows of rank k that some query of rank q sees: int64 [q, k]."""
    ranks = range(shards.world)
    return np.array([[len(shards.needed_rows(q, k, window=window)) for k in ranks] for q in ranks])


def count(cases: list[Case], world: int) -> list[list[tuple[int, int]]]:
    """Return, for each case, what each of `world` ranks sent forward and backward."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world, cases, folder), nprocs=world)
        of_ranks = [np.load(Path(folder) / f"{rank}.npy") for rank in range(world)]
    return [[tuple(int(x) for x in of_rank[i]) for of_rank in of_ranks] for i in range(len(cases))]


def _rank(rank: int, world: int, cases: list[Case], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        groups: dict[tuple[int, int], tuple[Any, Any]] = {}
        sent = []
        for case in cases:
            degrees = (case.ring, case.ulysses)
            if degrees not in groups:
                groups[degrees] = _groups(rank, *degrees)
            sent.append(_attend(case, *groups[degrees]))
        np.save(f"{folder}/{rank}.npy", np.array(sent))
    finally:
        dist.destroy_process_group()


def _groups(rank: int, ring: int, ulysses: int) -> tuple[Any, Any]:
    mine: list[Any] = [None, None]
    rings = [[place * ulysses + i for place in range(ring)] for i in range(ulysses)]
    places = [[place * ulysses + i for i in range(ulysses)] for place in range(ring)]
    for i, lists in enumerate((rings, places)):
        for ranks in lists:
            group = dist.new_group(ranks)
            if rank in ranks and len(ranks) > 1:
                mine[i] = group
    return mine[0], mine[1]


def _attend(case: Case, ring_group: Any, ulysses_group: Any) -> tuple[int, int]:
    schedule = build_schedule(case.schedule, ring_group=ring_group, ulysses_group=ulysses_group)
    shards = SequenceShards(case.layout, case.cu_seqlens, case.ring * case.ulysses, window=case.window)
    dtype = getattr(torch, case.dtype)
    tensors = [
        torch.randn(shards.num_local, heads, case.head_dim, dtype=dtype, requires_grad=True)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    ]
    channels = [schedule.channel, *([schedule.ring.channel] if hasattr(schedule, "ring") else [])]
    out = sequence_attention(
        *tensors, shards, schedule, AttentionForm(window=case.window), kernel=ReferenceKernel()
    )
    forward = sum(sum(channel.sent.values()) for channel in channels)
    out.sum().backward()
    return forward, sum(sum(channel.sent.values()) for channel in channels) - forward
