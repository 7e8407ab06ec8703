"""Layers with a state under every schedule, as `longspan doctor --certify --layers` proves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import ModuleList
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock, NemotronHConfig

from longspan.core.errors import ArgumentError
from longspan.kernels.scans import Scan, scan_documents
from longspan.models.certify_layers import LAYER_KINDS, LayerResult, certify_layers
from longspan.models.mixers import check_states
from longspan.parallel.launch import spawn_local
from longspan.parallel.schedules import SCHEDULES, build_schedule
from longspan.parallel.sharded_scans import sharded_scan
from longspan.parallel.shards import SequenceShards
from tests.patience import PATIENCE_SECONDS

NAMES = [name for name in SCHEDULES if name != "none"]


def _certified(rank: int, kinds: list[str], names: list[Any]) -> tuple[list[LayerResult], list[float]]:
    return certify_layers(rank, kinds, names), _uneven(rank, dist.get_world_size())


@pytest.mark.parametrize(
    ("world", "kinds", "names"),
    [
        (2, ["gdn", "mamba2", "conv"], ["striped", "ulysses"]),
        pytest.param(2, list(LAYER_KINDS), NAMES, marks=pytest.mark.slow),
        pytest.param(4, list(LAYER_KINDS), NAMES, marks=pytest.mark.slow),
    ],
)
def test_layers_with_a_state_give_what_one_device_gives(
    world: int, kinds: list[str], names: list[str]
) -> None:
    """Tokens of a rank in the wrong order, weights of other heads, gradients once a rank; states over borders."""
    results, errors = spawn_local(_certified, world, kinds, names, timeout_seconds=PATIENCE_SECONDS)[0]
    passed = [result for result in results if result.passed]
    assert {(result.layer, result.schedule) for result in passed} == {
        (kind, name) for kind in kinds for name in names if (world, name) != (2, "usp")
    }
    assert [result for result in results if not result.passed] == []
    assert max(errors) <= 1e-12, errors


def _uneven(rank: int, world: int) -> list[float]:
    """Return the error of a recurrence and its gradients whose 9 heads, three to a key, ranks share unevenly."""
    shards = SequenceShards("zigzag", [0, 9, 10, 31], world)
    schedule = build_schedule("ring", ring_group=dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    shapes = ((9, 2), (3, 3), (9,))
    whole = [
        torch.randn(shards.num_padded, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    ]
    weight = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    dout = torch.randn(shards.num_padded, 9, 3, generator=generator, dtype=torch.float64)
    mine = torch.from_numpy(shards.indices(rank))

    def run(tensors: Any, weights: Any, *, state: Any, final: bool, borders: Any) -> Any:
        x, shared, gate = tensors
        shared = shared.repeat_interleave(x.shape[2] // shared.shape[2], dim=2)
        return (x.sum(-1, keepdim=True) * shared * (gate * weights[0])[..., None]).cumsum(1), None

    def found(tensors: list[torch.Tensor], scan: Callable[[Scan], torch.Tensor], dout: torch.Tensor) -> Any:
        tensors = [x.clone().requires_grad_() for x in tensors]
        out = scan(Scan(tuple(tensors), (weight,), 9, run, takes_borders=False, chunk=4))
        return out, *torch.autograd.grad(out, [*tensors, weight], dout)

    wanted = found(whole, lambda scan: scan_documents(scan, shards.cu_seqlens)[0], dout)
    got = found([x[mine] for x in whole], lambda scan: sharded_scan(scan, shards, schedule), dout[mine])
    dist.all_reduce(got[-1])
    pairs = [*zip(got[:-1], (x[mine] for x in wanted[:-1])), (got[-1], wanted[-1])]
    return [float((a - b).detach().abs().max()) for a, b in pairs]


def test_fewer_heads_than_ranks_are_refused() -> None:
    """A rank without a head fails in the middle of a run."""
    config = NemotronHConfig(
        hidden_size=16, layer_types=["linear_attention"], mamba_num_heads=4, mamba_head_dim=8, n_groups=2
    )
    block = ModuleList([NemotronHBlock(config, 0)])
    check_states(block, 4)
    with pytest.raises(ArgumentError, match="4 heads of the state, 8 ranks"):
        check_states(block, 8)
