"""Configs of transformers made from settings: fields checked against the model type, RoPE written into them."""

from __future__ import annotations

import contextlib
import copy
import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from longspan.core.errors import ConfigError
from longspan.kernels.rope import COMMON_KEYS, ROPE_TYPES, rope_parameters

__all__ = [
    "CHOSEN_EXPERTS",
    "attention_width",
    "changed_config",
    "checked_overrides",
    "experts_per_token",
    "head_counts",
    "head_dim",
    "longrope_scale",
    "new_config",
    "new_rope",
    "raised_context",
    "rope_by_layer_type",
    "rope_meaning",
    "rope_of_full",
    "text_config",
    "window_of_all_layers",
]

KNOWN_KEYS = COMMON_KEYS.union(
    {"type", "max_position_embeddings"}, *(keys for pair in ROPE_TYPES.values() for keys in pair)
)
CHOSEN_EXPERTS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k", "moe_k"
)  # fmt: skip
"""What configs call the number of experts that compute a token."""
# Keys of old config files that `rope_parameters` replaces.
LEGACY_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def new_config(
    hf_config: Mapping[str, Any], rope: Mapping[str, Any] | None, context: int | None = None
) -> PretrainedConfig:
    """Return a config from `model_type` and its fields, with `rope` in place of the RoPE among them.

    `context` raises its `max_position_embeddings`.

    Raises:
        ConfigError: unknown `model_type`, field or RoPE setting.
    """
    config = _config_from_dict(hf_config)
    if rope is not None:
        fields = {key: value for key, value in hf_config.items() if key not in LEGACY_ROPE_KEYS}
        config = _config_from_dict(fields | {"rope_parameters": new_rope(config, rope)})
    if context is not None:
        # Not among the fields: what a RoPE does not say of its own context is the config's as it was.
        text = text_config(config)
        text.max_position_embeddings = raised_context(config, getattr(text, "rope_parameters", None), context)
    return config


def _config_from_dict(hf_config: Mapping[str, Any]) -> PretrainedConfig:
    fields = copy.deepcopy(dict(hf_config))
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConfigError(
            "a model config needs model_type", found=sorted(fields), allowed="llama, qwen3, ..."
        )
    with _refusals(f"model config of type {model_type!r}"):
        known = AutoConfig.for_model(model_type)
        config = AutoConfig.for_model(model_type, **fields)
    allowed = (
        known.to_dict().keys()
        | set(known.attribute_map)
        | set(LEGACY_ROPE_KEYS)
        | {"rope_parameters", "dtype"}
    )
    unknown = fields.keys() - allowed
    if unknown:
        raise ConfigError(
            f"a {model_type} config has no {', '.join(sorted(unknown))}",
            allowed=sorted(key for key in allowed if not key.startswith("_")),
        )
    return config


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn what transformers raises over a config into a ConfigError: each family checks fields in a way of its own."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ConfigError(
            f"transformers refuses the {what}",
            found=" ".join(line.strip() for line in str(error).splitlines()[:2]),
        ) from error


def checked_overrides(config: PretrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `overrides`, all of which are fields of the config: transformers takes any name."""
    allowed = config.to_dict().keys() | set(config.attribute_map)
    unknown = sorted(overrides.keys() - allowed)
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(allowed), n=1)
        raise ConfigError(
            f"a {config.model_type} config has no {', '.join(unknown)}",
            allowed=sorted(key for key in allowed if not key.startswith("_")),
            fix=f"did you mean {near[0]!r}?" if near else None,
        )
    return dict(overrides)


def changed_config(
    config: PretrainedConfig,
    *,
    rope: Mapping[str, Any] | None = None,
    context: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """Return a config with other fields in its text model, checked as transformers checks those of a file.

    Args:
        config: of a model of text, or of several kinds.
        rope: `kernels.rope` settings that replace those of the config.
        context: replaces `max_position_embeddings` where that is smaller.
        overrides: other fields.

    Raises:
        ConfigError: a field or RoPE that the model type does not have or refuses.
    """
    text = text_config(config)
    changes = checked_overrides(text, overrides or {})
    if rope is not None:
        changes["rope_parameters"] = new_rope(text, rope)
        if hasattr(text, "original_max_position_embeddings"):
            # A config that has it at the top too prefers that.
            own = rope_of_full(changes["rope_parameters"]).get("original_max_position_embeddings")
            changes["original_max_position_embeddings"] = own or text.original_max_position_embeddings
    if context is not None:
        used = changes.get("rope_parameters", getattr(text, "rope_parameters", None))
        raised = raised_context(text, used, context)
        if raised != getattr(text, "max_position_embeddings", None):
            changes["max_position_embeddings"] = raised
    if not changes:
        return config
    with _refusals(f"changed config of type {text.model_type!r}"):
        new = type(text).from_dict(text.to_dict() | changes)
    if text is config:
        return new
    whole = copy.deepcopy(config)
    name = next(key for key, value in vars(config).items() if value is text)
    setattr(whole, name, new)
    return whole


def new_rope(config: PretrainedConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings to put in the config; models with several RoPEs change the one of full attention."""
    text = text_config(config)
    current = getattr(text, "rope_parameters", None)
    if not current:
        raise ConfigError(f"{config.model_type} has no RoPE to change")
    by_layer = rope_by_layer_type(current)
    try:
        channels = head_dim(text)
    except AmbiguousGlobalPerLayerAttributeError:
        raise ConfigError(
            f"the layers of {config.model_type} have heads of different sizes",
            fix="use a model whose layers are alike: its RoPE is changed for all of them",
        ) from None
    key = "full_attention" if "full_attention" in by_layer else next(iter(by_layer))
    inherited = {
        name: by_layer[key][name] for name in ("rope_theta", "partial_rotary_factor") if name in by_layer[key]
    }
    settings = inherited | dict(rope)
    rotated = int(channels * settings.get("partial_rotary_factor", 1.0))
    # What a family keeps beside its RoPE, such as a scale of the queries, stays.
    kept = {name: value for name, value in by_layer[key].items() if name not in KNOWN_KEYS}
    new = kept | rope_parameters(settings, head_dim=rotated)
    return new if by_layer[key] is current else current | {key: new}


def raised_context(config: PretrainedConfig, rope: Mapping[str, Any] | None, context: int) -> int:
    """Return the `max_position_embeddings` with which a model of `rope_parameters` shall take `context` positions.

    The config's own where that is larger, and with dynamic NTK, which scales by how far a sequence goes beyond it:
    raised, nothing would be scaled.
    """
    own = getattr(text_config(config), "max_position_embeddings", None) or 0
    kinds = [str(found.get("rope_type")) for found in rope_by_layer_type(rope or {}).values()]
    return int(own) if own and any("dynamic" in kind for kind in kinds) else max(int(own), context)


def rope_of_full(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE settings of full attention, of which new ones take the place; the only ones if there is one."""
    by_layer = rope_by_layer_type(parameters)
    return dict(by_layer.get("full_attention") or next(iter(by_layer.values())))


def rope_by_layer_type(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE settings by layer type; a model with one RoPE has one entry, the settings themselves."""
    nested = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    return nested or {"all": parameters}


def rope_meaning(parameters: Mapping[str, Any], context: int | None) -> dict[str, Any]:
    """Return `rope_parameters` in one form for all ways to write the same RoPE of a model with `context` positions."""
    # Of a model with several, transformers keeps what stands beside them, and does not read it.
    nested = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    if nested:
        return {key: rope_meaning(value, context) for key, value in nested.items()}
    known = {key: value for key, value in parameters.items() if key != "type" and value is not None}
    known.setdefault("partial_rotary_factor", 1.0)
    if known.get("rope_type") == "longrope" and context is not None:
        known["attention_factor"] = longrope_scale(known, context)
        known.pop("factor", None)
    return known


def longrope_scale(parameters: Mapping[str, Any], context: int) -> float:
    """Return what LongRoPE multiplies cos and sin by (arXiv:2402.13753, section 3.3), as transformers derives it."""
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or context / original
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the language model inside one of several kinds; its own where there is one kind."""
    return config.get_text_config(decoder=True)


def experts_per_token(config: PretrainedConfig) -> int | None:
    """Return how many experts compute a token; None where the config does not say it."""
    text = text_config(config)
    found = (getattr(text, name, None) for name in CHOSEN_EXPERTS)
    return next((number for number in found if isinstance(number, int)), None)


def widest(config: PretrainedConfig, name: str) -> int | None:
    """Return a size that a config names, the largest where layers differ (Gemma 3n, Gemma 4); None = it does not."""
    text = text_config(config)
    each = getattr(text, "per_layer_config", None)
    layers = [each[index] for index in range(text.num_hidden_layers)] if each else [text]
    found: list[int] = []
    for layer in layers:
        value = getattr(layer, name, None)
        found += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return max(found, default=None)


def head_counts(config: PretrainedConfig) -> tuple[int, int]:
    """Return the numbers of query heads and of key/value heads."""
    heads = widest(config, "num_attention_heads")
    assert heads is not None
    return heads, widest(config, "num_key_value_heads") or heads


def head_dim(config: PretrainedConfig) -> int:
    """Return the channels of a head."""
    text = text_config(config)
    return int(widest(text, "head_dim") or text.hidden_size // text.num_attention_heads)


def attention_width(config: PretrainedConfig) -> int:
    """Return the channels of a head as attention holds it: of latent attention the wider of keys and values."""
    if is_latent(config):
        text = text_config(config)
        return max(text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim)
    return head_dim(config)


def is_latent(config: PretrainedConfig) -> bool:
    """Return whether keys and values are made of one latent value a token (DeepSeek's attention)."""
    parts = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return all(isinstance(getattr(text_config(config), name, None), int) for name in parts)


def window_of_all_layers(config: PretrainedConfig) -> int | None:
    """Return the sliding window in tokens if every layer has it, else None: `balanced` deals work by it."""
    text = text_config(config)
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])
    return getattr(text, "sliding_window", None) if kinds == {"sliding_attention"} else None
