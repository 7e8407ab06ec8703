"""The mesh: who belongs together, and what is said when the numbers do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from longspan.core.errors import ArgumentError, RunError
from longspan.parallel.launch import spawn_local
from longspan.parallel.mesh import MeshConfig, build_mesh, check_same_batch
from tests.patience import PATIENCE_SECONDS


def members(group: dist.ProcessGroup | None) -> list[int]:
    return [] if group is None else dist.get_process_group_ranks(group)


def describe(rank: int) -> dict[str, Any]:
    """Build two meshes over 4 processes and say who this process is with."""
    found: dict[str, Any] = {}
    mesh = build_mesh(MeshConfig(dp_shard=2, cp_ulysses=2), "cpu", timeout_seconds=PATIENCE_SECONDS)
    found["dp x ulysses"] = (mesh.dp_rank, mesh.cp_rank, members(mesh.dp_group), members(mesh.ulysses_group))
    assert mesh.fsdp is not None and mesh.ring_group is None and mesh.tp_group is None
    found["shards"] = mesh.fsdp.mesh.tolist()
    mesh = build_mesh(MeshConfig(dp_replicate=2, cp_ring=2), "cpu", timeout_seconds=PATIENCE_SECONDS)
    assert mesh.fsdp is not None
    found["replicas"] = (mesh.fsdp.mesh.tolist(), mesh.fsdp.mesh_dim_names)
    mesh = build_mesh(MeshConfig(cp_ring=2, cp_ulysses=2), "cpu", timeout_seconds=PATIENCE_SECONDS)
    found["usp"] = (mesh.cp_rank, mesh.cp_size, members(mesh.ring_group), members(mesh.ulysses_group))
    mesh = build_mesh(MeshConfig(dp_shard=2, tp=2), "cpu", timeout_seconds=PATIENCE_SECONDS)
    assert mesh.fsdp is not None
    found["tp"] = (members(mesh.tp_group), mesh.fsdp.mesh.tolist())
    made: list[Any] = []
    patch = pytest.MonkeyPatch()
    patch.setattr(dist, "new_subgroups_by_enumeration", lambda *args, **_: made.append(args))
    mesh = build_mesh(MeshConfig(cp_ring=4), "cpu", timeout_seconds=PATIENCE_SECONDS)
    patch.undo()
    assert mesh.fsdp is not None
    found["one"] = (len(made), members(mesh.ring_group), members(mesh.cp_group), mesh.fsdp.mesh.tolist())
    return found


def compare(rank: int) -> list[str]:
    mesh = build_mesh(MeshConfig(cp_ring=3), "cpu", timeout_seconds=PATIENCE_SECONDS)
    ids = np.arange(6)
    check_same_batch(mesh, [ids, np.array([0, 6])])
    messages = []
    for other in (np.where(np.arange(6) == 3, 9, ids), ids.astype(np.int32)):
        try:
            check_same_batch(mesh, [other if rank == 1 else ids])
        except RunError as error:
            messages.append(str(error))
    return messages


def test_groups_are_those_of_the_degrees() -> None:
    """Swapped degrees run, with another order of tokens than the layout's: only the groups show it."""
    ranks = spawn_local(describe, 4, timeout_seconds=PATIENCE_SECONDS)
    assert [rank["dp x ulysses"] for rank in ranks] == [
        (0, 0, [0, 2], [0, 1]),
        (0, 1, [1, 3], [0, 1]),
        (1, 0, [0, 2], [2, 3]),
        (1, 1, [1, 3], [2, 3]),
    ]
    assert all(rank["shards"] == [0, 1, 2, 3] for rank in ranks)
    assert all(rank["replicas"] == ([[0, 1], [2, 3]], ("dp_replicate", "dp_shard_cp")) for rank in ranks)
    assert [rank["usp"] for rank in ranks] == [
        (0, 4, [0, 2], [0, 1]),
        (1, 4, [1, 3], [0, 1]),
        (2, 4, [0, 2], [2, 3]),
        (3, 4, [1, 3], [2, 3]),
    ]
    assert [rank["tp"] for rank in ranks] == [
        ([0, 1], [0, 2]),
        ([0, 1], [1, 3]),
        ([2, 3], [0, 2]),
        ([2, 3], [1, 3]),
    ]
    # Ring, sequence and shard groups over the same ranks each had a communicator, with buffers on the device.
    assert all(rank["one"] == (0, *[[0, 1, 2, 3]] * 3) for rank in ranks)


def test_ranks_that_read_different_rows_are_named() -> None:
    """With different rows on the ranks of one sequence everything runs, and nothing that is learnt makes sense."""
    for messages in spawn_local(compare, 3, timeout_seconds=PATIENCE_SECONDS):
        assert len(messages) == 2
        assert all("ranks 1 hold another batch than rank 0" in message for message in messages)


def test_one_process_alone() -> None:
    """The single-process path has no groups, and says how to get more processes."""
    mesh = build_mesh(MeshConfig(), "cpu")
    assert (mesh.world, mesh.cp_size, mesh.dp_size, mesh.fsdp, mesh.is_first) == (1, 1, 1, None, True)
    with pytest.raises(ArgumentError, match=r"(?s)cp_ring 2.*= 4 processes.*torchrun --nproc-per-node 4"):
        build_mesh(MeshConfig(cp_ring=2, cp_ulysses=2), "cpu")
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        MeshConfig(tp=0)
