"""A recipe to a trained model: `longspan train` as a function."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from longspan.core.config import apply_overrides
from longspan.parallel.launch import on_first_rank, process_group
from longspan.train.config import TrainConfig
from longspan.train.recipes import LoadedRecipe, load_recipe, scale_tiny
from longspan.train.tiny_inputs import tiny_inputs
from longspan.train.trainer import TrainResult, train

__all__ = ["at_tiny_scale", "train_model"]


def train_model(
    recipe: str | Path | Mapping[str, Any] | TrainConfig,
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    scale: Literal["full", "tiny"] = "full",
    data_root: str | Path | None = None,
    profile: bool = False,
) -> TrainResult:
    """Train through the stages of a recipe in the run folder `out`; the same call goes on after a kill.

    Args:
        recipe: a YAML file, the name of a shipped recipe such as prolong-64k, or what would stand in the file.
        settings: what is changed about it, by dotted name: `{"stages.0.lr": 1e-5, "seed": 1}`.
        scale: tiny makes a small model and data beside `out` and trains the same stages on a CPU in seconds.
        data_root: where the recipe's relative paths start. None: beside the file, else the working directory.
        profile: record some steps with torch's profiler in `out/profile`.

    Returns:
        `models`: the Hugging Face folder of each stage, by its name; steps and tokens of the run.

    Raises:
        ConfigError, DataError, ArgumentError, MissingDependencyError: recipe, stores, checkpoints, processes or
            packages do not fit; before the first step.
        RunError: the disk is full, or another process is gone or did not answer in time.
    """
    # JSON is YAML too; a None is said as such.
    changes = [f"{name}={json.dumps(value)}" for name, value in (settings or {}).items()]
    if isinstance(recipe, TrainConfig):
        recipe = recipe.to_dict()
    now = () if scale == "tiny" else changes
    if isinstance(recipe, Mapping):
        values = apply_overrides(dict(recipe), now)
        loaded = LoadedRecipe(TrainConfig.from_dict(values, where="the recipe"), "recipe", Path())
    else:
        loaded = load_recipe(recipe, now)
    if data_root is not None:
        loaded = loaded._replace(folder=Path(data_root))
    if scale == "tiny":
        loaded = at_tiny_scale(loaded, changes, out)
    return train(loaded.config, out, data_root=loaded.folder, profile=profile)


def at_tiny_scale(loaded: LoadedRecipe, changes: Sequence[str], out: str | Path) -> LoadedRecipe:
    """Return a recipe at tiny scale with its inputs, which one process makes in `OUT-inputs`.

    `changes` change the scaled recipe: a length of 128 means 128.
    """
    values = apply_overrides(scale_tiny(loaded.config).to_dict(), changes)
    config = TrainConfig.from_dict(values, where=f"{loaded.name} at tiny scale")
    inputs = Path(out).with_name(f"{Path(out).name}-inputs")
    with process_group(timeout_seconds=config.parallel.timeout_seconds):
        on_first_rank(lambda: tiny_inputs(loaded.config, config, inputs, root=loaded.folder))
    return LoadedRecipe(config, loaded.name, inputs)
