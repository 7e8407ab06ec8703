"""Perplexity by length during training: the beginnings of the same documents each time, one window a pass.

A window reads as one of `eval ppl` does: where the tokenizer begins texts with BOS, it begins with it too, and that
token counts towards the length. With a RoPE that depends on the length it has the factors of the stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from longspan.core.errors import ConfigError
from longspan.core.heartbeat import beat
from longspan.core.seeds import rng
from longspan.data.plans.framing import text_bos
from longspan.data.rows.loader import PackedRow
from longspan.data.store import TokenStore, open_stores
from longspan.train.loop_config import ValidationConfig
from longspan.train.metrics import LossBreakdown
from longspan.train.objectives import ModelWithLoss
from longspan.train.spread import Spread


class ValidationRows(NamedTuple):
    """Rows of one name and length."""

    name: str
    length: int
    rows: list[PackedRow]


class ValidationPlan(NamedTuple):
    """What is measured each time."""

    windows: list[ValidationRows]
    tokenizers: dict[str, TokenStore]
    """Fingerprint of each tokenizer that made the stores, and one of its stores."""


def plan_validation(
    config: ValidationConfig, *, data_root: Path, seed: int, opened: dict[Path, TokenStore] | None = None
) -> ValidationPlan:
    """Choose the documents: for each name and length, `windows` of those that are long enough, drawn by `seed`.

    `opened` is as for `open_stores`.

    Raises:
        DataError: a store is missing or damaged.
        ConfigError: a store has no document that long.
    """
    chosen: list[ValidationRows] = []
    tokenizers: dict[str, TokenStore] = {}
    for name, paths in config.stores.items():
        named = (paths,) if isinstance(paths, str) else paths
        stores = open_stores((data_root / path for path in named), opened)
        for store in stores:
            tokenizers.setdefault(store.manifest.tokenizer["fingerprint"], store)
        begin = [text_bos(store) for store in stores]
        for length in config.lengths:
            long = [
                (index, int(document))
                for index, store in enumerate(stores)
                for document in np.flatnonzero(store.lengths.tokens >= length - (begin[index] is not None))
            ]
            if not long:
                longest = max(int(store.lengths.tokens.max()) for store in stores)
                raise ConfigError(
                    f"validation {name!r} has no document for windows of {length} tokens",
                    found=f"the longest has {longest}",
                    fix="shorten validation.lengths or add a store with longer documents",
                )
            order = rng(seed, "validation", name, length).permutation(len(long))[: config.windows]
            picked = [long[at] for at in sorted(order)]
            rows = [_window(stores[at], document, length, name, bos=begin[at]) for at, document in picked]
            chosen.append(ValidationRows(name, length, rows))
    return ValidationPlan(chosen, tokenizers)


def validate(model: ModelWithLoss, plan: ValidationPlan, spread: Spread) -> list[dict[str, Any]]:
    """Measure every window; all ranks call it and get the same records.

    Data-parallel ranks share the windows; ranks that share a sequence share each window.

    Returns:
        One record a name and length: {"name", "length", "windows", "labels", "loss" (nats a token), "perplexity",
        "loss_by_position", "seconds"}.
    """
    records = []
    training = model.training
    model.eval()
    try:
        for name, length, rows in plan.windows:
            started = time.monotonic()
            spread.beat(f"validation of {name} at {length} tokens")
            breakdown = _measure(model, rows, spread)
            total, labels = breakdown.total()
            # A diverged model has no finite loss, and training decides for itself whether it goes on.
            loss = total / labels if labels and math.isfinite(total) else None
            records.append({
                "name": name, "length": length, "windows": len(rows), "labels": labels, "loss": loss,
                # A diverged model has a perplexity beyond any number that JSON knows.
                "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,
                "loss_by_position": breakdown.by_position(), "seconds": round(time.monotonic() - started, 3),
            })  # fmt: skip
    finally:
        model.train(training)
    return records


@torch.no_grad()
def _measure(model: ModelWithLoss, rows: Sequence[PackedRow], spread: Spread) -> LossBreakdown:
    mine = rows[spread.mesh.dp_rank :: spread.mesh.dp_size]
    breakdown = LossBreakdown()
    # Ranks gather parameters together, so each runs as often as the one with most windows.
    for turn in range(-(-len(rows) // spread.mesh.dp_size)):
        beat()
        batch = spread.batch([mine[turn] if turn < len(mine) else rows[0]])
        nll = model(batch.to(spread.mesh.device)).per_token_nll
        if turn < len(mine):
            breakdown.add(batch, nll.cpu())
    return spread.total(0.0, breakdown)[1]


def check_tokenizers(plan: ValidationPlan, training: Mapping[str, TokenStore]) -> None:
    """Refuse windows whose ids mean other words than those that are trained on."""
    strange = {name: store for name, store in plan.tokenizers.items() if training and name not in training}
    if strange:
        raise ConfigError(
            "validation reads a store that another tokenizer made than those of the stages",
            found=", ".join(str(store.path) for store in strange.values()),
            fix="tokenize it with the tokenizer of the stages",
        )


def _window(store: TokenStore, document: int, length: int, name: str, *, bos: int | None) -> PackedRow:
    mask = store.mask(document)
    frame = np.array([] if bos is None else [bos], np.int64)
    return PackedRow(
        input_ids=np.concatenate([frame, store.tokens(document)[: length - len(frame)].astype(np.int64)]),
        cu_seqlens=np.array([0, length], np.int32),
        documents=np.array([document], np.uint32),
        sources=np.zeros(1, np.uint16),
        source_names=(name,),
        continuation=np.zeros(1, bool),
        # The first token of a window is never a label.
        weights=np.ones(length, np.uint8)
        if mask is None
        else np.concatenate([np.zeros(len(frame), np.uint8), mask[: length - len(frame)]]),
    )
