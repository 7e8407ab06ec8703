"""Metrics for external trackers, TensorBoard and Weights & Biases, beside metrics.jsonl, which is always written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from longspan.core.optional import require
from longspan.train.loop_config import TrackingConfig, WandbConfig


class Tracker(Protocol):
    """Takes numbers by name."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Show the numbers of one step."""

    def close(self) -> None:
        """Hand over what is buffered."""


class TensorBoard:
    """Event files in `RUN/tensorboard`; steps that a resumed run makes again replace the first ones."""

    def __init__(self, run: Path, *, step: int) -> None:
        require("tensorboard", extra="track", feature="tracking.tensorboard")
        writer = require("torch.utils.tensorboard", extra="track", feature="tracking.tensorboard")
        self._writer = writer.SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Show the numbers of one step."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Hand over what is buffered."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; started again, the same run goes on there too."""

    def __init__(self, run: Path, config: WandbConfig, recipe: Mapping[str, Any]) -> None:
        wandb = require("wandb", extra="track", feature="tracking.wandb")
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or run.name,
            dir=str(run),
            config=dict(recipe),
            # The same for the same folder: a run that goes on finds its curves.
            id=hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:16],
            resume="allow",
        )

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Show the numbers of one step."""
        self._run.log({**scalars, "step": step}, step=step)

    def close(self) -> None:
        """Hand over what is buffered."""
        self._run.finish()


def open_trackers(
    config: TrackingConfig, run: Path, *, recipe: Mapping[str, Any], step: int
) -> list[Tracker]:
    """Return those that the recipe asks for; `step` is how far the run has come.

    Raises:
        MissingDependencyError: one is not installed.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(run, step=step))
    if config.wandb is not None:
        trackers.append(Wandb(run, config.wandb, recipe))
    return trackers


def check_trackers(config: TrackingConfig) -> None:
    """Refuse a recipe that asks for one that is not installed, before any work.

    Raises:
        MissingDependencyError: with the command that installs it.
    """
    for wanted, module in ((config.tensorboard, "tensorboard"), (config.wandb is not None, "wandb")):
        if wanted:
            require(module, extra="track", feature=f"tracking.{module}")


def scalars(record: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return the numbers of a record of metrics.jsonl or validation.jsonl by name.

    {"loss": 2.0, "loss_by_source": {"web": 2.1}} -> {"train/loss": 2.0, "train/loss_by_source/web": 2.1}
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found.update(scalars(value, f"{prefix}/{name}"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}/{name}"] = float(value)
    return found
