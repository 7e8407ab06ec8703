"""Muon against singular values and a matrix at a time; optimizer state by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from longspan.core.errors import DataError
from longspan.train.config import OptimizerConfig
from longspan.train.optim import (
    Muon,
    build_optimizers,
    load_optimizer_tensors,
    optimizer_tensors,
    orthogonalise,
    set_lr,
)


def reader(saved: dict[str, torch.Tensor]) -> Callable[[str, int, int | None], torch.Tensor]:
    """As a checkpoint reads: rows of a tensor."""

    def read(name: str, start: int, rows: int | None) -> torch.Tensor:
        whole = saved[name]
        return whole if whole.ndim == 0 or rows is None else whole[start : start + rows]

    return read


class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)])
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.norm(self.layers[1](torch.relu(self.layers[0](x)))) @ self.embedding.weight.T


def model_with_gradients(seed: int = 0) -> TwoBlocks:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TwoBlocks()
    ids = torch.arange(10)
    nn.functional.cross_entropy(model(ids), ids + 1).backward()
    return model


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    """Without the transpose for tall matrices the iteration works on the wrong Gram matrix."""
    matrices = torch.randn((5, *shape), generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6 and values.max() < 1.25


def test_batched_matrices_move_as_they_would_alone() -> None:
    """Batching by shape must not mix matrices up."""
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(s, generator=generator) for s in ((4, 6), (4, 6), (6, 4))]
    grads = [torch.randn(v.shape, generator=generator) for v in values]

    def moved(indices: list[int]) -> list[torch.Tensor]:
        parameters = [nn.Parameter(values[i].clone()) for i in indices]
        for parameter, i in zip(parameters, indices):
            parameter.grad = grads[i].clone()
        Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.01).step()
        return [parameter.detach() for parameter in parameters]

    together = moved([0, 1, 2])
    for index in range(3):
        torch.testing.assert_close(together[index], moved([index])[0], rtol=1e-5, atol=1e-6)


def test_every_parameter_is_trained_exactly_once() -> None:
    """An embedding handed to Muon, or a bias to nobody, fails silently."""
    model = model_with_gradients()
    optimizers = build_optimizers(model, OptimizerConfig(name="muon", weight_decay=0.1))
    names = [name for o in optimizers for group in o.param_groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    by_role = {name: group["role"] for o in optimizers for group in o.param_groups for name in group["names"]}
    assert by_role["layers.0.weight"] == "matrix" and by_role["embedding.weight"] == "other"
    decay = {
        name: group["weight_decay"] for o in optimizers for group in o.param_groups for name in group["names"]
    }
    assert decay["norm.weight"] == 0.0 and decay["embedding.weight"] == 0.1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_comes_back_to_the_last_bit(name: str) -> None:
    """A forgotten `step` or momentum makes a resumed run drift."""
    config = OptimizerConfig.from_dict({"name": name})
    runs = []
    for interrupted in (False, True):
        model = model_with_gradients()
        optimizers = build_optimizers(model, config)
        for step in range(4):
            set_lr(optimizers, lr=0.02, adamw_lr=0.01)
            for optimizer in optimizers:
                optimizer.step()
            if interrupted and step == 1:
                saved = {key: value.clone() for key, value in optimizer_tensors(optimizers).items()}
                optimizers = build_optimizers(model, config)
                load_optimizer_tensors(optimizers, saved, reader(saved))
        runs.append([parameter.detach().clone() for parameter in model.parameters()])
    for left, right in zip(*runs):
        assert torch.equal(left, right)


def test_state_of_another_model_is_refused() -> None:
    """Names that match nothing must not be dropped in silence."""
    optimizers = build_optimizers(model_with_gradients(), OptimizerConfig())
    with pytest.raises(DataError, match="lm_head"):
        load_optimizer_tensors(optimizers, ["lm_head.weight/exp_avg"], reader({}))
