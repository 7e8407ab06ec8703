"""The shape of a decoder: what its parameters, FLOPs and activations follow from.

A shape describes layers that are alike; a model with layers of several kinds is `mixed`: the shapes of its kinds stand
in it, each with the number of its layers. Shapes of configurations are taken from the empty model itself
(`models.shape`), which counts every weight; those in MODELS are formulas of Llama and its kin, so that planning them
needs no torch.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

__all__ = [
    "MODELS",
    "ModelShape",
    "causal_pairs",
    "name_within",
    "plain_name",
    "published_configs",
]

FLOPS_OF_STATE = 6
"""Of a token for each element of a state: it decays or is read for the delta rule, a product is added, it is read."""

Tokens = TypeVar("Tokens", int, float, NDArray[np.float64])


class ModelShape(NamedTuple):
    """Sizes of a model whose layers are alike, or, with `mixed`, of the layer that most of its kinds resemble."""

    name: str
    layers: int
    hidden: int
    heads: int
    """Query heads of a layer; 0: it has no attention."""
    kv_heads: int
    head_dim: int
    """Of queries and keys."""
    intermediate: int
    """Width of a gated MLP of as many weights as a token is multiplied by in this layer's, chosen experts together."""
    vocab: int
    tied: bool = False
    head_norms: bool = False
    """Queries and keys are normalised by head (Qwen3)."""
    biases: bool = False
    """Queries, keys and values have a bias (Qwen2)."""
    value_dim: int = 0
    """Of values; 0: as `head_dim`. Attention holds both at the width of the wider."""
    window: int | None = None
    """Tokens that a query of a sliding window sees."""
    chunk: int | None = None
    """Tokens of a chunk, of which a query sees its own (Llama 4)."""
    state: int = 0
    """Elements that a layer with a state carries from token to token."""
    experts: int = 0
    chosen: int = 0
    """Experts that compute a token."""
    counted: tuple[int, int, int] | None = None
    """Weights of a layer, those that a token is multiplied by, and weights outside of layers; None: as in Llama."""
    matrices: tuple[int, ...] = ()
    """Elements of each matrix of a layer; none: as in Llama."""
    latent: int = 0
    """Elements that a token leaves behind in a layer of latent attention, where keys and values are not kept; 0: it is
    another attention."""
    mixed: tuple[ModelShape, ...] = ()

    @property
    def kinds(self) -> tuple[ModelShape, ...]:
        """Layers that are alike, each kind with its number; the model itself where all are."""
        return self.mixed or (self,)

    @property
    def held_dim(self) -> int:
        """Channels of a head as attention holds it: the wider of keys and values."""
        return max(self.head_dim, self.value_dim)

    @property
    def llama_weights(self) -> int:
        """Weights of the matrices of a layer like Llama's with these sizes."""
        attention = self.hidden * self.held_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer; of several kinds the mean."""
        if self.mixed:
            return round(sum(kind.layers * kind.layer_parameters for kind in self.mixed) / self.layers)
        if self.counted is not None:
            return self.counted[0]
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        biases = self.head_dim * (self.heads + 2 * self.kv_heads) if self.biases else 0
        return self.llama_weights + norms + biases

    @property
    def largest_layer(self) -> int:
        """Weights of the layer that has most."""
        return max(kind.layer_parameters for kind in self.kinds)

    @property
    def layer_active(self) -> int:
        """Weights of one layer that a token is multiplied by; of several kinds the mean."""
        if self.mixed:
            return round(sum(kind.layers * kind.layer_active for kind in self.mixed) / self.layers)
        return self.llama_weights if self.counted is None else self.counted[1]

    @property
    def outside(self) -> int:
        """Weights that are in no layer: embeddings and the last norm."""
        if self.counted is not None:
            return self.counted[2]
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        return sum(kind.layers * kind.layer_parameters for kind in self.kinds) + self.outside

    @property
    def active_parameters(self) -> int:
        """Weights that take part in one token: no experts that are not chosen, no other rows of an embedding."""
        idle = sum(
            kind.layers * (kind.layer_parameters - kind.layer_active) for kind in self.kinds if kind.experts
        )
        return self.parameters - idle - (0 if self.tied else self.vocab * self.hidden)

    @property
    def weight_scale(self) -> float:
        """All weights of a layer beside those of one like Llama's: experts that are not chosen have gradients too."""
        return self.layer_parameters / max(1, self.llama_weights)

    @property
    def layer_matrices(self) -> tuple[int, ...]:
        """Elements of every matrix of one layer."""
        if self.matrices:
            return self.matrices
        query, key = (self.hidden * heads * self.held_dim for heads in (self.heads, self.kv_heads))
        return (query, key, key, query, *[self.hidden * self.intermediate] * 3)

    @property
    def cache_elements(self) -> int:
        """Elements that one token leaves behind in one layer: keys and values, or the latent where there is one."""
        return self.latent or self.kv_heads * (self.head_dim + (self.value_dim or self.head_dim))

    def linear_flops(self) -> int:
        """FLOPs of one token's forward pass outside attention scores: 2 per weight, the output head included."""
        layers = sum(
            kind.layers * (2 * kind.layer_active + FLOPS_OF_STATE * kind.state) for kind in self.kinds
        )
        return layers + 2 * self.vocab * self.hidden

    def attention_flops(self, tokens: Tokens) -> Tokens:
        """FLOPs of the forward attention of a causal sequence, all layers: 2 a pair for each channel of q k and p v."""
        total = 0 * tokens
        for kind in self.kinds:
            channels = kind.layers * kind.heads * (kind.head_dim + (kind.value_dim or kind.head_dim))
            total = total + 2 * channels * kind.pairs(tokens)
        return total

    def pairs(self, tokens: Tokens) -> Tokens:
        """Pairs of a query and a key in one causal sequence of a layer of this kind."""
        return causal_pairs(tokens, self.window, self.chunk)

    def model_flops(self, tokens: int) -> float:
        """FLOPs that a training step on one sequence needs, recomputation not counted: three forward passes."""
        return 3 * (tokens * self.linear_flops() + self.attention_flops(tokens))


def causal_pairs(tokens: Tokens, window: int | None = None, chunk: int | None = None) -> Tokens:
    """Return the pairs of a query and a key that it sees in a causal sequence: half of tokens^2 without a window."""
    if chunk is not None:
        return tokens * np.minimum(tokens, chunk) / 2
    if window is None:
        return tokens**2 / 2  # type: ignore[return-value]
    seen = np.minimum(tokens, window)
    return tokens * seen - seen**2 / 2


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
        ModelShape("llama-2-13b", 40, 5120, 40, 40, 128, 13824, 32000),
        ModelShape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        ModelShape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, tied=True),
        ModelShape("llama-3.2-3b", 28, 3072, 24, 8, 128, 8192, 128256, tied=True),
        ModelShape("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        ModelShape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        ModelShape("llama-3.3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        ModelShape("danube2-1.8b", 24, 2560, 32, 8, 80, 6912, 32000),
        ModelShape("qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151936, tied=True, head_norms=True),
        ModelShape("qwen3-1.7b", 28, 2048, 16, 8, 128, 6144, 151936, tied=True, head_norms=True),
        ModelShape("qwen3-4b", 36, 2560, 32, 8, 128, 9728, 151936, tied=True, head_norms=True),
        ModelShape("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, head_norms=True),
        ModelShape("qwen3-14b", 40, 5120, 40, 8, 128, 17408, 151936, head_norms=True),
        ModelShape("qwen3-32b", 64, 5120, 64, 8, 128, 25600, 151936, head_norms=True),
        ModelShape("qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864, 151936, tied=True, biases=True),
        ModelShape("qwen2.5-1.5b", 28, 1536, 12, 2, 128, 8960, 151936, tied=True, biases=True),
        ModelShape("qwen2.5-3b", 36, 2048, 16, 2, 128, 11008, 151936, tied=True, biases=True),
        ModelShape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064, biases=True),
        ModelShape("qwen2.5-14b", 48, 5120, 40, 8, 128, 13824, 152064, biases=True),
        ModelShape("qwen2.5-32b", 64, 5120, 40, 8, 128, 27648, 152064, biases=True),
        ModelShape("qwen2.5-72b", 80, 8192, 64, 8, 128, 29568, 152064, biases=True),
        ModelShape("mistral-7b", 32, 4096, 32, 8, 128, 14336, 32768),
        ModelShape("qwq-32b", 64, 5120, 40, 8, 128, 27648, 152064, biases=True),
    )
}
"""Models by name that are planned without torch."""


def published_configs() -> dict[str, dict[str, Any]]:
    """Return the configs of published models by name, whose shapes `models.shape` counts."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(
        files("longspan.plan").joinpath("configs.yaml").read_text("utf-8")
    )
    return found


def name_within(model: str) -> str | None:
    """Return the longest known name in that of a model, `llama-3-8b` in `Llama-3-8B-ProLong-64k-Base`; None: none."""
    name = plain_name(model).replace("_", "-")
    return max((known for known in (*MODELS, *published_configs()) if known in name), key=len, default=None)


def plain_name(model: str) -> str:
    """Return `llama-3-8b` for `meta-llama/Meta-Llama-3-8B-Instruct`: versions of a model have its sizes."""
    name = model.rsplit("/", 1)[-1].lower()
    # Of Mistral 7B the third version alone has the words that MODELS says.
    name = re.sub(r"(?:-(?:hf|instruct|thinking|chat|base|it|pt|2507))+$", "", name.removesuffix("-v0.3"))
    return name.removeprefix("meta-")
