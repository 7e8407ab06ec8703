"""The model that stands for a recipe's at tiny scale: of its family, a layer of each kind, small sizes."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from longspan.core.log import get_logger
from longspan.data.tokenizer import Tokenizer
from longspan.models.hf import build_model
from longspan.models.hf_config import text_config
from longspan.train.known_models import KnownModel
from longspan.train.recipes import tiny_positions, tiny_rope

__all__ = ["VOCABULARY", "tiny_model"]

VOCABULARY = 512
DEFAULT_CONTEXT = 4096
FAMILY_SIZES = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
"""Sizes of the families that a Llama does not have, where their configs have them."""


def tiny_model(known: KnownModel, tokenizer: Tokenizer, *, seed: int) -> PreTrainedModel:
    """Return a model from scratch with the structure of another; a Llama where nothing says it or none can be built."""
    shares_heads = known.shape is not None and known.shape.kv_heads < known.shape.heads
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if shares_heads else 4,
        "max_position_embeddings": tiny_positions(known.own_context or DEFAULT_CONTEXT),
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    llama = {"model_type": "llama", **sizes}
    config = known.named if known.config is None else known.config
    if config is None:
        has_norms = known.shape is not None and known.shape.head_norms
        return build_model(
            {"model_type": "qwen3", "head_dim": 16, **sizes} if has_norms else llama, seed=seed
        )
    own = text_config(config)
    if own.model_type != "llama":
        try:
            fields = {"model_type": own.model_type, **sizes, "pad_token_id": None, **_family_fields(own)}
            return build_model(fields, seed=seed)
        except Exception as error:  # noqa: BLE001
            # Of hundreds of families, each may want its sizes to fit in a way of its own.
            get_logger("train").warning(
                "tiny scale: a Llama stands for the %s model (%s: %s)",
                own.model_type, type(error).__name__, str(error).partition("\n")[0],
            )  # fmt: skip
    return build_model(llama, seed=seed)


def _family_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return what a family has beside a Llama's sizes: kinds of layers, windows, experts, RoPEs."""
    # A file may say more than the family's config has.
    known = type(config)().to_dict().keys()
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    small: dict[str, Any] = {
        name: min(fields[name], size)
        for name, size in FAMILY_SIZES.items()
        if isinstance(fields.get(name), int)
    }
    if kinds := list(dict.fromkeys(fields.get("layer_types") or ())):
        layers = kinds * 2 if len(kinds) == 1 else kinds
        small |= {"layer_types": layers, "num_hidden_layers": len(layers)}
    if rope := fields.get("rope_parameters"):
        small["rope_parameters"] = tiny_rope(rope)
    return small
