"""Sharded parameters: gradients are sums, tied weights stay one, parts put together are the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longspan.core.errors import ArgumentError
from longspan.parallel.fsdp import full_tensor, shard_like, shard_model
from longspan.parallel.launch import spawn_local
from longspan.parallel.mesh import MeshConfig, build_mesh
from tests.patience import PATIENCE_SECONDS


class Block(nn.Module):
    """Two experts, of which one is used; the list of them is not a list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(2)])

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return self.experts[0](hidden_TD) + 0 * sum(x.weight.sum() for x in self.experts)


class Net(nn.Module):
    """An embedding, two blocks and a head, which is the embedding if `tied`; a loss SUM over tokens."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), Block()])
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids_T)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        # The weight itself, as the chunked loss uses it: the head is never called.
        return nn.functional.cross_entropy(hidden @ self.head.weight.T, ids_T.roll(1), reduction="sum")


def compare_all(rank: int, cases: list[tuple[MeshConfig, bool]]) -> list[float]:
    return [compare(rank, settings, offload) for settings, offload in cases]


def compare(rank: int, settings: MeshConfig, offload: bool) -> float:
    """Return the largest difference of gradients, norm and a step from one process with all ranks' tokens."""
    mesh = build_mesh(settings, "cpu", timeout_seconds=PATIENCE_SECONDS)
    assert mesh.fsdp is not None
    ids = torch.arange(16).remainder(11)
    worst = 0.0
    for tied in (False, True):
        whole, net = Net(tied=tied), Net(tied=tied)
        for share in ids.split(4):
            whole(share).backward()
        shard_model(net, mesh.fsdp, offload=offload)
        # In two micro-batches, each with half the loss.
        for _ in range(2):
            (net(ids[4 * rank : 4 * rank + 4]) / 2).backward()
        names = [name for name, _ in net.named_parameters()]
        assert names == [name for name, _ in whole.named_parameters()]
        for left, right in zip(net.parameters(), whole.parameters()):
            assert left.grad is not None and right.grad is not None
            worst = max(worst, float((full_tensor(left.grad) - right.grad).abs().max()))
        norms = [nn.utils.clip_grad_norm_(module.parameters(), 1.0) for module in (net, whole)]
        worst = max(worst, abs(float(full_tensor(norms[0])) / float(norms[1]) - 1))
        for module in (net, whole):
            torch.optim.SGD(module.parameters(), lr=0.1).step()
        for left, right in zip(net.parameters(), whole.parameters()):
            worst = max(worst, float((full_tensor(left.detach()) - right.detach()).abs().max()))
            again = shard_like(full_tensor(left.detach()), left)
            assert torch.equal(again.to_local(), left.detach().to_local())
    return worst


def test_gradients_are_sums_over_ranks() -> None:
    """FSDP averages unless told otherwise: with a loss that is divided already, the step would be 4 times too small."""
    cases = [
        (MeshConfig(dp_shard=2, cp_ring=2), False),
        (MeshConfig(dp_replicate=2, cp_ulysses=2), True),
    ]
    for differences in spawn_local(compare_all, 4, cases, timeout_seconds=PATIENCE_SECONDS):
        assert max(differences) < 1e-5


def test_a_model_without_blocks_is_refused() -> None:
    """All in one unit, it would be gathered whole: nothing saved, and nothing said."""
    with pytest.raises(ArgumentError, match="Linear has no list of blocks"):
        shard_model(nn.Linear(2, 2), None)  # type: ignore[arg-type]
