"""The model of a stage: its config, RoPE and weights, and its tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from longspan.core.errors import DataError
from longspan.models.hf import build_model, empty_model, load_model
from longspan.models.lora import apply_lora, is_adapted
from longspan.models.places import tokenizer_folder
from longspan.parallel.fsdp import fill
from longspan.train.checkpoint import Checkpoint
from longspan.train.config import StageConfig, TrainConfig
from longspan.train.known_models import KnownModel, model_path


def stage_model(
    config: TrainConfig, stage: StageConfig, state: Checkpoint | None, known: KnownModel
) -> PreTrainedModel:
    """Return the model with the stage's RoPE; weights from `state`, else from the recipe's origin, `known`."""
    rope, context = rope_at(config, stage), _context_at(config, stage)
    if known.path is not None:
        model = load_model(
            known.path,
            rope=rope,
            max_position_embeddings=context,
            dtype=getattr(torch, config.model.dtype),
            overrides=config.model.config_overrides,
            config=_own(known, rope),
        )
    else:
        model = build_model(
            _fields(config),
            seed=config.seed,
            rope=rope,
            max_position_embeddings=context,
            init=config.model.init,
        )
    if config.lora is not None:
        apply_lora(model, config.lora, seed=config.seed)
    if state is not None:
        load_tensors(model, state)
    return model.train()


def empty_stage_model(config: TrainConfig, stage: StageConfig, known: KnownModel) -> PreTrainedModel:
    """Return the same modules without values: the first process sends those when the model is sharded."""
    rope = rope_at(config, stage)
    return empty_model(
        _fields(config) if known.path is None else known.path,
        rope=rope,
        max_position_embeddings=_context_at(config, stage),
        overrides=config.model.config_overrides,
        config=_own(known, rope),
    ).train()


def _own(known: KnownModel, rope: Mapping[str, Any] | None) -> PretrainedConfig | None:
    """Return the config that a RoPE is written into; None: the model's files have to be asked."""
    return known.config if rope is None and known.as_saved is not None else known.as_saved


def _fields(config: TrainConfig) -> dict[str, Any]:
    """Return the transformers configuration of a model made from scratch."""
    assert config.model.hf_config is not None
    return {**config.model.hf_config, "dtype": config.model.dtype}


def _context_at(config: TrainConfig, stage: StageConfig) -> int:
    """Return the longest context up to a stage."""
    return max(each.reach for each in config.stages[: config.stages.index(stage) + 1])


def tokenizer_source(config: TrainConfig, root: Path) -> Path | None:
    """Return the folder whose tokenizer files go into the model folders: the recipe's, or the model's own."""
    if config.tokenizer is not None:
        return root / config.tokenizer
    path = model_path(config.model, root)
    return None if path is None else tokenizer_folder(path)


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
