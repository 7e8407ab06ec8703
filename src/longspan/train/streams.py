"""The rows of a stage: each stream's mixture and packing plan, and their interleaving by weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import ConfigError, DataError
from longspan.data.columns import folder_kind
from longspan.data.lengths import LengthTable
from longspan.data.loader import RowLoader, RowSource, StreamMixer
from longspan.data.mixture import MixturePlan, plan_mixture
from longspan.data.packed_stores import PackedRows
from longspan.data.packing import KIND as PACK_PLAN
from longspan.data.packing import PackPlan, PackSpec, plan_packing
from longspan.data.store import TokenStore
from longspan.train.config import StageConfig, StreamConfig


class StagePlan(NamedTuple):
    """What a stage will train on, known before any step is made."""

    stage: StageConfig
    mixer: StreamMixer
    sources: dict[str, RowSource]
    """Where the rows of each stream come from."""
    mixtures: dict[str, MixturePlan]
    """Of the streams that are planned here and not packed before."""
    rows_needed: dict[str, int]
    """Rows that each stream will give."""
    tokenizers: dict[str, Path]
    """Fingerprint of each tokenizer that made the stores, and one of its stores."""


def plan_stage(stage: StageConfig, *, data_root: Path, seed: int) -> StagePlan:
    """Plan every stream of a stage.

    Raises:
        DataError: a store, a plan or packed rows are missing or damaged.
        ConfigError: a stream has no full row or rows of another length, or the stage needs more epochs than it
            allows.
    """
    sources: dict[str, RowSource] = {}
    mixtures: dict[str, MixturePlan] = {}
    stores: list[TokenStore] = []
    for name, stream in stage.streams.items():
        where = f"stage {stage.name!r}: stream {name!r}"
        if stream.rows is not None:
            sources[name], behind = _packed(data_root / stream.rows, data_root)
        else:
            sources[name], behind, mixtures[name] = _planned(stream, stage, data_root, seed, where)
        stores += behind
        if sources[name].length != stage.context_length:
            raise ConfigError(
                f"{where} has rows of another length",
                found=f"{sources[name].length} tokens",
                allowed=f"{stage.context_length}, the stage's context_length",
                fix="pack them at that length",
            )
    mixer = StreamMixer(
        {name: (sources[name], stream.weight) for name, stream in stage.streams.items()}, seed
    )
    needed = {
        name: progress.rows for name, progress in mixer.epochs(stage.num_steps * stage.rows_per_step).items()
    }
    for name, count in needed.items():
        if count > sources[name].num_rows * stage.max_epochs:
            raise ConfigError(
                f"stage {stage.name!r} is longer than its data: stream {name!r} would be repeated too often",
                found=f"{count} rows needed, {sources[name].num_rows} rows in one epoch",
                allowed=f"{stage.max_epochs} epochs (max_epochs)",
                fix="lower the stage's tokens, add data, or raise max_epochs",
            )
    tokenizers: dict[str, Path] = {}
    for store in stores:
        tokenizers.setdefault(store.manifest.tokenizer["fingerprint"], store.path)
    return StagePlan(stage, mixer, sources, mixtures, needed, tokenizers)


def _planned(
    stream: StreamConfig, stage: StageConfig, data_root: Path, seed: int, where: str
) -> tuple[RowSource, list[TokenStore], MixturePlan]:
    """Return rows planned from token stores, the stores and the mixture."""
    paths = (stream.store,) if isinstance(stream.store, str) else stream.store
    assert paths is not None
    stores = [TokenStore(data_root / path) for path in paths]
    lengths = LengthTable.concatenate([store.lengths for store in stores])
    mixture = plan_mixture(stream.mixture, lengths, seed)
    spec = PackSpec(
        length=stage.context_length,
        strategy=stream.strategy,
        min_length=max(1, stream.min_document_tokens),
        # A document of its own row is shorter than the row: the rest is padding, which weighs nothing.
        remainder="drop" if stream.strategy == "concat" else "pad",
        pad_id=0,
        **_special_settings(stream, stores[0].manifest.tokenizer, where),
    )
    plan = plan_packing(spec, lengths, mixture.documents, seed)
    if plan.num_rows == 0:
        raise ConfigError(
            f"{where} has not enough text for one row",
            found=f"{mixture.report.tokens} tokens in {len(mixture.documents)} documents",
            allowed=f"at least {stage.context_length} tokens",
            fix="give it more documents or a shorter context_length",
        )
    return RowLoader(stores, plan), stores, mixture


def _special_settings(stream: StreamConfig, tokenizer: Mapping[str, Any], where: str) -> dict[str, Any]:
    wanted = {"none": (), "both": ("bos", "eos")}.get(stream.specials, (stream.specials,))
    missing = [role for role in wanted if tokenizer.get(f"{role}_id") is None]
    if missing:
        raise ConfigError(
            f"{where} wants {stream.specials} around documents, but the tokenizer has no {' and no '.join(missing)}",
            fix="set specials to what the tokenizer has, or none",
        )
    return {"specials": stream.specials, **{f"{role}_id": tokenizer[f"{role}_id"] for role in wanted}}


def _packed(path: Path, data_root: Path) -> tuple[RowSource, list[TokenStore]]:
    """Return the rows of a pack plan, whose stores are looked for from here and from `data_root`, or packed rows."""
    if folder_kind(path) != PACK_PLAN:
        return PackedRows(path), []
    plan = PackPlan.load(path)
    stores = [TokenStore(store if Path(store).exists() else data_root / store) for store in plan.stores]
    if not stores:
        raise DataError(
            f"{path} does not say which stores it was made from", fix="pack again with `longspan data pack`"
        )
    return RowLoader(stores, plan), stores
