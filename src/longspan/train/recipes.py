"""The shipped recipes by name, and every recipe at a scale that a CPU trains in seconds.

`scale_tiny` is the one rule. What it changes:

    lengths        every length in tokens divided by 1024: context_length, PoSE's target, thresholds, document limits;
                   at least 32 for rows (128 and 2048 where shorter ones would hold conversations and agents' traces)
                   and 16 for the others
    duration       4 steps a stage (a stage of 0 stays), one epoch where the recipe counts in epochs
    batch          4 rows a step, one row a micro-batch; fewer if the recipe has fewer
    warm-up        one step where the recipe has some
    model          of its family where its config or its name says it (else a Llama): a layer of each kind, at least 2,
                   of 64 channels, 4 heads (2 for keys and values if the recipe's model shares them), windows of 16, 4
                   experts, its own vocabulary of 512; made from scratch and saved, then loaded as model.path
    adapters       rank 4, alpha as much of it as before
    data           every store, every file of records and every packed folder is made of CPython's own text, with the
                   names of the recipe's sources
    teachers       none: a stage that distils trains as lm
    machine        one process; fp32; nothing offloaded; MLP tiles and chunks of rows divided like lengths
    beside         no validation, tracking, start from another run or conditions on documents
    checkpoints    every 2 steps

What stays: stages and their order, RoPE types, thetas and factors, mixtures and weights, strategies, special tokens,
objectives, masks, chat templates (llama-3 for a tokenizer's own), optimizer and its carry, rates, schedules, seeds,
LoRA targets and quantisation.
"""

from __future__ import annotations

import difflib
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.config import apply_overrides, parse_yaml, read_yaml
from longspan.core.errors import ConfigError
from longspan.data.readers.hub import SCHEME as HUB
from longspan.plan.training_step import MemoryConfig
from longspan.train.config import (
    CheckpointConfig,
    ModelConfig,
    ParallelConfig,
    StageConfig,
    TrainConfig,
)
from longspan.train.loop_config import RuntimeConfig, TrackingConfig
from longspan.train.stream_config import StreamConfig

__all__ = ["LoadedRecipe", "load_recipe", "recipe_values", "scale_tiny", "shipped_recipes"]

SCALE = 1024
SHORTEST_ROW, SHORTEST_LIMIT = 32, 16
CHAT_ROW = 128
"""Tokens of a row for a conversation, where it would have fewer than SHORTEST_ROW: half of those are its template."""
TRACE_ROW = 2048
"""Tokens of a row that holds an agent's trace: schemas of tools take some hundred."""
STEPS, ROWS, RANK = 4, 4, 4
TINY_MODEL, TINY_TOKENIZER, TINY_TEMPLATE = "model", "tokenizer", "llama-3"
_FOLDER = importlib.resources.files("longspan") / "recipes"


class LoadedRecipe(NamedTuple):
    """A recipe and where it comes from."""

    config: TrainConfig
    name: str
    """The shipped name, or the file's without its ending."""
    folder: Path
    """Where its relative paths start: beside the file, or the working directory for a shipped one."""


def shipped_recipes() -> list[str]:
    """Return the names of the recipes for `longspan train` that come with this package."""
    names = (entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))
    return sorted(name for name in names if not name.startswith("quickstart"))


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe: a file, or a shipped one by its name; `overrides` are `a.b=c`.

    Raises:
        ConfigError: neither a file nor a shipped name, or settings that are wrong.
    """
    values, name, folder = recipe_values(recipe)
    config = TrainConfig.from_dict(apply_overrides(values, overrides), where=str(recipe))
    return LoadedRecipe(config, name, folder)


def recipe_values(recipe: str | Path) -> tuple[dict[str, Any], str, Path]:
    """Return what stands in a recipe as it is, with name and folder as `LoadedRecipe` has them.

    Raises:
        ConfigError: neither a file nor a shipped name.
    """
    text = str(recipe)
    if Path(text).is_file() or text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(text)
        return read_yaml(path), path.stem, path.parent
    names = shipped_recipes()
    if text not in names:
        near = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
        raise ConfigError(
            f"there is no recipe {text!r}",
            allowed=f"a YAML file, or one of {', '.join(names)}",
            fix=f"did you mean {near[0]!r}?" if near else None,
        )
    return (
        parse_yaml((_FOLDER / f"{text}.yaml").read_text(encoding="utf-8"), where=f"{text}.yaml"),
        text,
        Path(),
    )


def scale_tiny(config: TrainConfig) -> TrainConfig:
    """Return the recipe at a scale for a CPU; see the module for the rule. Its inputs come from `tiny_inputs`."""
    changes: dict[str, Any] = {
        "data_root": ".",
        "tokenizer": TINY_TOKENIZER,
        "model": ModelConfig(path=TINY_MODEL),
        "stages": tuple(_tiny_stage(stage) for stage in config.stages),
        "parallel": ParallelConfig(),
        "memory": MemoryConfig(
            activation_checkpointing="none" if config.memory.activation_checkpointing == "none" else "full",
            tiled_mlp=None if config.memory.tiled_mlp is None else _limit(config.memory.tiled_mlp),
            chunk_tokens=None if config.memory.chunk_tokens is None else _limit(config.memory.chunk_tokens),
        ),
        "init_from": None,
        "validation": None,
        "tracking": TrackingConfig(),
        "runtime": RuntimeConfig(),
        "checkpoint": CheckpointConfig(every_steps=2, keep=config.checkpoint.keep),
    }
    if config.lora is not None:
        lora = config.lora
        narrow = {"compute_dtype": "float32"} if lora.quantize != "none" else {}
        changes["lora"] = lora.model_copy(
            update={"rank": RANK, "alpha": lora.alpha * RANK / lora.rank, **narrow}
        )
    # Through the validators: a rule that makes an impossible recipe must not go unseen.
    return TrainConfig.from_dict(
        config.model_copy(update=changes).to_dict(), where="the recipe at tiny scale"
    )


def _tiny_stage(stage: StageConfig) -> StageConfig:
    branches = any(stream.conversations.true_prefixes for stream in stage.streams.values())
    length = stage.context_length // SCALE
    if branches:
        length = max(length, TRACE_ROW)
    elif length < SHORTEST_ROW:
        length = CHAT_ROW if any(map(stage.needs_mask, stage.streams)) else SHORTEST_ROW
    rows = min(ROWS, stage.rows_per_step)
    changes: dict[str, Any] = {
        "context_length": length,
        "tokens": None,
        "steps": None,
        "epochs": None,
        "batch_tokens": rows * length,
        "micro_batch_tokens": min(rows, stage.rows_per_micro_batch) * length,
        "streams": {
            name: _tiny_stream(stream, rows * length, length, masked=stage.needs_mask(name))
            for name, stream in stage.streams.items()
        },
    }
    if stage.objective == "distill":
        # No teacher can be asked at this scale.
        changes |= {"objective": "lm", "distill": None}
    if stage.epochs is not None:
        changes["epochs"] = min(1.0, stage.epochs)
    else:
        # Small sources are seen again: there is not much text.
        changes |= {"steps": 0 if stage.steps == 0 else STEPS, "max_epochs": max(stage.max_epochs, 20)}
    if stage.lr_schedule.warmup_steps:
        changes["lr_schedule"] = stage.lr_schedule.model_copy(update={"warmup_steps": 1})
    if stage.rope is not None:
        changes["rope"] = tiny_rope(stage.rope)
    reach = length
    if stage.pose is not None:
        reach = max(2 * length, stage.pose.target_length // SCALE)
        changes["pose"] = stage.pose.model_copy(update={"target_length": reach})
    if reach > stage.reach // SCALE and "factor" in (stage.rope or {}):
        # Rows that are longer than their share: the RoPE's factor is that of the recipe.
        changes["rope_falls_short"] = True
    return stage.model_copy(update=changes)


def _tiny_stream(stream: StreamConfig, step_tokens: int, length: int, *, masked: bool) -> StreamConfig:
    changes: dict[str, Any] = {"teacher": None}
    if masked and stream.records is not None and stream.chat_template is None:
        changes["chat_template"] = TINY_TEMPLATE
    if stream.rows is not None:
        # Made here, whatever reads it there.
        changes["rows"] = stream.rows.removeprefix(HUB)
    else:
        # A condition asks of documents that are not there.
        mixture: dict[str, Any] = {
            "threshold": _limit(stream.mixture.threshold),
            "where": None,
            "audit": None,
        }
        if stream.mixture.tokens is not None:
            # Some more than the stage reads: sources of small weight round up to whole documents.
            mixture |= {"tokens": 2 * STEPS * step_tokens, "max_repeat": max(4, stream.mixture.max_repeat)}
        limits: dict[str, Any] = {}
        if stream.pack.min_length > 1:
            limits["min_length"] = _limit(stream.pack.min_length)
        if stream.pack.max_length is not None:
            limits["max_length"] = _limit(stream.pack.max_length)
        changes |= {
            "mixture": stream.mixture.model_copy(update=mixture),
            "pack": stream.pack.model_copy(update=limits),
            "conversations": stream.conversations.model_copy(
                update={} if stream.conversations.max_tokens is None else {"max_tokens": length}
            ),
        }
    return stream.model_copy(update=changes)


def _limit(length: int) -> int:
    return max(SHORTEST_LIMIT, length // SCALE)


def tiny_positions(own: int) -> int:
    """Return the context of the tiny model that stands for one of `own` positions."""
    return max(1, math.ceil(own / SCALE))


def tiny_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE settings, of each kind of layer where there are several, with what they count from divided too."""
    return {
        name: tiny_rope(value)
        if isinstance(value, Mapping)
        else tiny_positions(value)
        if name == "original_max_position_embeddings"
        else value
        for name, value in rope.items()
    }
