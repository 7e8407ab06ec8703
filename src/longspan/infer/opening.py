"""From the name of a model to something that answers: a folder, a loaded model, or a server.

    model, a hub name       a folder in Hugging Face's form, or what the hub calls it
    run/stages/long         the same: a stage's folder, or an adapter's with the base that it names
    openai:NAME             a server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp do) at `base_url`
    anthropic:NAME          Anthropic's

What other readers open (a checkpoint of a training) is given as a function that loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.data.tokenizer import Tokenizer
from longspan.infer.requests import Answerer
from longspan.models.hf import load_model, reading_folder, rope_of, usable_device
from longspan.models.identity import model_identity
from longspan.parallel.schedules import ScheduleName

BATCH_TOKENS = 16_384
PROVIDERS = ("openai", "anthropic")


class Source(NamedTuple):
    """Where a model's weights come from and what is changed about it; can be sent to another process."""

    path: str
    """Folder or hub name; what records call the model."""
    rope: Mapping[str, Any] | None = None
    """RoPE settings in place of the config's."""
    rope_theta: float | None = None
    """Base of the frequencies in place of the config's, whatever else its RoPE is."""
    dtype: str | None = None
    """Type of the weights, `bfloat16` say; None = as saved."""
    load: Callable[[Source], PreTrainedModel] | None = None
    """Loads it in place of `models.hf.load_model`: a function of a module, so that it can be sent."""


def provider(model: str) -> tuple[str, str] | None:
    """Return provider and name of `openai:NAME` or `anthropic:NAME`; None for a model to be run here."""
    kind, colon, name = model.partition(":")
    return (kind, name) if colon and kind in PROVIDERS else None


def load_source(source: Source, *, device: torch.device | None = None) -> PreTrainedModel:
    """Load a model and put it on the device (None: the usable one), ready to be run."""
    if source.load is not None:
        model = source.load(source)
    else:
        dtype = None if source.dtype is None else getattr(torch, source.dtype)
        model = load_model(source.path, rope=rope_settings(source), dtype=dtype)
    return model.to(usable_device() if device is None else device).eval()


def identify(model: PreTrainedModel, source: Source, *, backend: str = "transformers") -> dict[str, Any]:
    """Return what the header of records says of a loaded model."""
    trained_length = model.config.get_text_config(decoder=True).max_position_embeddings
    identity = model_identity(model, source.path)
    return {**identity, "trained_length": trained_length, "backend": backend}


def open_answerer(
    model: str | Source,
    *,
    tokenizer: Tokenizer | None = None,
    rope: Mapping[str, Any] | None = None,
    rope_theta: float | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    tp: int = 1,
    cp: int = 1,
    schedule: ScheduleName | None = None,
    prefix_reuse: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    base_url: str | None = None,
    trained_length: int | None = None,
) -> Answerer:
    """Open a model; close what is returned.

    Args:
        model: see the module; a `Source` says all about the weights itself.
        tokenizer: decodes answers; needed for models that are run here.
        rope, rope_theta, dtype: see `Source`.
        max_length: tokens that prompt and answer may have together; None = the model's own limit is not asked.
        tp: processes that share each matrix.
        cp: processes that share each sequence, by `schedule` (None: ring).
        prefix_reuse: read a prefix that several prompts share once.
        batch_tokens: tokens in one forward pass, at least one sequence.
        base_url: of the server.
        trained_length: of a server's model, which does not say.

    Raises:
        DataError, ConfigError: the model cannot be loaded so.
        ArgumentError: settings that do not go together.
    """
    remote = provider(model) if isinstance(model, str) else None
    if remote is not None:
        return _open_remote(*remote, base_url=base_url, max_length=max_length, trained_length=trained_length)
    if base_url is not None:
        raise ArgumentError("a base URL is for models behind a server", found=model, allowed="openai:NAME")
    if tokenizer is None:
        raise ArgumentError("a model that is run here needs its tokenizer")
    source = model if isinstance(model, Source) else Source(model, rope, rope_theta, dtype)
    loaded = load_source(source)
    return local_answerer(
        loaded,
        tokenizer=tokenizer,
        identity=identify(loaded, source),
        max_length=max_length,
        prefix_reuse=prefix_reuse,
        batch_tokens=batch_tokens,
    )


def local_answerer(
    model: PreTrainedModel,
    *,
    tokenizer: Tokenizer,
    identity: Mapping[str, Any],
    max_length: int | None = None,
    prefix_reuse: bool = True,
    batch_tokens: int = BATCH_TOKENS,
) -> Answerer:
    """Return an answerer around a model in memory; `identity` as from `identify`."""
    from longspan.infer.plain import PlainAnswerer

    return PlainAnswerer(
        model, tokenizer, identity=identity, max_length=max_length, batch_tokens=batch_tokens
    )


def _open_remote(
    kind: str, name: str, *, base_url: str | None, max_length: int | None, trained_length: int | None
) -> Answerer:
    from longspan.infer.remote import RemoteAnswerer

    return RemoteAnswerer(kind, name, base_url=base_url, max_length=max_length, trained_length=trained_length)


def rope_settings(source: Source) -> Mapping[str, Any] | None:
    """Return the RoPE to load a model with; None = its own. A base alone changes nothing else of that.

    Raises:
        ArgumentError: the base is given twice.
        DataError: nothing at the source's path says which RoPE the model has.
    """
    if source.rope_theta is None:
        return source.rope
    if source.rope is not None:
        if "rope_theta" in source.rope:
            raise ArgumentError("the base of the RoPE is given twice", fix="leave out one of them")
        return {**source.rope, "rope_theta": source.rope_theta}
    with reading_folder(source.path):
        own = rope_of(AutoConfig.from_pretrained(source.path))
    return {**(own or {}), "rope_theta": source.rope_theta}
