"""From a recipe to the estimates of `plan`: the memory of its steps, and the cheapest settings that fit."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

from longspan.models.lora_config import LoraConfig
from longspan.plan.choose import Choice, choose_memory
from longspan.plan.models import ModelShape
from longspan.plan.training_step import LINEARS, Adapters, MemoryConfig, TrainingStep
from longspan.train.config import StageConfig, TrainConfig

__all__ = ["MemoryBudget", "adapters", "fit_memory", "machine_budget", "training_step"]

TRAINED_EMBEDDINGS = ("embed_tokens", "lm_head")


class MemoryBudget(NamedTuple):
    """Bytes that a process may fill."""

    device: float
    host: float
    cuda: bool
    """False: the device is the host, and nothing can be sent away from it."""


def machine_budget() -> MemoryBudget:
    """Return the budget of this process: its GPU and its part of the host memory, or its part of the host alone."""
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / here
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return MemoryBudget(float(total), host, True)
    return MemoryBudget(host, 0.0, False)


def training_step(config: TrainConfig, stage: StageConfig, *, cuda: bool) -> TrainingStep:
    """Return a stage's step as `plan` describes it."""
    rows = max(1, math.ceil(stage.rows_per_step / config.parallel.dp))
    at_once = min(rows, stage.rows_per_micro_batch)
    return TrainingStep(
        at_once * stage.context_length,
        parallel=config.parallel,
        dtype=config.model.dtype,
        memory=config.memory,
        optimizer=config.optimizer.name,
        lora=adapters(config.lora),
        accumulates=rows > at_once,
        documents=at_once,
        fused=config.runtime.compile_blocks,
        cuda=cuda,
    )


def adapters(lora: LoraConfig | None) -> Adapters | None:
    """Return adapters as `plan` describes them; None: all weights are trained."""
    if lora is None:
        return None
    return Adapters(
        lora.rank,
        targets=_adapted(lora),
        quantized=lora.quantization is not None,
        embeddings=any(name.endswith(TRAINED_EMBEDDINGS) for name in lora.trainable),
    )


def _adapted(lora: LoraConfig) -> tuple[str, ...]:
    """Return the linear layers of a block that get adapters; all of them where their names are others than Llama's."""
    if lora.target_modules == "all-linear":
        return LINEARS
    names = {
        name: f"{'mlp' if name in ('gate', 'up', 'down') else 'self_attn'}.{name}_proj" for name in LINEARS
    }
    return (
        tuple(name for name in LINEARS if any(names[name].endswith(end) for end in lora.target_modules))
        or LINEARS
    )


def fit_memory(config: TrainConfig, shape: ModelShape, budget: MemoryBudget) -> tuple[MemoryConfig, Choice]:
    """Return `config.memory` with the cheapest settings with which every stage fits, and why.

    Types (`compute_dtype`, `reduce_dtype`) stay: they change what is computed. The stage with most tokens at once
    decides.

    Raises:
        ArgumentError: nothing fits.
    """
    steps = [training_step(config, stage, cuda=budget.cuda) for stage in config.stages]
    hardest = max(steps, key=lambda step: (step.tokens, step.accumulates))
    choice = choose_memory(shape, hardest, device_bytes=budget.device, host_bytes=budget.host)
    return choice.candidate.step.memory, choice
