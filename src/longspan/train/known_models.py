"""The model of a recipe before it is trained: its config, read once, or what its name says without fetching it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PretrainedConfig

from longspan.core.errors import DataError
from longspan.models.hf import own_config, rope_of
from longspan.models.hf_config import changed_config, head_counts, new_config, window_of_all_layers
from longspan.models.known_checkpoints import with_known_rope
from longspan.models.places import adapter_folder
from longspan.models.shape import model_shape
from longspan.plan.models import MODELS, ModelShape, name_within, published_configs
from longspan.train.config import ModelConfig

__all__ = ["AttentionSizes", "KnownModel", "known_model", "model_path"]

OWN_CONTEXT = {
    "llama-2-7b": 4096,
    "llama-2-13b": 4096,
    "llama-3-8b": 8192,
    "llama-3-70b": 8192,
    "llama-3.1-8b": 131072,
    "llama-3.2-": 131072,
    "prolong-512k": 524288,
    "danube2-1.8b": 8192,
    "qwen3-": 40960,
    "qwen3-4b-base": 32768,
    "qwen3-8b-base": 32768,
    "-2507": 262144,
}
"""Positions of models by what their names contain; the last that fits counts."""


class AttentionSizes(NamedTuple):
    """What decides how a model's attention can be spread."""

    heads: int
    kv_heads: int
    window: int | None
    """Tokens of a sliding window that all layers have."""


class KnownModel(NamedTuple):
    """A model that need not be on this machine."""

    path: str | None
    """Folder or hub name; None: it is made from scratch."""
    config: PretrainedConfig | None
    """As it was before training, with the RoPE that its weights are known to need; None: it is not at hand."""
    as_saved: PretrainedConfig | None
    """As its files have it; None, too, for an adapter and a model from scratch."""
    shape: ModelShape | None
    """None: a model without an estimate, which trains all the same, or a name that says nothing."""
    own_context: int | None
    named: PretrainedConfig | None = None
    """Where it is not at hand: a config of its family and sizes, by its name; its lengths and RoPE where
    `own_context` is known."""

    @property
    def sizes(self) -> AttentionSizes | None:
        """What its attention can be spread by; None: not known."""
        if self.config is None:
            return None if self.shape is None else AttentionSizes(self.shape.heads, self.shape.kv_heads, None)
        return AttentionSizes(*head_counts(self.config), window_of_all_layers(self.config))

    def identity(self) -> dict[str, Any]:
        """Return what makes it the same model for a run that goes on: its sizes and its RoPE."""
        assert self.config is not None
        text = self.config.get_text_config(decoder=True)
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        return {name: getattr(text, name, None) for name in ("model_type", *names)} | {
            "rope": rope_of(self.config)
        }


def model_path(model: ModelConfig, root: Path) -> str | None:
    """Return the model's folder below `root`, else the path as it is: a hub name, or from the working directory."""
    if model.path is None:
        return None
    folder = root / model.path
    return str(folder) if folder.is_dir() else model.path


def known_model(model: ModelConfig, root: Path, *, fetch: bool = False) -> KnownModel:
    """Return the model with its config; where that is not at hand and not to be fetched, what the name says.

    Raises:
        ConfigError, DataError: nothing says how the model is made.
    """
    path = model_path(model, root)
    config = as_saved = None
    if model.hf_config is not None:
        config = new_config(model.hf_config, None)
    elif path is not None and (fetch or _is_at_hand(path)):
        if adapter_folder(path) is None:
            as_saved = own_config(path, as_saved=True)
            config = with_known_rope(as_saved, path)
        else:
            config = own_config(path)
    if config is not None:
        try:
            shape = model_shape(changed_config(config, overrides=model.config_overrides))
        except DataError:
            shape = None
        text = config.get_text_config(decoder=True)
        own_context = getattr(text, "max_position_embeddings", None)
        return KnownModel(path, config, as_saved, shape, own_context)
    # meta-llama/Meta-Llama-3-8B-Instruct is a llama-3-8b, gpt-oss-20b-bf16 a gpt-oss-20b.
    known = name_within(str(path))
    fields = published_configs().get(known or "")
    if known is not None and fields is not None:
        named = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        named = changed_config(named, overrides=model.config_overrides)
        return KnownModel(
            path, None, None, model_shape(named, known), fields.get("max_position_embeddings"), named
        )
    # What overrides do to sizes is not to be told without a config.
    of_name = None if known is None or model.config_overrides else MODELS[known]
    name = str(path).lower().rsplit("/", 1)[-1].replace("_", "-")
    lengths = [length for key, length in OWN_CONTEXT.items() if key in name]
    return KnownModel(path, None, None, of_name, lengths[-1] if lengths else None)


def _is_at_hand(path: str) -> bool:
    """Whether the config of a model is in its folder, or in the cache of the hub."""
    if (Path(path) / "config.json").is_file():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(path, "config.json"), str)
    except HFValidationError:
        return False
