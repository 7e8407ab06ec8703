"""From a recipe to the estimates of `plan`: the memory of its steps, and the cheapest settings that fit."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from longspan.models.lora_config import LoraConfig
from longspan.parallel.schedule_table import SCHEDULES, schedule_of_degrees
from longspan.plan.block import LINEARS
from longspan.plan.choose import Choice, choose_memory
from longspan.plan.models import shape_of
from longspan.plan.training import LoraSettings, TrainingMemory, TrainingSettings, training_memory
from longspan.train.config import MemoryConfig, StageConfig, TrainConfig

__all__ = ["MemoryBudget", "fit_memory", "machine_budget", "stage_memory", "step_settings"]

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


def step_settings(config: TrainConfig, stage: StageConfig, *, cuda: bool) -> TrainingSettings:
    """Return a stage's step as `plan` describes it."""
    parallel, memory = config.parallel, config.memory
    rows = max(1, math.ceil(stage.rows_per_step / (parallel.dp_replicate * parallel.dp_shard)))
    at_once = min(rows, stage.rows_per_micro_batch)
    lora = None
    if config.lora is not None:
        lora = LoraSettings(
            config.lora.rank,
            targets=_adapted(config.lora),
            quantized=config.lora.quantization is not None,
            embeddings=any(name.endswith(TRAINED_EMBEDDINGS) for name in config.lora.trainable),
        )
    schedule = parallel.schedule or schedule_of_degrees(parallel.cp_ring, parallel.cp_ulysses)
    return TrainingSettings(
        at_once * stage.context_length,
        schedule=SCHEDULES[schedule].planned_as or schedule,
        ring=parallel.cp_ring,
        ulysses=parallel.cp_ulysses,
        dp_shard=parallel.dp_shard,
        dp_replicate=parallel.dp_replicate,
        tp=parallel.tp,
        dtype=config.model.dtype,
        compute_dtype=memory.compute_dtype,
        reduce_dtype=memory.reduce_dtype,
        optimizer=config.optimizer.name,
        activation_checkpointing=memory.activation_checkpointing,
        tiled_mlp=memory.tiled_mlp,
        offload_parameters=memory.offload_parameters,
        chunk_tokens=memory.chunk_tokens,
        offload_cache=memory.offload_chunk_cache,
        lora=lora,
        accumulates=rows > at_once,
        documents=at_once,
        cuda=cuda,
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


def stage_memory(
    config: TrainConfig, stage: StageConfig, hf_config: Mapping[str, Any], *, cuda: bool = True
) -> TrainingMemory:
    """Return the memory of one process in a stage.

    Args:
        hf_config: the model's configuration, as `config.json` has it.
    """
    return training_memory(shape_of(hf_config), step_settings(config, stage, cuda=cuda))


def fit_memory(
    config: TrainConfig, hf_config: Mapping[str, Any], budget: MemoryBudget
) -> tuple[MemoryConfig, Choice]:
    """Return `config.memory` with the cheapest settings with which every stage fits, and why.

    Types (`compute_dtype`, `reduce_dtype`) stay: they change what is computed. The stage with most tokens at once
    decides.

    Raises:
        ArgumentError: nothing fits.
    """
    shape = shape_of(hf_config)
    steps = [step_settings(config, stage, cuda=budget.cuda) for stage in config.stages]
    choice = choose_memory(
        shape,
        max(steps, key=lambda step: (step.tokens, step.accumulates)),
        device_bytes=budget.device,
        host_bytes=budget.host,
        chunks=config.parallel.cp_ring * config.parallel.cp_ulysses == 1,
    )
    fields = dict(choice.settings)
    fields["offload_chunk_cache"] = fields.pop("offload_cache")
    return config.memory.model_copy(update=fields), choice
