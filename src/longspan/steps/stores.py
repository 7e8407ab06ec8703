"""Token stores that are planned from together, and what a plan remembers of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from longspan.core.errors import ArgumentError, DataError
from longspan.data.store import TokenStore, open_stores
from longspan.data.store.lengths import LengthTable


def open_alike(paths: Sequence[str | Path]) -> list[TokenStore]:
    """Open stores that were made with the same tokenizer; others are refused."""
    stores = open_stores(paths)
    for store in stores[1:]:
        if store.manifest.tokenizer["fingerprint"] != stores[0].manifest.tokenizer["fingerprint"]:
            raise DataError(
                "the stores were made with different tokenizers",
                found=f"{stores[0].path} and {store.path}",
                fix="tokenize both with the same tokenizer",
            )
    return stores


def lengths_of(paths: Sequence[str | Path]) -> tuple[LengthTable, list[str]]:
    """Return the joined length table of stores and their absolute paths, which plans remember."""
    stores = open_alike(paths)
    return LengthTable.concatenate([store.lengths for store in stores]), [os.path.abspath(p) for p in paths]


def stores_of(stores: tuple[str, ...], plan: Path) -> list[Path]:
    """Return the stores that a plan remembers."""
    if not stores:
        raise DataError(f"the plan {plan} does not say which stores it was made from", fix="plan again")
    return [Path(store) for store in stores]


def check_lengths(table: LengthTable, fingerprint: str, plan: Path) -> None:
    """Refuse stores that are not those of the plan any more."""
    if table.fingerprint != fingerprint:
        raise DataError(f"the stores have changed since the plan {plan} was made", fix="plan again")


def special_ids(store: TokenStore) -> dict[str, int | None]:
    """Return the ids that frame and pad documents; padding weighs nothing, so any id will do for it."""
    known = store.manifest.tokenizer
    pad = next((known[name] for name in ("pad_id", "eos_id") if known[name] is not None), 0)
    return {"bos_id": known["bos_id"], "eos_id": known["eos_id"], "pad_id": pad}


def one_or_more(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """Return paths as a list of texts, one path as a list of one. Raises ArgumentError: there is none."""
    named = [str(paths)] if isinstance(paths, str | Path) else [str(path) for path in paths]
    if not named:
        raise ArgumentError("no store is named", allowed="one or more")
    return named
