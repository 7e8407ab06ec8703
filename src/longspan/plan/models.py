"""The shape of a dense decoder: what its parameters, FLOPs and activations follow from."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MODELS", "ModelShape"]


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
        ModelShape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        ModelShape("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        ModelShape("qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151936, tied=True),
        ModelShape("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936),
        ModelShape("qwen3-32b", 64, 5120, 64, 8, 128, 25600, 151936),
        ModelShape("qwq-32b", 64, 5120, 40, 8, 128, 27648, 152064),
    )
}
"""Models by name."""
