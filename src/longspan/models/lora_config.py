"""Settings of LoRA and QLoRA, apart from `models.lora` so that a recipe is read without torch."""

from __future__ import annotations

from typing import Literal, Self

import pydantic

from longspan.core.config import Config

__all__ = ["LoraConfig", "Quantization"]


class Quantization(Config):
    """How frozen linear layers are stored."""

    kind: Literal["nf4"] = "nf4"
    double_quant: bool = True
    """Store the scales of the blocks in 8 bits: 4.13 bits a weight instead of 4.5."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the products. None: that of what comes in."""


class LoraConfig(Config):
    """What is trained in place of the weights: `lora: {rank: 32, alpha: 16, target_modules: [q_proj, v_proj]}`."""

    ADDED_LATER = frozenset({"target_parameters"})

    rank: int = pydantic.Field(32, ge=1)
    """Columns of B and rows of A."""
    alpha: float = pydantic.Field(32.0, gt=0)
    """B A is scaled by alpha / rank."""
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of the inputs of A that is dropped in training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter, by the end of their name. all-linear: all but the output embedding."""
    target_parameters: tuple[str, ...] = ()
    """Weights of experts that get an adapter, by the end of their name, such as experts.gate_up_proj and
    experts.down_proj: one tensor holds those of all experts of a layer. Each expert has matrices of its own."""
    dora: bool = False
    """Train the length of each row of the sum too."""
    trainable: tuple[str, ...] = ()
    """Layers that are trained whole, by the end of their name, such as embed_tokens, norm, input_layernorm."""
    quantize: Literal["none", "nf4"] = "none"
    """How the frozen linear layers are stored."""
    double_quant: bool = True
    """Of `quantize`: store the scales of the blocks in 8 bits."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Of `quantize`: type of the products. None: that of what comes in."""

    @pydantic.model_validator(mode="after")
    def _something_to_train(self) -> Self:
        if not self.target_modules:
            raise ValueError("target_modules names no layer")
        if self.target_parameters and (self.dropout or self.dora):
            raise ValueError("adapters of target_parameters have no dropout and no dora: leave one out")
        # By value: the settings of a run are written with all defaults, and read again.
        if self.quantize == "none" and (not self.double_quant or self.compute_dtype is not None):
            raise ValueError("double_quant and compute_dtype have no effect without quantize: nf4")
        return self

    @property
    def quantization(self) -> Quantization | None:
        """How the frozen layers are stored; None = as they are."""
        if self.quantize == "none":
            return None
        return Quantization(
            kind=self.quantize, double_quant=self.double_quant, compute_dtype=self.compute_dtype
        )
