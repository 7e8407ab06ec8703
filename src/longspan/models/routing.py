"""What the routers of a mixture of experts do over a whole step: the load of each expert, and the routers' losses.

The load-balancing loss is that of Switch Transformers (arXiv:2101.03961, equations 4 to 6) as transformers computes it
(`load_balancing_loss_func`), of all tokens of an optimizer step in all layers as one batch:

    aux = E sum_e F_e P_e

with E experts, F_e the share of tokens whose k highest logits have expert e among them (it sums to k) and P_e the mean
of softmax(logits)_e. The z-loss is the mean of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, equation 5). Padding is
no token.

aux is not a sum over tokens, so a mean of those of micro-batches, documents or ranks would be another loss. But once F
is known, which has no gradient, it is one: the gradient of P_e. So F is counted first, over all ranks. A step of one
micro-batch has counted it when its forward pass ends; one of several (or one walked in chunks) makes a forward pass of
all its tokens before the first backward pass.

The gradient is added to that of the logits where a router hands on its shares, so it needs no output of the model and
passes through checkpointing, tiles and FSDP as any gradient does.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from longspan.core.errors import ConfigError
from longspan.kernels.experts import experts_in, num_experts
from longspan.models.hf_config import experts_per_token, text_config

__all__ = ["Routing", "RoutingReport", "aux_loss_weight", "check_router_losses", "watch_routing"]


class RoutingReport(NamedTuple):
    """Of one step, over all ranks; lists have an entry for each layer of experts."""

    max_load: list[float]
    """Tokens of the expert with most of them, as a multiple of the mean."""
    entropy: list[float]
    """Of the load, as a share of that of equal loads: 1 is balanced, 0 is one expert for all."""
    aux_loss: float | None
    """Load-balancing loss, without its weight; None where it is not trained with."""
    z_loss: float | None


class Routing:
    """Counts what routers choose while a step runs, and adds the gradients of their losses.

    Attributes:
        aux_loss, z_loss: weights of the two losses; 0 = without.
    """

    def __init__(self, model: PreTrainedModel, *, aux_loss: float, z_loss: float) -> None:
        self.aux_loss, self.z_loss = aux_loss, z_loss
        self._layers = list(experts_in(model).values())
        self._routers = _routers(model) if self.has_losses else []
        self._k = experts_per_token(model.config) or 1
        self._mask: torch.Tensor | None = None
        self._running, self._counting = False, False
        for layer, experts in enumerate(self._layers):
            experts.register_forward_pre_hook(self._count(layer, num_experts(experts)))
        for router, place in self._routers:
            router.register_forward_hook(self._add_losses(place))
        self._clear()

    @property
    def has_losses(self) -> bool:
        """Whether the routers are trained with a loss of their own."""
        return self.aux_loss > 0 or self.z_loss > 0

    def _clear(self) -> None:
        self._load: dict[int, torch.Tensor] = {}
        self._chosen: torch.Tensor | float = 0.0
        self._rows: torch.Tensor | float = 0.0
        self._probabilities: torch.Tensor | float = 0.0
        self._squares: torch.Tensor | float = 0.0
        # By which the gradient of the losses is made; there once everything is counted.
        self._prices: torch.Tensor | None = None
        self._per_row: torch.Tensor | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Count the forward passes of one optimizer step inside the block."""
        self._clear()
        self._running = True
        try:
            yield
        finally:
            self._running, self._mask = False, None

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count choices only: for forward passes, without gradient, of all tokens of the step before it is made."""
        self._counting = True
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            # What is drawn in them, such as noise on the logits, is drawn again in the step.
            with torch.no_grad(), torch.random.fork_rng(devices):
                yield
        finally:
            self._counting = False
        self.settle()

    def settle(self) -> None:
        """Add up the choices of all ranks, which all call this; called before the first backward pass of a step."""
        if not self.has_losses or self._prices is not None:
            return
        assert isinstance(self._chosen, torch.Tensor) and isinstance(self._rows, torch.Tensor)
        counted = _over_ranks(torch.cat((self._chosen, self._rows[None])))
        self._chosen, self._rows = counted[:-1], counted[-1]
        rows = self._rows.clamp(min=1)
        self._prices = self.aux_loss * len(self._chosen) * self._chosen / rows**2
        self._per_row = self.z_loss / rows

    def tokens(self, real: torch.Tensor | None) -> None:
        """Say which tokens of the next forward pass are none, but padding: `real` bool [T]; None = all are."""
        self._mask = real

    def numbers(self) -> torch.Tensor:
        """Return what `report` reads, float64 [n], on the device; all ranks call this when the step has run."""
        found: list[torch.Tensor] = []
        if layers := sorted(self._load):
            load = _over_ranks(torch.cat([self._load[layer] for layer in layers]))
            for counts in load.split([len(self._load[layer]) for layer in layers]):
                found += [_max_load(counts), _entropy(counts)]
        if self.has_losses:
            assert isinstance(self._probabilities, torch.Tensor) and isinstance(self._squares, torch.Tensor)
            sums = _over_ranks(torch.cat((self._probabilities, self._squares[None])))
            rows = torch.as_tensor(self._rows).clamp(min=1)
            found += [len(sums[:-1]) * (self._chosen * sums[:-1]).sum() / rows**2, sums[-1] / rows]
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)

    def report(self, numbers: list[float]) -> RoutingReport:
        """Return in words what `numbers` said."""
        losses = numbers[-2:] if self.has_losses else [None, None]
        loads = numbers[: len(numbers) - 2 * self.has_losses]
        aux = losses[0] if self.aux_loss > 0 else None
        return RoutingReport(loads[0::2], loads[1::2], aux, losses[1] if self.z_loss > 0 else None)

    def _counts_now(self) -> bool:
        # Not where checkpointing or tiles compute a forward pass again, nor in the first walk over chunks.
        recomputed = torch._C._current_graph_task_id() != -1
        return self._running and not recomputed and torch.is_grad_enabled() != self._counting

    def _count(self, layer: int, size: int) -> Any:
        @torch.compiler.disable
        def count(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if not self._counts_now() or self._counting:
                return
            chosen = next(each for each in args if not each.is_floating_point())
            counts = _histogram(chosen, size, self._mask)
            before = self._load.get(layer)
            self._load[layer] = counts if before is None else before + counts

        return count

    def _add_losses(self, place: int) -> Any:
        @torch.compiler.disable
        def add(router: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> Any:
            if not self._running:
                return None
            logits = output[place]
            if self._counts_now():
                self._note(logits, output)
            if self._counting or not torch.is_grad_enabled():
                return None
            index = next(i for i, each in enumerate(output) if i != place and each.is_floating_point())
            shares = _RouterLosses.apply(output[index], logits, self, self._mask)
            return (*output[:index], shares, *output[index + 1 :])

        return add

    @torch.no_grad()
    def _note(self, logits: torch.Tensor, output: tuple[torch.Tensor, ...]) -> None:
        rows = logits.reshape(-1, logits.shape[-1]).float()
        real = rows.new_ones(len(rows)) if self._mask is None else self._mask.to(rows.dtype)
        if self._prices is None:
            k = next((each.shape[-1] for each in output if not each.is_floating_point()), self._k)
            # As transformers counts: by the logits, also where a bias decides what is chosen.
            highest = rows.topk(k).indices
            self._chosen = self._chosen + _histogram(highest, rows.shape[-1], self._mask)
            self._rows = self._rows + real.sum(dtype=torch.float64)
        if not self._counting:
            probabilities = rows.softmax(-1) * real[:, None]
            self._probabilities = self._probabilities + probabilities.sum(0, dtype=torch.float64)
            self._squares = self._squares + (rows.logsumexp(-1) ** 2 * real).sum(dtype=torch.float64)

    def gradient(self, logits: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of both weighted losses by the logits of one router."""
        assert self._prices is not None and self._per_row is not None, (
            "settle() comes before the backward pass"
        )
        wide = logits.float()
        prices, per_row = self._prices.to(wide), self._per_row.to(wide)
        p = wide.softmax(-1)
        found = p * (prices - (p * prices).sum(-1, keepdim=True))
        found = found + 2 * per_row * wide.logsumexp(-1, keepdim=True) * p
        if real is not None:
            found = found * real.reshape(*logits.shape[:-1], 1)
        return found.to(logits.dtype)


class _RouterLosses(torch.autograd.Function):
    """Hands the shares on; on the way back the losses' gradient joins that of the logits."""

    @staticmethod
    def forward(
        ctx: Any, shares: torch.Tensor, logits: torch.Tensor, routing: Routing, real: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.routing, ctx.real = routing, real
        return shares.view_as(shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (logits,) = ctx.saved_tensors
        return grad_outputs[0], ctx.routing.gradient(logits, ctx.real), None, None


def watch_routing(model: PreTrainedModel, *, aux_loss: float | None, z_loss: float) -> Routing | None:
    """Let a model say what its routers do; before its blocks are sharded.

    Args:
        model: a causal language model.
        aux_loss: weight of the load-balancing loss; None = the model's own (`aux_loss_weight`).
        z_loss: weight of the z-loss.

    Returns:
        None for a model without experts.

    Raises:
        ConfigError: losses of routers that the model does not have or show.
    """
    check_router_losses(model, aux_loss=aux_loss, z_loss=z_loss)
    weight = aux_loss_weight(model) if aux_loss is None else aux_loss
    routing = Routing(model, aux_loss=weight, z_loss=z_loss)
    return routing if routing.has_losses or experts_in(model) else None


def aux_loss_weight(model: PreTrainedModel) -> float:
    """Return the weight by which transformers would train a model with the load-balancing loss: 0 unless it asks."""
    config = text_config(model.config)
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0)


def check_router_losses(model: PreTrainedModel, *, aux_loss: float | None, z_loss: float) -> None:
    """Refuse losses of routers that a model does not have or show.

    Raises:
        ConfigError: naming the model.
    """
    weight = aux_loss_weight(model) if aux_loss is None else aux_loss
    if (weight > 0 or z_loss > 0) and not _routers(model):
        raise ConfigError(
            f"{type(model).__name__} has no routers whose logits transformers records",
            found=f"router.aux_loss {weight:g}, router.z_loss {z_loss:g}",
            allowed="0 for both",
            fix="set router.aux_loss: 0 and router.z_loss: 0",
        )


def _routers(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """Return the routers of a model, and the place of the logits among what each returns."""
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None) or {}
        recorder = recorded.get("router_logits")
        if not isinstance(recorder, OutputRecorder) or recorder.layer_name is not None:
            continue
        kind = recorder.target_class
        found = [each for each in model.modules() if inspect.isclass(kind) and isinstance(each, kind)]
        if found:
            return [(each, recorder.index) for each in found]
    return []


def _histogram(chosen: torch.Tensor, size: int, real: torch.Tensor | None) -> torch.Tensor:
    """Return how often each number below `size` stands in chosen [T, k], float64 [size]; no host waits for it."""
    weights = torch.ones_like(chosen, dtype=torch.float64)
    if real is not None:
        weights = weights * real.reshape(-1, 1)
    counts = torch.zeros(size, dtype=torch.float64, device=chosen.device)
    return counts.scatter_add_(0, chosen.reshape(-1).long(), weights.reshape(-1))


def _over_ranks(counts: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts


def _max_load(counts: torch.Tensor) -> torch.Tensor:
    return counts.max() / counts.mean().clamp(min=1e-12)


def _entropy(counts: torch.Tensor) -> torch.Tensor:
    if len(counts) == 1:
        return counts.new_ones(())
    shares = counts / counts.sum().clamp(min=1)
    return torch.special.entr(shares).sum() / torch.log(counts.new_tensor(float(len(counts))))
