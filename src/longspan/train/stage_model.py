"""The model of a stage: its config, RoPE and weights, and its tensors by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from longspan.core.errors import DataError
from longspan.models.hf import build_model, empty_model, load_model, own_config
from longspan.models.hf_config import head_counts, window_of_all_layers
from longspan.models.lora import apply_lora, is_adapted
from longspan.models.places import tokenizer_folder
from longspan.parallel.fsdp import fill
from longspan.train.checkpoint import Checkpoint
from longspan.train.config import StageConfig, TrainConfig


def stage_model(
    config: TrainConfig, stage: StageConfig, state: Checkpoint | None, root: Path
) -> PreTrainedModel:
    """Return the model with the stage's RoPE; weights from `state`, else from the recipe's origin."""
    dtype = getattr(torch, config.model.dtype)
    rope = rope_at(config, stage)
    if config.model.path is not None:
        path = model_path(config, root)
        model = load_model(
            path,
            rope=rope,
            max_position_embeddings=_context_at(config, stage),
            dtype=dtype,
            overrides=config.model.config_overrides,
        )
    else:
        model = build_model(
            _fields(config),
            seed=config.seed,
            rope=rope,
            max_position_embeddings=_context_at(config, stage),
            init=config.model.init,
        )
    if config.lora is not None:
        apply_lora(model, config.lora, seed=config.seed)
    if state is not None:
        load_tensors(model, state)
    return model.train()


def empty_stage_model(config: TrainConfig, stage: StageConfig, root: Path) -> PreTrainedModel:
    """Return the same modules without values: the first process sends those when the model is sharded."""
    return empty_model(
        _fields(config) if config.model.path is None else model_path(config, root),
        rope=rope_at(config, stage),
        max_position_embeddings=_context_at(config, stage),
        overrides=config.model.config_overrides,
    ).train()


def _fields(config: TrainConfig) -> dict[str, Any]:
    """Return the transformers configuration of a model made from scratch."""
    assert config.model.hf_config is not None
    return {**config.model.hf_config, "dtype": config.model.dtype}


def _context_at(config: TrainConfig, stage: StageConfig) -> int:
    """Return the longest context up to a stage."""
    return max(each.reach for each in config.stages[: config.stages.index(stage) + 1])


def model_path(config: TrainConfig, root: Path) -> str:
    """Return the model's folder below `root`, else the path as it is: a hub name, or from the working directory."""
    assert config.model.path is not None
    folder = root / config.model.path
    return str(folder) if folder.is_dir() else config.model.path


def tokenizer_source(config: TrainConfig, root: Path) -> Path | None:
    """Return the folder whose tokenizer files go into the model folders: the recipe's, or the model's own."""
    if config.tokenizer is not None:
        return root / config.tokenizer
    return tokenizer_folder(model_path(config, root)) if config.model.path is not None else None


def rope_at(config: TrainConfig, stage: StageConfig) -> dict | None:
    """Return the RoPE of a stage: its own, or that of the last stage before it that sets one; None is the model's.

    A RoPE that does not say its theta keeps that of the stages before.
    """
    # By name: a stage that counts in epochs is another once its steps are known.
    index = [each.name for each in config.stages].index(stage.name)
    setters = [each.rope for each in config.stages[: index + 1] if each.rope is not None]
    if not setters:
        return None
    thetas = [rope["rope_theta"] for rope in setters if "rope_theta" in rope]
    return {**({"rope_theta": thetas[-1]} if thetas else {}), **setters[-1]}


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by name, shared ones once, sharded ones as they are.

    Of a model with an adapter, only what is trained.
    """
    own = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    if is_adapted(model):
        own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value.detach() for name, value in model.state_dict().items() if name in own}


def load_tensors(model: nn.Module, state: Checkpoint) -> None:
    """Put the weights of a checkpoint into a model; each process reads what it holds."""
    check_tensors(model, state)
    for name, tensor in own_tensors(model).items():
        fill(tensor, partial(state.model.read, name))


def check_tensors(model: nn.Module, state: Checkpoint) -> None:
    """Refuse a checkpoint of other tensors than a model's. Raises DataError."""
    own, saved = own_tensors(model), state.model.shapes
    wrong = {name for name in own.keys() & saved.keys() if tuple(own[name].shape) != saved[name]}
    if wrong or own.keys() != saved.keys():
        names = sorted(wrong | (own.keys() ^ saved.keys()))
        raise DataError(f"the checkpoint {state.path} does not fit the model", found=names[:4])


class AttentionSizes(NamedTuple):
    """What decides how a model's attention can be spread."""

    heads: int
    kv_heads: int
    window: int | None
    """Tokens of a sliding window that all layers have."""


def attention_sizes(config: TrainConfig, root: Path) -> AttentionSizes:
    """Return the sizes of the recipe's model."""
    text = model_config(config, root).get_text_config(decoder=True)
    return AttentionSizes(*head_counts(text), window_of_all_layers(text))


def model_config(config: TrainConfig, root: Path) -> PretrainedConfig:
    """Return the configuration of the recipe's model as it was before training."""
    if config.model.hf_config is not None:
        return AutoConfig.for_model(**config.model.hf_config)
    return own_config(model_path(config, root))
