"""What a causal model of transformers does between its last hidden states and its logits, as a `kernels.head.Head`."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.kernels.head import Head
from longspan.models.hf_config import text_config

__all__ = ["backbone", "output_head", "vocab_size"]

# Fields by which families scale their logits (or, which is the same, the hidden states before the product).
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
# One field, two meanings: these multiply by what others divide by.
MULTIPLY = {"hyperclovax": ("logits_scaling",)}
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# What cuts the logits of words that only fill up the matrix.
CUTS = ("unpadded_vocab_size",)


def output_head(model: PreTrainedModel) -> Head:
    """Return what makes logits of the model's last hidden states, with the parameters that it has now.

    Raises:
        ArgumentError: a model that has no output embedding, or layers between it and the hidden states.
    """
    _check_path(model)
    config = text_config(model.config)
    last = model.get_output_embeddings()
    return Head(last.weight, getattr(last, "bias", None), _scale(config), _softcap(config))


def backbone(model: PreTrainedModel) -> nn.Module:
    """Return the layers before the head; itself where the model does not tell them apart."""
    base: nn.Module = model.base_model
    # Llama 4's is not where its class says.
    return getattr(model, "model", model) if base is model else base


def vocab_size(model: PreTrainedModel) -> int:
    """Return how many words have a logit."""
    return int(model.get_output_embeddings().weight.shape[0])


def _check_path(model: PreTrainedModel) -> None:
    name, last = type(model).__name__, model.get_output_embeddings()
    if last is None:
        raise ArgumentError(
            f"{name} has no output embedding: it is no causal language model of one vocabulary"
        )
    children = dict(model.named_children())
    others = [
        key
        for key, child in children.items()
        if child is not last and child is not backbone(model) and next(child.parameters(), None) is not None
    ]
    if others or all(child is not last for child in children.values()):
        raise ArgumentError(
            f"{name} has layers between its hidden states and its output embedding",
            found=", ".join(others) or "an output embedding inside another layer",
        )
    config = text_config(model.config)
    for field in CUTS:
        if (value := getattr(config, field, None)) is not None and value < last.weight.shape[0]:
            raise ArgumentError(
                f"{name} cuts its logits behind its output embedding", found=f"{field}={value}"
            )


def _scale(config: PretrainedConfig) -> float:
    scale = 1.0
    for field in FACTORS + DIVISORS:
        value = getattr(config, field, None)
        if isinstance(value, (int, float)):
            scale *= value if field in FACTORS + MULTIPLY.get(config.model_type, ()) else 1 / value
    return scale


def _softcap(config: PretrainedConfig) -> float | None:
    caps = [getattr(config, field, None) for field in SOFTCAPS]
    return next((float(cap) for cap in caps if cap), None)
