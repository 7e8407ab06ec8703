"""Settings of an export."""

from __future__ import annotations

from typing import Any, Literal

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

    @property
    def changes(self) -> list[str]:
        """The options that change what the model's config says."""
        names = ("rope", "rope_theta", "max_length")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
