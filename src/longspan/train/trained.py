"""The model of a checkpoint, found again from what its run folder says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError, DataError
from longspan.core.records import read_jsonl
from longspan.train.checkpoint import read_checkpoint
from longspan.train.config import TrainConfig
from longspan.train.known_models import known_model
from longspan.train.stage_model import stage_model, tokenizer_source

__all__ = ["STARTED", "Trained", "check_same_plan", "load_trained"]

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
    known = known_model(config.model, root, fetch=True)
    model = stage_model(config, config.stages[found.progress.stage], found, known)
    return Trained(
        model.eval(),
        tokenizer_source(config, root),
        known.path if config.lora is not None else None,
    )


def check_same_plan(run: Path, plan: Mapping[str, Any]) -> None:
    """Refuse to go on with another model or other data than those that a run began with.

    Data of stages that are done are no matter. `plan` is what `RunPlan.identity` says.

    Raises:
        DataError: naming what differs.
    """
    known = [start["plan"] for start in _starts(run) if "plan" in start]
    if not known:
        return
    before, now = known[0], json.loads(json.dumps(plan, default=str))
    differ = {key: value for key, value in now["model"].items() if before["model"].get(key) != value}
    if differ:
        raise DataError(
            f"the run in {run} began with another model",
            found=differ,
            allowed={key: before["model"].get(key) for key in differ},
            fix="go on with the model that it began with, or begin a new run in another --out",
        )
    for stage, data in now["data"].items():
        if before["data"].get(stage, data) != data and not (run / "stages" / stage).exists():
            raise DataError(
                f"the run in {run} began with other data in stage {stage!r}",
                found=data,
                allowed=before["data"][stage],
                fix="go on with the data that it began with, or begin a new run in another --out",
            )


def _starts(run: Path) -> list[dict[str, Any]]:
    """Return what a run said at each of its starts."""
    events = run / "events.jsonl"
    records = read_jsonl(events) if events.is_file() else []
    return [record for record in records if record.get("event") == STARTED]


def _trained_in(run: Path) -> Path | None:
    """Return the folder from which the paths of a run started, if it is still there."""
    started = _starts(run)
    root = Path(started[-1].get("data_root", "")) if started else None
    return root if root is not None and root.is_absolute() and root.is_dir() else None
