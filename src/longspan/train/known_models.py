"""What is known of a recipe's model without fetching it: its shape and its own context."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from longspan.core.errors import DataError
from longspan.core.files import read_json
from longspan.plan.models import MODELS, ModelShape, shape_of
from longspan.train.config import ModelConfig

__all__ = ["KnownModel", "known_model"]

OWN_CONTEXT = {
    "llama-2-7b": 4096,
    "llama-2-13b": 4096,
    "llama-3-8b": 8192,
    "llama-3-70b": 8192,
    "prolong-512k": 524288,
    "danube2-1.8b": 8192,
}
"""Positions of models by what their names contain; the last that fits counts."""


class KnownModel(NamedTuple):
    """A model that need not be on this machine."""

    shape: ModelShape | None
    own_context: int | None
    config: dict[str, Any] | None
    """Its config.json, where that is at hand: in a folder or in the cache of the hub."""


def known_model(model: ModelConfig, root: Path) -> KnownModel:
    """Return what a config at hand, or else the model's name, says; nothing is fetched."""
    config = _config_at_hand(model, root)
    if config is not None:
        try:
            shape = shape_of(config, "model")
        except DataError:
            # No dense decoder: it trains all the same, and has no estimate.
            shape = None
        text = config.get("text_config") or config
        return KnownModel(shape, text.get("max_position_embeddings"), config)
    # meta-llama/Meta-Llama-3-8B-Instruct is a llama-3-8b.
    name = str(model.path).lower().rsplit("/", 1)[-1].replace("_", "-")
    shapes = [shape for key, shape in MODELS.items() if key in name]
    lengths = [length for key, length in OWN_CONTEXT.items() if key in name]
    return KnownModel(shapes[-1] if shapes else None, lengths[-1] if lengths else None, None)


def _config_at_hand(model: ModelConfig, root: Path) -> dict[str, Any] | None:
    if model.hf_config is not None:
        return AutoConfig.for_model(**model.hf_config).to_dict()
    for folder in (root / str(model.path), Path(str(model.path))):
        if (folder / "config.json").is_file():
            return dict(read_json(folder / "config.json")) | model.config_overrides
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(model.path), "config.json")
    except HFValidationError:
        return None
    return dict(read_json(cached)) | model.config_overrides if isinstance(cached, str) else None
