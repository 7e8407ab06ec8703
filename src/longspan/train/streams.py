"""The rows of a stage: each stream's mixture and packing plan, and their interleaving by weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from longspan.core.errors import ConfigError
from longspan.data.lengths import LengthTable
from longspan.data.loader import RowLoader, StreamMixer
from longspan.data.mixture import MixturePlan, plan_mixture
from longspan.data.packing import PackPlan, PackSpec, plan_packing
from longspan.data.store import TokenStore
from longspan.train.config import StageConfig, StreamConfig


class StagePlan(NamedTuple):
    """What a stage will train on, known before any step is made."""

    stage: StageConfig
    mixer: StreamMixer
    mixtures: dict[str, MixturePlan]
    packings: dict[str, PackPlan]
    rows_needed: dict[str, int]
    """Rows that each stream will give."""
    tokenizers: dict[str, Path]
    """Fingerprint of each tokenizer that made the stores, and one of its stores."""


def plan_stage(stage: StageConfig, *, data_root: Path, seed: int) -> StagePlan:
    """Plan every stream of a stage.

    Raises:
        DataError: a store is missing or damaged.
        ConfigError: a stream has no full row, or the stage needs more epochs than it allows.
    """
    mixtures: dict[str, MixturePlan] = {}
    packings: dict[str, PackPlan] = {}
    loaders: dict[str, tuple[RowLoader, float]] = {}
    tokenizers: dict[str, Path] = {}
    for name, stream in stage.streams.items():
        stores = [TokenStore(data_root / path) for path in _paths(stream)]
        for store in stores:
            tokenizers.setdefault(store.manifest.tokenizer["fingerprint"], store.path)
        lengths = LengthTable.concatenate([store.lengths for store in stores])
        mixtures[name] = plan_mixture(stream.mixture, lengths, seed)
        spec = PackSpec(
            length=stage.context_length,
            strategy=stream.strategy,
            min_length=max(1, stream.min_document_tokens),
            # A document of its own row is shorter than the row: the rest is padding, which weighs nothing.
            remainder="drop" if stream.strategy == "concat" else "pad",
            pad_id=0,
        )
        packings[name] = plan_packing(spec, lengths, mixtures[name].documents, seed)
        if packings[name].num_rows == 0:
            raise ConfigError(
                f"stage {stage.name!r}: stream {name!r} has not enough text for one row",
                found=f"{mixtures[name].report.tokens} tokens in {len(mixtures[name].documents)} documents",
                allowed=f"at least {stage.context_length} tokens",
                fix="give it more documents or a shorter context_length",
            )
        loaders[name] = (RowLoader(stores, packings[name]), stream.weight)
    mixer = StreamMixer(loaders, seed)
    rows = stage.num_steps * stage.rows_per_step
    needed = {name: progress.rows for name, progress in mixer.epochs(rows).items()}
    for name, count in needed.items():
        available = packings[name].num_rows * stage.max_epochs
        if count > available:
            raise ConfigError(
                f"stage {stage.name!r} is longer than its data: stream {name!r} would be repeated too often",
                found=f"{count} rows needed, {packings[name].num_rows} rows in one epoch",
                allowed=f"{stage.max_epochs} epochs (max_epochs)",
                fix="lower the stage's tokens, add data, or raise max_epochs",
            )
    return StagePlan(stage, mixer, mixtures, packings, needed, tokenizers)


def _paths(stream: StreamConfig) -> Sequence[str]:
    return (stream.store,) if isinstance(stream.store, str) else stream.store
