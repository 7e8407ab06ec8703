"""Configs of transformers made from settings: fields checked against the model type, RoPE written into them."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from longspan.core.errors import ConfigError
from longspan.kernels.rope import rope_parameters

__all__ = [
    "checked_overrides",
    "new_config",
    "new_rope",
    "raised_context",
    "rope_by_layer_type",
    "text_config",
]

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
    try:
        known = AutoConfig.for_model(model_type)
        config = AutoConfig.for_model(model_type, **fields)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConfigError(
            f"transformers refuses the model config of type {model_type!r}",
            found=" ".join(line.strip() for line in str(error).splitlines()[:2]),
        ) from error
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


def new_rope(config: PretrainedConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings to put in the config; models with several RoPEs change the one of full attention."""
    text = text_config(config)
    current = getattr(text, "rope_parameters", None)
    if not current:
        raise ConfigError(f"{config.model_type} has no RoPE to change")
    by_layer = rope_by_layer_type(current)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key = "full_attention" if "full_attention" in by_layer else next(iter(by_layer))
    inherited = {
        name: by_layer[key][name] for name in ("rope_theta", "partial_rotary_factor") if name in by_layer[key]
    }
    settings = inherited | dict(rope)
    rotated = int(head_dim * settings.get("partial_rotary_factor", 1.0))
    new = rope_parameters(settings, head_dim=rotated)
    return new if by_layer[key] is current else current | {key: new}


def raised_context(config: PretrainedConfig, rope: Mapping[str, Any] | None, context: int) -> int:
    """Return the `max_position_embeddings` with which a model of `rope_parameters` shall take `context` positions.

    The config's own where that is larger, and with dynamic NTK, which scales by how far a sequence goes beyond it:
    raised, nothing would be scaled.
    """
    own = getattr(text_config(config), "max_position_embeddings", None) or 0
    kinds = [str(found.get("rope_type")) for found in rope_by_layer_type(rope or {}).values()]
    return int(own) if own and any("dynamic" in kind for kind in kinds) else max(int(own), context)


def rope_by_layer_type(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE settings by layer type; a model with one RoPE has one entry, the settings themselves."""
    nested = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    return nested or {"all": parameters}


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the language model inside one of several kinds; its own where there is one kind."""
    return config.get_text_config(decoder=True)
