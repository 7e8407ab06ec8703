"""From the name of a model to something that answers: a folder, a loaded model, or a server.

    model, a hub name       a folder in Hugging Face's form, or what the hub calls it
    run/stages/long         the same: a stage's folder, or an adapter's with the base that it names
    openai:NAME             a server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp do), as a chat
    completions:NAME        the same, for plain text that is continued
    anthropic:NAME          Anthropic's

What other readers open (a checkpoint of a training) is given with a function that loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel

from longspan.api import ServerConfig
from longspan.core.errors import ArgumentError
from longspan.core.log import get_logger
from longspan.core.schedule_table import CpScheduleName
from longspan.data.tokenizer import Tokenizer
from longspan.infer.config import AnswererConfig
from longspan.infer.context_parallel import SpreadModel
from longspan.infer.distributed import TIMEOUT_SECONDS, Member, is_first_rank, join_ranks
from longspan.infer.kv_types import KvDtype
from longspan.infer.local import LocalAnswerer
from longspan.infer.memory import available_memory, shared_memory
from longspan.infer.plain import PlainAnswerer
from longspan.infer.remote import open_remote
from longspan.infer.replicas import Replica
from longspan.infer.requests import Answerer
from longspan.models.hf import evaluated_dtype, load_model, rope_settings, say_narrowed, usable_device
from longspan.models.identity import model_identity
from longspan.models.stand_in import check_unknown_family
from longspan.models.states import goes_on_from_states
from longspan.parallel.mesh import MeshConfig, build_mesh

Load = Callable[[AnswererConfig], PreTrainedModel]
"""Loads the weights of a model."""


def load_weights(
    config: AnswererConfig, *, load: Load | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """Load a model and put it on the device (None: the usable one), ready to be run.

    With `config.tp` ranks, all of which call this, each gets its share of every matrix. `load` loads it in place of
    `models.hf.load_model`.
    """
    device = usable_device() if device is None else device
    if load is not None:
        if config.tp > 1:
            raise ArgumentError(
                f"{config.model} cannot be shared by --tp", fix="export it first, or use --cp"
            )
        if config.dtype is None and device.type == "cuda":
            say_narrowed(config.model)
            config = config.model_copy(update={"dtype": "bfloat16"})
        model = load(config)
    else:
        dtype = evaluated_dtype(config.model, device, config.dtype)
        rope = rope_settings(config.model, config.rope, config.rope_theta)
        model = load_model(config.model, rope=rope, dtype=dtype, tp=config.tp)
    check_unknown_family(model.config)
    if config.tp == 1:
        model = model.to(device)
    return model.eval()


def identify(model: PreTrainedModel, path: str) -> dict[str, Any]:
    """Return what the header of records says of a loaded model: the same for any number of processes."""
    return {
        **model_identity(model, path),
        "trained_length": model.config.get_text_config(decoder=True).max_position_embeddings,
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": "transformers",
    }


def open_answerer(
    config: AnswererConfig, *, tokenizer: Tokenizer | None = None, load: Load | None = None
) -> Answerer:
    """Open a model; close what is returned. Of one that is run here that is a `GivesLosses`, too.

    With several processes this returns in the first: it starts the others on this machine, or they are those of
    torchrun or srun, where they end in this call with SystemExit when the model is closed.

    Args:
        config: which model, and how it runs.
        tokenizer: decodes answers; needed for models that are run here.
        load: loads the weights in place of `models.hf.load_model`: a function of a module, so that it can be sent to
            other processes.

    Raises:
        DataError, ConfigError: the model cannot be loaded so.
        ArgumentError: settings that do not go together.
        RunError: another process failed.
    """
    if config.is_remote:
        how = config.server or ServerConfig()
        if config.max_length is not None:
            how = how.model_copy(update={"max_length": config.max_length})
        return open_remote(config.model, how, tokenizer=tokenizer)
    if tokenizer is None:
        raise ArgumentError("a model that is run here needs its tokenizer")
    part = _Part(config, tokenizer, load)
    world = part.replicas * config.tp * config.cp
    return _build(usable_device(), part) if world == 1 else join_ranks(world, _build, part)


class _Part(NamedTuple):
    """What every rank has to know to make its part of a model."""

    config: AnswererConfig
    tokenizer: Tokenizer
    load: Load | None

    @property
    def replicas(self) -> int:
        return self.config.replicas or 1

    @property
    def schedule(self) -> CpScheduleName:
        return self.config.schedule or "ring"


def _build(device: torch.device, part: _Part) -> Member:
    """Make this rank's part of a model; all ranks call it together."""
    member = _build_member(device, part)
    return member if part.replicas == 1 else Replica(member, copies=part.replicas)


def _build_member(device: torch.device, part: _Part) -> Member:
    """Make this rank's part of its copy of a model."""
    config, mesh = part.config, None
    if config.cp > 1:
        degrees = MeshConfig.of_schedule(part.schedule, config.cp, dp_replicate=part.replicas)
        mesh = build_mesh(degrees, device, timeout_seconds=TIMEOUT_SECONDS)
    model = load_weights(config, load=part.load, device=device)
    shared: dict[str, Any] = {
        # Reading all weights for their hash takes its time: only the first rank is asked who it is.
        "identity": identify(model, config.model) if is_first_rank() else {},
        "max_length": config.max_length,
        "batch_tokens": config.batch_tokens,
    }
    if config.kv_dtype is not None and shared["identity"]:
        shared["identity"]["kv_dtype"] = config.kv_dtype
    known = model.get_input_embeddings().num_embeddings
    if is_first_rank() and 2 * part.tokenizer.vocab_size < known:
        # Ids of a smaller vocabulary are all known to the model, and mean other words.
        get_logger("infer").warning(
            "the tokenizer has %d tokens and the model %d: is it the model's own?",
            part.tokenizer.vocab_size, known,
        )  # fmt: skip
    if mesh is not None:
        shared["prefix_reuse"] = config.prefix_reuse
        return SpreadModel(model, part.tokenizer, mesh=mesh, schedule=part.schedule, **shared)
    if not config.prefix_reuse or not goes_on_from_states(model):
        if config.kv_dtype is not None:
            raise ArgumentError(
                "a model that cannot go on from its states has no cache of a smaller type",
                found=f"{type(model).__name__} with --kv-dtype {config.kv_dtype}",
                fix="leave out --kv-dtype",
            )
        if config.prefix_reuse:
            get_logger("infer").info(
                "%s has a recurrence that cannot go on from a state: every prompt is read from its first token",
                config.model,
            )
        return PlainAnswerer(model, part.tokenizer, **shared)
    # Ranks that heard different numbers would read different batches, and wait for each other.
    available = shared_memory if config.tp > 1 else partial(_available, part.replicas)
    kv_dtype = cast("KvDtype | None", config.kv_dtype)  # others are refused with the settings
    return LocalAnswerer(model, part.tokenizer, available=available, kv_dtype=kv_dtype, **shared)


def _available(replicas: int, device: torch.device) -> int | None:
    """Return the bytes that one of several replicas can have: on the CPU they share those of their machine."""
    free = available_memory(device)
    return free if free is None or device.type != "cpu" else free // replicas
