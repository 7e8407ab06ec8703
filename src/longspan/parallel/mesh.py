"""The ranks of a run on a grid: data parallel x context parallel x tensor parallel, its groups made once.

    rank = ((((replica * dp_shard + shard) * cp_ring + ring) * cp_ulysses + ulysses) * tp + tp_rank

    dp_replicate   copies of the sharded model (HSDP): gradients are summed over them
    dp_shard       ranks that share the parameters and read different rows
    cp_ring        ranks that share the rows too; keys and values go round among them
    cp_ulysses     ranks that share the rows too; heads are dealt among them
    tp             ranks that share each matrix

Ranks next to each other communicate most, so tensor and ulysses groups come to lie inside a machine. Parameters are
sharded over dp_shard and both cp dimensions: ranks that share a sequence hold the same parameters anyway.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh

from longspan.core.errors import ArgumentError, RunError
from longspan.core.mesh_config import MeshConfig

__all__ = ["Mesh", "MeshConfig", "build_mesh", "check_same_batch"]

LAUNCH = "torchrun --nproc-per-node {world} -m longspan train RECIPE"


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process' place on the grid, and the groups through it. A group of one process is None."""

    config: MeshConfig
    device: torch.device
    rank: int
    dp_rank: int
    """Which share of a step's rows this rank reads, of `dp_size`."""
    dp_size: int
    cp_rank: int
    """Place in the group that shares a sequence, ring rank * cp_ulysses + ulysses rank, of `cp_size`."""
    cp_size: int
    ring_group: dist.ProcessGroup | None
    ulysses_group: dist.ProcessGroup | None
    cp_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    tp_group: dist.ProcessGroup | None
    fsdp: DeviceMesh | None
    """(dp_replicate, dp_shard x cp), or (dp_shard x cp) without replicas; None without torch.distributed."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.config.world

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0


def build_mesh(config: MeshConfig, device: torch.device | str, *, timeout_seconds: float = 600.0) -> Mesh:
    """Make the groups of a mesh; every process of the run calls it once, at the start.

    Where torch.distributed was not initialised, this is a mesh of one process without groups.

    Args:
        config: the degrees.
        device: where this process computes.
        timeout_seconds: how long a collective of these groups waits for the others.

    Raises:
        ArgumentError: the degrees do not multiply to the number of processes.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    _check(config, world)
    device = torch.device(device)
    if not dist.is_initialized():
        nobody = {name: None for name in ("ring_group", "ulysses_group", "cp_group", "dp_group", "tp_group")}
        return Mesh(
            config=config, device=device, rank=0, dp_rank=0, dp_size=1, cp_rank=0, cp_size=1, fsdp=None, **nobody
        )  # fmt: skip
    rank = dist.get_rank()
    replicas, shards, ring, ulysses, tp = config.degrees
    grid = np.arange(world).reshape(config.degrees)
    place = [int(coordinate) for coordinate in np.argwhere(grid == rank)[0]]
    timeout = timedelta(seconds=timeout_seconds)

    everyone = dist.group.WORLD
    assert everyone is not None
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def group(*axes: int) -> dist.ProcessGroup:
        """One group for the same ranks: on CUDA each has a communicator, with buffers on the device."""
        axes = tuple(axis for axis in axes if config.degrees[axis] > 1)
        if prod(config.degrees[axis] for axis in axes) == world:
            return everyone
        if axes not in groups:
            groups[axes] = _group_along(grid, axes, timeout)
        return groups[axes]

    ring_group = group(2) if ring > 1 else None
    ulysses_group = group(3) if ulysses > 1 else None
    cp_group = group(2, 3) if ring * ulysses > 1 else None
    dp_group = group(0, 1) if replicas * shards > 1 else None
    tp_group = group(4) if tp > 1 else None
    shard_group = group(1, 2, 3)
    replica_group = group(0) if replicas > 1 else None
    for made in (ring_group, ulysses_group):
        if made is not None:
            # The first transfers of a NCCL group must come from all of its ranks. Not a barrier: in a group that
            # has gloo too, that may be gloo's.
            dist.all_reduce(torch.zeros(1, device=device), group=made)
    return Mesh(
        config=config,
        device=device,
        rank=rank,
        dp_rank=place[0] * shards + place[1],
        dp_size=replicas * shards,
        cp_rank=place[2] * ulysses + place[3],
        cp_size=ring * ulysses,
        ring_group=ring_group,
        ulysses_group=ulysses_group,
        cp_group=cp_group,
        dp_group=dp_group,
        tp_group=tp_group,
        fsdp=_fsdp_mesh(grid, place, device.type, shard_group, replica_group),
    )


def check_same_batch(mesh: Mesh, arrays: Sequence[NDArray]) -> None:
    """Refuse ranks that share a sequence but were given different ones; all of the group call it.

    Raises:
        RunError: naming the ranks (of the whole run) that hold something else than the first of the group.
    """
    if mesh.cp_group is None:
        return
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(mesh.device)
    everyone = [torch.empty_like(mine) for _ in range(mesh.cp_size)]
    dist.all_gather(everyone, mine, group=mesh.cp_group)
    ranks = dist.get_process_group_ranks(mesh.cp_group)
    other = [rank for rank, theirs in zip(ranks, everyone) if not torch.equal(theirs, everyone[0])]
    if other:
        raise RunError(
            "ranks that share a sequence were given different batches",
            found=f"ranks {', '.join(map(str, other))} hold another batch than rank {ranks[0]}",
            allowed=f"the same tokens, labels and documents on ranks {', '.join(map(str, ranks))}",
            fix="read rows by the data-parallel rank (Mesh.dp_rank), not by the rank of the process",
        )


def _check(config: MeshConfig, world: int) -> None:
    if config.world == world:
        return
    if world == 1:
        raise ArgumentError(
            "the degrees of parallelism ask for several processes, but this is one alone",
            found=f"{config} = {config.world} processes",
            fix=f"start it with `{LAUNCH.format(world=config.world)}`, or set the degrees to 1",
        )
    raise ArgumentError(
        "the degrees of parallelism do not multiply to the number of processes",
        found=f"{config} = {config.world}, but {world} processes",
        fix=f"start {config.world} processes, or choose degrees whose product is {world}",
    )


def _group_along(grid: NDArray[np.int64], axes: tuple[int, ...], timeout: timedelta) -> dist.ProcessGroup:
    """Return this process' group along `axes` of the grid, which are next to each other."""
    last = np.moveaxis(grid, axes, range(-len(axes), 0))
    rows = last.reshape(-1, prod(grid.shape[axis] for axis in axes)).tolist()
    group, _ = dist.new_subgroups_by_enumeration(rows, timeout=timeout)
    return group


def _fsdp_mesh(
    grid: NDArray[np.int64],
    place: list[int],
    device_type: str,
    shard_group: dist.ProcessGroup,
    replica_group: dist.ProcessGroup | None,
) -> DeviceMesh:
    # Those with this process' place in its matrices: the only ones with whom it shares parameters.
    ranks = grid[..., place[4]].reshape(grid.shape[0], -1)
    if replica_group is None:
        return DeviceMesh.from_group(shard_group, device_type, mesh_dim_names=("dp_shard_cp",))
    return DeviceMesh.from_group(
        [replica_group, shard_group],
        device_type,
        mesh=torch.from_numpy(ranks.copy()),
        mesh_dim_names=("dp_replicate", "dp_shard_cp"),
    )
