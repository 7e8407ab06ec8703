"""Where each document stands in which row: `longspan data pack` as a function."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longspan.core.columns import folder_kind
from longspan.core.errors import ArgumentError, DataError, RunError
from longspan.core.log import get_logger
from longspan.core.units import parse_length
from longspan.data.plans import mixture
from longspan.data.plans.mixture import MixturePlan, plan_mixture
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.plans.packing import KIND, PackPlan, plan_packing, plan_split
from longspan.data.plans.store_packing import Settled, StorePackConfig
from longspan.data.store import TokenStore
from longspan.data.store.lengths import LengthTable
from longspan.steps.stores import check_lengths, one_or_more, open_alike, special_ids, stores_of

__all__ = ["pack_rows"]


def pack_rows(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    length: int | str,
    config: StorePackConfig | None = None,
    *,
    seed: int = 0,
    shared: bool = False,
    **settings: Any,
) -> dict[Path, PackPlan]:
    """Place documents in rows of `length` tokens; write a pack plan to `out`, no token is copied.

    Args:
        inputs: a mixture plan, or token stores to take whole.
        length: such as 131072 or "128k".
        config: how rows are filled. Its fields may also be given as keywords: `strategy="best_fit"`.
        shared: other jobs make the same plan; the first saves it. Without, a plan that is there is replaced.

    Returns:
        The plan by its folder: `out`; with strategy split one for each length, in `out/PIECE-LENGTH`. Rows for other
        tools are written from it by `longspan.data.packed.materialize.materialize`.

    Raises:
        ArgumentError: a mixture and something beside it.
        ConfigError: settings that there are not, or that contradict one another.
        DataError: a store is missing, changed since the mixture or made with another tokenizer, or holds nothing to
            pack; with `shared`, `out` holds something else.
    """
    given = {} if config is None else config.to_dict()
    config = StorePackConfig.from_dict({**given, **settings}, where="the packing")
    stores, table, documents = _documents(one_or_more(inputs), seed)
    settled = config.settle(stores, length=parse_length(length), where="the plan", ids=special_ids(stores[0]))
    spec, documents = settled.pack, _whole(table, documents, settled)
    if spec.split_lengths:
        split = plan_split(spec, table, documents, seed)
        plans = {Path(out, f"{piece}-{spec.length}"): plan for piece, plan in split.items()}
    else:
        plans = {Path(out): plan_packing(spec, table, documents, seed)}
    paths = [os.path.abspath(store.path) for store in stores]
    for place, plan in plans.items():
        if shared:
            _save_once(plan, place, paths)
        else:
            plan.save(place, stores=paths)
    return plans


def _documents(inputs: list[str], seed: int) -> tuple[list[TokenStore], LengthTable, np.ndarray]:
    """Return the stores, their length table, and which documents are placed."""
    plan = None
    if any(folder_kind(each) == mixture.KIND for each in inputs):
        if len(inputs) > 1:
            raise ArgumentError(
                "rows are made of one mixture, or of stores",
                found=", ".join(inputs),
                fix="mix all stores into one plan",
            )
        plan = MixturePlan.load(inputs[0])
    stores = open_alike(inputs if plan is None else stores_of(plan.stores, Path(inputs[0])))
    table = LengthTable.concatenate([store.lengths for store in stores])
    if plan is None:
        plan = plan_mixture(MixtureConfig.from_dict({"mode": "none"}), table, seed)
    else:
        check_lengths(table, plan.lengths_fingerprint, Path(inputs[0]))
    return stores, table, np.asarray(plan.documents)


def _whole(table: LengthTable, documents: np.ndarray, settled: Settled) -> np.ndarray:
    """Return the documents that are not too long, and say how many are."""
    long = settled.too_long(table, documents)
    if long.any():
        get_logger("data.pack").warning(
            "left out: %d documents longer than a row, %d tokens; --overflow split cuts them",
            int(long.sum()),
            int(table.tokens[documents[long]].sum()),
        )
    return documents[~long]


def _save_once(plan: PackPlan, place: Path, stores: list[str]) -> None:
    """Save a plan that several jobs make alike. Raises DataError: another stands there."""
    if not place.exists():
        try:
            plan.save(place, stores=stores)
        except RunError:
            if not place.exists():
                raise
    there = PackPlan.load(place) if folder_kind(place) == KIND else None
    if there is None or (there.fingerprint, list(there.stores)) != (plan.fingerprint, stores):
        raise DataError(
            f"{place} holds something else than this plan", fix="remove it, or choose another --out"
        )
