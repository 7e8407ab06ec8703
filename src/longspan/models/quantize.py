"""Frozen linear layers in 4 bits (NF4) through bitsandbytes, made from a model that is there, and undone.

A block of 64 weights shares a scale; each weight is one of 16 quantiles of a normal distribution (QLoRA,
arXiv:2305.14314, section 3). What a layer computes is x W^T with W taken back to its own type.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longspan.core.errors import ConfigError
from longspan.core.optional import require
from longspan.models.lora_config import Quantization

__all__ = [
    "bitsandbytes",
    "dequantize",
    "is_called",
    "linears",
    "passed_by",
    "plain_parameters",
    "quantize",
    "replace_layer",
    "stored_as",
    "without_advice",
]

NF4_BLOCK = 64
"""Weights that share a scale."""


def quantize(model: nn.Module, how: Quantization, *, keep: Iterable[str] = ()) -> None:
    """Store the weights of a model's linear layers in 4 bits, in place.

    Each weight is rounded by up to 15 % of the largest in its block.

    The output embedding, layers whose weight kernels take by itself and the layers named in `keep` stay as they are.
    Cost: one pass over the weights, where they are (faster on a GPU).

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
    """
    bnb = bitsandbytes()
    found = linears(model)
    kept = [*keep, *passed_by(model, found)]
    for name, layer in found.items():
        if any(is_called(word, name) for word in kept):
            continue
        small = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=None if how.compute_dtype is None else getattr(torch, how.compute_dtype),
            compress_statistics=how.double_quant,
            quant_type=how.kind,
            device="meta",
        )
        small.bias = layer.bias
        # A weight repacked for a kernel that computes in bfloat16 would change what evaluation computes.
        small.support_avx512bf16_for_cpu = False
        weight = bnb.nn.Params4bit(
            layer.weight.data,
            requires_grad=False,
            blocksize=NF4_BLOCK,
            compress_statistics=how.double_quant,
            quant_type=how.kind,
            module=small,
        )
        small.weight = weight.to(layer.weight.device)
        small.train(layer.training)
        replace_layer(model, name, small)
    # By this name peft knows that there are quantised layers.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    model.longspan_quantization = how  # type: ignore[assignment]


def dequantize(model: nn.Module) -> None:
    """Put float32 linear layers with the same values in the place of quantised ones, in place."""
    if stored_as(model) is None:
        return
    bnb = bitsandbytes()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        state = layer.weight.quant_state or layer.quant_state
        values = bnb.functional.dequantize_4bit(layer.weight.data, state).float()
        wide = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        wide.weight, wide.bias = nn.Parameter(values, requires_grad=False), layer.bias
        replace_layer(model, name, wide.train(layer.training))
    model.is_loaded_in_4bit = False  # type: ignore[assignment]
    model.longspan_quantization = None  # type: ignore[assignment]


def plain_parameters(model: nn.Module, device: torch.device) -> None:
    """Move a model to `device` and make its 4-bit weights plain byte tensors, which FSDP2 shards like others.

    The layers wrap the gathered bytes again when they compute; the scales stay whole on every rank (0.13 bits a
    weight). A model without 4-bit weights is left alone.

    Raises:
        ConfigError: DoRA, which reads the weights before the layer has gathered and wrapped them.
    """
    if stored_as(model) is None:
        return
    if any(config.use_dora for config in getattr(model, "peft_config", {}).values()):
        raise ConfigError(
            "DoRA on quantised weights does not run sharded",
            found="lora.dora and lora.quantize: nf4 on several processes",
            fix="set dora or quantize to their defaults, or train on one process",
        )
    bnb = bitsandbytes()
    model.to(device)
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.quant_state = layer.weight.quant_state
            layer.weight = nn.Parameter(layer.weight.data.as_subclass(torch.Tensor), requires_grad=False)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers by name, without the output embedding."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }


def passed_by(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the linear layers whose weight is read by itself and not by its layer, so past an adapter.

    Those are the outputs of Mamba and Mamba-2, whose fused kernels take the weight, and routers that compute their
    logits in fp32 (LongCat).
    """
    found = []
    for name in names:
        parent, _, last = name.rpartition(".")
        holder = model.get_submodule(parent)
        state_space = last == "out_proj" and hasattr(holder, "A_log") and hasattr(holder, "D")
        if state_space or (last == "classifier" and hasattr(holder, "e_score_correction_bias")):
            found.append(name)
    return found


def is_called(word: str, name: str) -> bool:
    """Whether `word` is the end of a layer's name, at a dot: norm means model.norm, not input_layernorm."""
    return name == word or name.endswith("." + word)


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the layer called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def stored_as(model: nn.Module) -> dict[str, Any] | None:
    """Return the settings by which a model was quantised, as plain values; None = it was not."""
    how: Quantization | None = getattr(model, "longspan_quantization", None)
    return how.to_dict() if how is not None else None


def bitsandbytes() -> ModuleType:
    """Return the package. Raises MissingDependencyError when it is not installed."""
    with without_advice():
        return require("bitsandbytes", extra="qlora", feature="QLoRA (quantize: nf4)")


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Keep bitsandbytes, which peft imports too, from advising kernels that it would fetch from the hub."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
