"""Settings of the training loop: where it starts, what it measures, where metrics go, how the machine is used."""

from __future__ import annotations

from typing import Literal, Self

import pydantic

from longspan.core.config import Config, Length

LossAverage = Literal["tokens", "samples", "rows", "steps"]
"""What the loss of a step is a mean of."""


class InitConfig(Config):
    """Begin with what another run has learnt, without renaming its files."""

    path: str
    """A run folder, of which the newest checkpoint is taken, or one `checkpoints/step-*`; relative to `data_root`. Of a
    Hugging Face Trainer, its folder or one `checkpoint-*`: moments alone, from `optimizer.pt`."""
    weights: bool = True
    """Take the weights. False: those of `model`."""
    optimizer: bool = False
    """Take the moments of the optimizer. The schedule starts anew either way."""

    @pydantic.model_validator(mode="after")
    def _takes_something(self) -> Self:
        if not (self.weights or self.optimizer):
            raise ValueError("init_from takes weights, optimizer or both")
        return self


class DistillConfig(Config):
    """How a stage of `objective: distill` learns from the annotations of its streams (kernels/distill.py)."""

    weight: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of the divergence from the teacher in the loss; the rest is the cross-entropy of the next token."""
    temperature: float = pydantic.Field(1.0, gt=0)
    """Temperature: flattens both distributions before they are compared; the divergence is scaled by its square."""


class RouterConfig(Config):
    """Losses of the routers of a mixture of experts, over all tokens of a step (models/routing.py)."""

    aux_loss: float | None = pydantic.Field(None, ge=0)
    """Weight of the load-balancing loss. None: the model's `router_aux_loss_coef` where its config has
    `output_router_logits`, else 0, as transformers trains it. In a step of several micro-batches, or with
    `memory.chunk_tokens`, it costs one more forward pass."""
    z_loss: float = pydantic.Field(0.0, ge=0)
    """Weight of the z-loss, the mean square of the logits' logsumexp."""


class ValidationConfig(Config):
    """Perplexity on text that is not trained on, by length, while the run goes on."""

    stores: dict[str, str | tuple[str, ...]] = pydantic.Field(min_length=1)
    """Token store folders by a name for the curve, relative to `data_root`."""
    lengths: tuple[Length, ...] = pydantic.Field(min_length=1)
    """Tokens of the windows, each the beginning of a document that is at least so long; such as [4k, 32k]."""
    windows: int = pydantic.Field(8, ge=1)
    """Documents a length and name, the same ones each time."""
    every_steps: int = pydantic.Field(100, ge=1)
    """Optimizer steps between two measurements; there is one before the first step and one after the last too."""


class WandbConfig(Config):
    """Where Weights & Biases shows the run."""

    project: str
    entity: str | None = None
    name: str | None = None
    """None: the name of the run folder."""


class TrackingConfig(Config):
    """Where metrics go beside `metrics.jsonl`, which is always written."""

    tensorboard: bool = False
    """Write event files to `RUN/tensorboard`."""
    wandb: WandbConfig | None = None


class RuntimeConfig(Config):
    """How the machine is used; nothing here changes what is computed, but for rounding."""

    compile_blocks: bool = False
    """Compile each transformer block with torch.compile; attention stays as it is. The first step takes minutes."""
    flash: Literal["auto", "fa2", "fa3", "fa4"] = "auto"
    """FlashAttention on a GPU. auto: the one made for it (3 for Hopper, 4 for Blackwell) where that is installed, else
    torch's own, the second; the log says which and why."""
    empty_cache_every: int | None = pydantic.Field(None, ge=1)
    """Optimizer steps after which the cache of torch's GPU allocator is emptied. None: never."""
    expandable_segments: bool = True
    """Let torch grow its segments of GPU memory, so that rows of many lengths do not fragment it."""
