"""What the `data` commands share: opening stores and plans, decoding, showing lengths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.output import print_lengths

if TYPE_CHECKING:
    import numpy as np

    from longspan.data.store import TokenStore
    from longspan.data.store.lengths import LengthTable
    from longspan.data.tokenizer import Tokenizer

PlanOut = Annotated[Path, typer.Option(help="Folder to write; a plan of the same kind there is replaced.")]
Stores = Annotated[list[Path], typer.Argument(metavar="STORE", help="Token stores.")]


def open_alike(paths: Sequence[str | Path]) -> list[TokenStore]:
    """Open stores that were made with the same tokenizer; others are refused."""
    from longspan.core.errors import DataError
    from longspan.data.store import open_stores

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
    from longspan.data.store.lengths import LengthTable

    stores = open_alike(paths)
    return LengthTable.concatenate([store.lengths for store in stores]), [os.path.abspath(p) for p in paths]


def stores_of(stores: tuple[str, ...], plan: Path) -> list[Path]:
    """Return the stores that a plan remembers."""
    from longspan.core.errors import DataError

    if not stores:
        raise DataError(f"the plan {plan} does not say which stores it was made from", fix="plan again")
    return [Path(store) for store in stores]


def check_lengths(table: LengthTable, fingerprint: str, plan: Path) -> None:
    """Refuse stores that are not those of the plan any more."""
    from longspan.core.errors import DataError

    if table.fingerprint != fingerprint:
        raise DataError(f"the stores have changed since the plan {plan} was made", fix="plan again")


def special_ids(store: str | Path) -> dict[str, int | None]:
    """Return the ids that frame and pad documents; padding weighs nothing, so any id will do for it."""
    from longspan.data.store import TokenStore

    known = TokenStore(store).manifest.tokenizer
    pad = next((known[name] for name in ("pad_id", "eos_id") if known[name] is not None), 0)
    return {"bos_id": known["bos_id"], "eos_id": known["eos_id"], "pad_id": pad}


def open_tokenizer(name: str | None, store: TokenStore | None) -> Tokenizer | None:
    """Load the tokenizer that decodes; it must be the one that made the store, where that is known."""
    from longspan.core.errors import DataError
    from longspan.data.tokenizer import load_tokenizer

    if name is None:
        return None
    loaded = load_tokenizer(name)
    if store is not None and loaded.fingerprint != store.manifest.tokenizer["fingerprint"]:
        raise DataError(f"{name} is not the tokenizer that made {store.path}")
    return loaded


def decode(tokenizer: Tokenizer | None, ids: np.ndarray) -> str | None:
    """Return the text of ids, or None without a tokenizer."""
    return None if tokenizer is None else tokenizer.decode(ids.tolist())


def show_lengths(summaries: Sequence[dict[str, Any]], as_json: bool, plot: Path | None = None) -> None:
    """Draw length summaries into one picture, if asked; print them as tables, unless JSON is to follow."""
    if plot is not None:
        from longspan.report.figures import lengths_figure, write_figure

        write_figure(lengths_figure(summaries), plot)
    if not as_json:
        for summary in summaries:
            print_lengths(summary)
