"""Sinks, chunks, windows and capped scores through every schedule, against one device in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longspan.kernels.attention import AttentionForm, Bands, attention, cut_documents
from longspan.kernels.attention.reference import ReferenceKernel
from longspan.parallel.launch import spawn_local
from longspan.parallel.schedules import CpSchedule, build_schedule, sequence_attention
from longspan.parallel.shards import SequenceShards
from tests.flash_operators import in_process_with_flash
from tests.patience import PATIENCE_SECONDS

BORDERS = [0, 29, 30, 61]
FORMS = [
    {"sinks": True},
    {"sinks": True, "window": 6},
    {"attention_chunk": 7},
    {"sinks": True, "softcap": 1.5, "window": 9, "attention_chunk": 11},
]


def schedules(world: int) -> Iterator[CpSchedule]:
    group = dist.group.WORLD
    for name in ("ring", "striped", "dist_flash", "all_gather"):
        yield build_schedule(name, ring_group=group)
    yield build_schedule("ulysses", ulysses_group=group)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
        yield build_schedule(
            "usp", ring_group=mesh.get_group("ring"), ulysses_group=mesh.get_group("ulysses")
        )


def errors(rank: int, exact: bool) -> dict[tuple[str, str, int], float]:
    """Return the largest difference of each schedule, layout and form, relative to the largest number."""
    world, found = dist.get_world_size(), {}
    for schedule in schedules(world):
        for layout in schedule.layouts[:2]:
            for number, fields in enumerate(FORMS):
                found[schedule.name, layout, number] = error(schedule, layout, fields, exact)
    return found


def error(schedule: CpSchedule, layout: str, fields: dict, exact: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    shards = SequenceShards(layout, BORDERS, schedule.world)
    total, heads = shards.num_padded, (8, 2, 2, 8)
    q, k, v, dout = (torch.randn(total, h, 8, generator=generator, dtype=torch.float64) for h in heads)
    sinks = torch.randn(8, generator=generator, dtype=torch.float64)
    form = AttentionForm(**{**fields, "sinks": sinks.requires_grad_() if "sinks" in fields else None})
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    borders = cut_documents(shards.cu_seqlens, form.attention_chunk)
    kernel = ReferenceKernel(softcap=form.softcap)
    truth = attention(
        *whole, Bands.from_documents(borders, window=form.window), kernel=kernel, sinks=form.sinks
    )
    wanted = [truth, *torch.autograd.grad(truth, [*whole, *([] if form.sinks is None else [sinks])], dout)]
    mine = torch.from_numpy(shards.indices(schedule.rank))
    # The operators' stand-in takes fp32 at the widest.
    dtype = torch.float64 if exact else torch.float32
    local = [x[mine].to(dtype).requires_grad_() for x in (q, k, v)]
    out = sequence_attention(*local, shards, schedule, form, kernel=kernel if exact else None)
    got = [
        out,
        *torch.autograd.grad(out, [*local, *([] if form.sinks is None else [sinks])], dout[mine].to(dtype)),
    ]
    if form.sinks is not None:
        dist.all_reduce(got[4])
    pairs = [(a, b[mine]) for a, b in zip(got[:4], wanted[:4])] + list(zip(got[4:], wanted[4:]))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_schedule_gives_what_one_device_gives(world: int) -> None:
    """Sinks once a rank instead of once a query; cuts by the layout; a gradient of sinks that is not a sum."""
    found = spawn_local(errors, world, True, timeout_seconds=PATIENCE_SECONDS)[0]
    assert len({name for name, _, _ in found}) == (5 if world == 2 else 6)
    assert max(found.values()) <= 1e-12, {key: value for key, value in found.items() if value > 1e-12}


def test_through_the_operators_of_cuda() -> None:
    """The backward pass of the flash kernel is handed out and lse with the sinks in them."""
    found = spawn_local(in_process_with_flash, 2, True, errors, False, timeout_seconds=PATIENCE_SECONDS)[0]
    assert max(found.values()) <= 1e-5, {key: value for key, value in found.items() if value > 1e-5}
