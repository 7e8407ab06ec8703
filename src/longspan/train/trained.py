"""The model of a checkpoint, found again from what its run folder says."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.core.records import read_jsonl
from longspan.train.checkpoint import read_checkpoint
from longspan.train.config import TrainConfig
from longspan.train.stage_model import model_path, stage_model, tokenizer_source

__all__ = ["STARTED", "Trained", "load_trained"]

STARTED = "processes"
"""Event of a start: what may differ from one to the next."""


class Trained(NamedTuple):
    """The model of one checkpoint, and where the files beside it are."""

    model: PreTrainedModel
    tokenizer: Path | None
    base: str | None
    """Model that the adapter was trained beside; None = all weights were trained."""


def load_trained(checkpoint: str | Path, *, base: str | None = None, dtype: str | None = None) -> Trained:
    """Return the model of a checkpoint in a run folder, with the RoPE of the stage that wrote it.

    `base` replaces the recipe's `model.path`, which is looked for where training found it, then from the working
    directory. `dtype` is the type of the weights, of the base's beside an adapter; None = that of training.

    Raises:
        DataError: a damaged checkpoint, or no run folder around it.
        ConfigError, ArgumentError: as for training.
    """
    path = Path(checkpoint).resolve()
    run = path.parent.parent
    config = TrainConfig.from_yaml(run / "config.yaml")
    root = _trained_in(run) or Path(config.data_root)
    if base is not None:
        if config.model.path is None:
            raise ArgumentError(f"{checkpoint} began with no other model", fix="leave out --base")
        # A name is looked for below the root first.
        named = str(Path(base).resolve()) if Path(base).exists() else base
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": named})})
    if dtype is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    found = read_checkpoint(path)
    model = stage_model(config, config.stages[found.progress.stage], found, root)
    return Trained(
        model.eval(),
        tokenizer_source(config, root),
        model_path(config, root) if config.lora is not None else None,
    )


def _trained_in(run: Path) -> Path | None:
    """Return the folder from which the paths of a run started, if it is still there."""
    events = run / "events.jsonl"
    started = (
        [record for record in read_jsonl(events) if record.get("event") == STARTED]
        if events.is_file()
        else []
    )
    root = Path(started[-1].get("data_root", "")) if started else None
    return root if root is not None and root.is_absolute() and root.is_dir() else None
