"""Settings of an export."""

from __future__ import annotations

from typing import Any, Literal, Self

import pydantic

from longspan.core.config import Config, Length


class ExportConfig(Config):
    """What is written, and what is changed about it."""

    checkpoint: str
    """A stage's folder, a checkpoint, an adapter folder, a model folder, a run folder (its last stage), or the hub name
    of a model or an adapter."""
    adapter: bool = False
    """Write the adapter alone instead of merging it into its base."""
    base: str | None = None
    """Base model of an adapter, or the model that a checkpoint's run began with. None: as in training."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the written weights. None: that of the trained model, or of the base."""
    tokenizer: str | None = None
    """Folder with tokenizer files. None: those of the checkpoint or its base."""
    rope: dict[str, Any] | None = None
    """RoPE to write instead of the model's own, such as {rope_type: linear, factor: 8}: that of its evaluation, where
    config.json says another."""
    rope_theta: float | None = None
    """Base of the RoPE instead of the model's own, such as 200e6."""
    max_length: Length | None = None
    """Positions to write where the model's config says fewer, such as 80k."""

    gguf: Literal["auto", "f32", "f16", "bf16", "q8_0"] | None = None
    """Write a GGUF file for llama.cpp into the folder as well, its weights in this type, by llama.cpp's own converter;
    auto: 16 bits. Its RoPE and length are held against the model's."""
    converter: str | None = None
    """llama.cpp's convert_hf_to_gguf.py, or the folder it lies in. None: the one on the PATH."""
    push: str | None = None
    """Upload the folder to this repository of the Hugging Face hub, OWNER/NAME, which is private where it is made here;
    the token is that of `hf auth login` or HF_TOKEN."""
    public: bool = False
    """Make that repository public."""
    overwrite: bool = False
    """Replace the files that the repository holds; its history keeps them."""

    @pydantic.model_validator(mode="after")
    def _all_have_effect(self) -> Self:
        if self.gguf is None and self.converter is not None:
            raise ValueError("converter has an effect with gguf alone: it writes that file")
        if self.gguf is not None and self.adapter:
            raise ValueError("a GGUF file holds a whole model: leave out adapter, or gguf")
        if self.push is None and (self.public or self.overwrite):
            raise ValueError("public and overwrite say what becomes of the repository that push names")
        return self

    @property
    def changes(self) -> list[str]:
        """The options that change what the model's config says."""
        names = ("rope", "rope_theta", "max_length")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
