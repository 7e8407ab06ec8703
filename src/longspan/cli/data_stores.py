"""What the `data` commands share: decoding, showing lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.output import print_lengths

if TYPE_CHECKING:
    import numpy as np

    from longspan.data.store import TokenStore
    from longspan.data.tokenizer import Tokenizer

PlanOut = Annotated[Path, typer.Option(help="Folder to write; a plan of the same kind there is replaced.")]
Stores = Annotated[list[Path], typer.Argument(metavar="STORE", help="Token stores.")]


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
