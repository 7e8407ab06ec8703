"""What an audit found, by source and length of document."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.data.store.lengths import LengthTable
from longspan.data.store.measures import MEASURES

BORDERS = (0, 4096, 32768, 131072)
"""Where the lengths that are shown apart begin, in tokens."""


def summarize(columns: dict[str, NDArray[Any]], lengths: LengthTable) -> list[dict[str, Any]]:
    """Return one row for each source and length that has documents: tokens, and every measure over its tokens.

    A measure is the mean over the tokens of the documents that have it, beside the share of tokens that do
    (`measured`); languages are the three with most tokens and their shares.
    """
    tokens = np.asarray(lengths.tokens, np.float64)
    bucket = np.searchsorted(BORDERS, tokens, side="right") - 1
    rows = []
    for number, source in enumerate(lengths.source_names):
        for place, start in enumerate(BORDERS):
            here = np.flatnonzero((lengths.source == number) & (bucket == place))
            if len(here):
                rows.append({
                    "source": source,
                    "lengths": _words(place),
                    "from_tokens": start,
                    "documents": len(here),
                    "tokens": int(tokens[here].sum()),
                    **{name: _mean(column[here], tokens[here]) for name, column in columns.items()},
                })  # fmt: skip
    return rows


def measures_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the measures that rows have, in their order."""
    return [name for name in MEASURES if rows and name in rows[0]]


def _words(place: int) -> str:
    if place == 0:
        return f"under {BORDERS[1] // 1024}K"
    if place + 1 == len(BORDERS):
        return f"{BORDERS[place] // 1024}K and more"
    return f"{BORDERS[place] // 1024}K to {BORDERS[place + 1] // 1024}K"


def _mean(column: NDArray[Any], tokens: NDArray[np.float64]) -> dict[str, Any]:
    if column.dtype.kind == "U":
        names, number = np.unique(column, return_inverse=True)
        weights = np.bincount(number, tokens) / tokens.sum()
        most = np.argsort(-weights, kind="stable")[:3]
        return {"shares": {str(names[index]): float(weights[index]) for index in most}}
    known = ~np.isnan(column)
    if not known.any():
        return {"mean": None, "measured": 0.0}
    mean = float(np.average(column[known].astype(np.float64), weights=tokens[known]))
    return {"mean": mean, "measured": float(tokens[known].sum() / tokens.sum())}
