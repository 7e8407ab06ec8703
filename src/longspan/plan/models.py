"""The shape of a dense decoder: what its parameters, FLOPs and activations follow from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import read_json

__all__ = ["MODELS", "ModelShape", "find_model", "shape_of"]


class ModelShape(NamedTuple):
    """Sizes as in the model's `config.json`."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    head_norms: bool = False
    """Queries and keys are normalised by head (Qwen3)."""

    @property
    def layer_parameters(self) -> int:
        """Parameters of the matrices of one layer (norms left out)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Parameters of all matrices, embeddings included."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings

    def linear_flops(self) -> int:
        """FLOPs of one token's forward pass outside attention scores: 2 per weight, the output head included."""
        return 2 * (self.layers * self.layer_parameters + self.vocab * self.hidden)

    def attention_flops(self, tokens: int) -> int:
        """FLOPs of the forward attention of a causal sequence, all layers: half of 4 * tokens^2 * heads * head_dim."""
        return 2 * tokens**2 * self.heads * self.head_dim * self.layers

    def model_flops(self, tokens: int) -> int:
        """FLOPs that a training step on one sequence needs, recomputation not counted: three forward passes."""
        return 3 * (tokens * self.linear_flops() + self.attention_flops(tokens))


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
        ModelShape("llama-2-13b", 40, 5120, 40, 40, 128, 13824, 32000),
        ModelShape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        ModelShape("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        ModelShape("danube2-1.8b", 24, 2560, 32, 8, 80, 6912, 32000),
        ModelShape("qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151936, tied=True, head_norms=True),
        ModelShape("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, head_norms=True),
        ModelShape("qwen3-32b", 64, 5120, 64, 8, 128, 25600, 151936, head_norms=True),
        ModelShape("qwq-32b", 64, 5120, 40, 8, 128, 27648, 152064),
    )
}
"""Models by name."""

REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
WITH_HEAD_NORMS = ("qwen3", "gemma3_text", "olmo2", "olmo3")
UNTIED_BY_DEFAULT = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "olmo3")
"""Families whose config.json may leave out `tie_word_embeddings` and means false."""


def shape_of(config: Mapping[str, Any], name: str = "model") -> ModelShape:
    """Return the shape that a Hugging Face config (the dict of a `config.json`) describes.

    Raises:
        DataError: sizes are missing, or the model is not a dense decoder (mixtures of experts).
    """
    text = config.get("text_config") or config
    missing = [key for key in REQUIRED if not isinstance(text.get(key), int)]
    if missing:
        raise DataError(
            f"the configuration of {name} lacks sizes that an estimate needs",
            found=f"no {', '.join(missing)}",
            fix="give the config.json of a dense causal language model",
        )
    experts = next((key for key in text if key in ("num_experts", "num_local_experts") and text[key]), None)
    if experts is not None:
        raise DataError(
            f"{name} is a mixture of experts, for which there is no estimate",
            found=f"{experts} {text[experts]}",
        )
    heads = text["num_attention_heads"]
    kind = text.get("model_type", "")
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return ModelShape(
        name,
        text["num_hidden_layers"],
        text["hidden_size"],
        heads,
        text.get("num_key_value_heads") or heads,
        text.get("head_dim") or text["hidden_size"] // heads,
        text["intermediate_size"],
        text["vocab_size"],
        tied=kind not in UNTIED_BY_DEFAULT if tied is None else bool(tied),
        head_norms=kind in WITH_HEAD_NORMS,
    )


def find_model(model: str | Path) -> ModelShape:
    """Return the shape of a Hugging Face folder or its `config.json`, or of a model by its name here or on the hub.

    Raises:
        ArgumentError: neither a known name nor such a path.
        DataError: a configuration that is broken or describes no dense decoder.
    """
    path = Path(model)
    name = path.name.lower().removeprefix("meta-").removesuffix("-hf").removesuffix("-instruct")
    if not path.exists() and name in MODELS:
        return MODELS[name]
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ArgumentError(
            "unknown model",
            found=str(model),
            allowed=f"{', '.join(MODELS)}; a folder with config.json; a config.json; a recipe",
        )
    config = read_json(file)
    if not isinstance(config, dict):
        raise DataError(
            f"{file} holds no configuration", found=type(config).__name__, allowed="a JSON object"
        )
    return shape_of(config, path.name if path.is_dir() else path.parent.name or path.stem)
