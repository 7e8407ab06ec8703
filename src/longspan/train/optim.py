"""Optimizers: AdamW, and Muon in fp32 for the matrices inside the blocks.

State is read and written by parameter name, so a checkpoint does not depend on the order of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import nn

from longspan.core.errors import DataError
from longspan.parallel.fsdp import fill, full_tensor, shard_like
from longspan.train.config import OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised by Newton-Schulz iterations (Jordan et al. 2024).

    Computes in fp32 and batches matrices of equal shape, which on CPU is many times faster than one bf16
    product after another. Every parameter is a matrix. An update has spectral norm about 1 and is scaled by
    sqrt(max(1, rows / columns)).

    A sharded matrix is gathered for its update, which every rank computes, one shape at a time; momentum stays
    sharded.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
                gradient = parameter.grad.float()
                momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
                nesterov = gradient.lerp(momentum, group["momentum"])
                rows, columns = parameter.shape
                by_shape.setdefault((rows, columns), []).append((parameter, full_tensor(nesterov)))
            for (rows, columns), entries in by_shape.items():
                updates_BRC = orthogonalise(torch.stack([update for _, update in entries]))
                scale = max(1.0, rows / columns) ** 0.5
                for (parameter, _), update in zip(entries, updates_BRC):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    own = shard_like(update.to(parameter.dtype), parameter)
                    parameter.add_(own, alpha=-group["lr"] * scale)
        return loss


def orthogonalise(matrices_BRC: torch.Tensor) -> torch.Tensor:
    """Push the singular values of each matrix [batch, rows, columns] towards 1 (0.7 to 1.2), in fp32.

    Quintic Newton-Schulz with the coefficients of Jordan et al. 2024; 5 iterations, each three products.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices_BRC.float()
    wide = x.shape[-2] > x.shape[-1]
    if wide:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if wide else x


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a model; `param_groups` carry `names` and `role` ("matrix" or "other").

    Muon takes the two-dimensional parameters inside the blocks; embeddings, head, norms and biases go to AdamW.
    """
    matrices, decayed, plain = [], [], []
    inside = {id(parameter) for module in _blocks(model) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        entry = (name, parameter)
        if config.name == "muon" and parameter.ndim == 2 and id(parameter) in inside:
            matrices.append(entry)
        elif parameter.ndim >= 2:
            decayed.append(entry)
        else:
            plain.append(entry)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        muon = Muon(
            [parameter for _, parameter in matrices],
            lr=0.0,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        muon.param_groups[0].update(names=[name for name, _ in matrices], role="matrix")
        optimizers.append(muon)
    groups = [
        {
            "params": [parameter for _, parameter in entries],
            "names": [name for name, _ in entries],
            "role": "other",
            "weight_decay": decay,
        }
        for entries, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if entries
    ]
    if groups:
        # One pass over memory instead of ten, and nothing held beside it: on CPU, where parameters may be offloaded to,
        # about five times as fast. Elsewhere torch's own choice.
        places = {parameter.device.type for _, parameter in decayed + plain}
        fused = True if places in ({"cpu"}, {"cuda"}) else None
        adamw = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)
        optimizers.append(adamw)
    return optimizers


def set_lr(optimizers: Sequence[torch.optim.Optimizer], *, lr: float, adamw_lr: float) -> None:
    """Set the rate of the Muon group to `lr` and of every AdamW group to `adamw_lr`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr if group["role"] == "matrix" else adamw_lr


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Return the optimizers' state as `<parameter name>/<entry>` tensors, sharded ones as they are."""
    return {
        f"{name}/{entry}": value
        for parameter, name, optimizer in _named(optimizers)
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer],
    names: Iterable[str],
    read: Callable[[str, int, int | None], torch.Tensor],
) -> None:
    """Put back what `optimizer_tensors` returned.

    Args:
        optimizers: fresh ones.
        names: the keys of that dictionary.
        read: returns rows of a whole tensor: (name, first row, number of rows or None for all).

    Raises:
        DataError: names do not match the parameters.
    """
    by_name: dict[str, list[str]] = {}
    for key in names:
        by_name.setdefault(key.rpartition("/")[0], []).append(key)
    for parameter, name, optimizer in _named(optimizers):
        for key in by_name.pop(name, []):
            entry = key.rpartition("/")[2]
            if entry == "step":
                # A fused optimizer counts where it computes.
                fused = any(group.get("fused") for group in optimizer.param_groups)
                value = read(key, 0, None).to(parameter.device if fused else "cpu")
            else:
                dtype = read(key, 0, 0).dtype
                value = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
                fill(value, partial(read, key))
            optimizer.state[parameter][entry] = value
    if by_name:
        raise DataError("optimizer state names parameters that the model lacks", found=sorted(by_name)[:4])


def _named(
    optimizers: Sequence[torch.optim.Optimizer],
) -> list[tuple[nn.Parameter, str, torch.optim.Optimizer]]:
    return [
        (parameter, name, optimizer)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter, name in zip(group["params"], group["names"])
    ]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a transformer: the members of its module lists."""
    return [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
