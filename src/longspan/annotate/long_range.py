"""How much far context helps: the losses of a model with it and without, for some documents of stores.

A document whose end can be predicted from its last page alone teaches nothing about long context, however long it is
(ProLong: Gao et al. 2024, arXiv:2410.02660; LongWanjuan: Lv et al. 2024, arXiv:2402.13583). Of each document one
window from its middle is read twice:

    far     [.................................|########]     `context` tokens; losses of the last `scored`
    near                              [.......|########]     2 * `scored` tokens; losses of the same

and the mean difference of their losses is what the tokens before save, in nats a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pydantic
from numpy.typing import NDArray

from longspan.core.config import Config, Length
from longspan.core.log import get_logger
from longspan.core.progress import progress
from longspan.core.shuffling import hashed
from longspan.data.store import TokenStore

Losses = Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[np.float32]]]
"""From windows of n token ids to the n - 1 losses of each, in nats: `infer.perplexity.token_nll` of a model."""


class LongRangeConfig(Config):
    """Which documents a model reads, and how much of them."""

    context: Length = pydantic.Field(4096, ge=4)
    """Tokens that the model reads with far context; shorter documents are not measured."""
    scored: Length = pydantic.Field(512, ge=1)
    """Tokens whose losses are compared; without far context there are as many before them."""
    documents: int = pydantic.Field(64, ge=1)
    """Documents of each source that are measured, drawn by their keys."""

    @pydantic.model_validator(mode="after")
    def _something_is_far(self) -> LongRangeConfig:
        if self.context <= 2 * self.scored:
            raise ValueError(
                f"a context of {self.context} is not longer than twice {self.scored} scored tokens"
            )
        return self


def measure_long_range(
    stores: Sequence[TokenStore], losses: Losses, config: LongRangeConfig
) -> NDArray[np.float32]:
    """Return for every document of some stores what far context saves, in nats a token; NaN: not measured.

    Cost: a forward pass of `context` and one of 2 * `scored` tokens for each measured document.
    """
    found = np.full(sum(len(store) for store in stores), np.nan, np.float32)
    chosen = _drawn(stores, config)
    first = np.cumsum([0, *(len(store) for store in stores)])
    not_finite = 0
    with progress("long range", total=len(chosen), unit="documents") as bar:
        for store, document in chosen:
            ids = stores[store].tokens(document)
            start = (len(ids) - config.context) // 2
            window = ids[start : start + config.context].astype(np.int64)
            far, near = losses([window, window[-2 * config.scored :]])
            saved = float(np.mean(near[-config.scored :], dtype=np.float64)) - float(
                np.mean(far[-config.scored :], dtype=np.float64)
            )
            if np.isfinite(saved):
                found[first[store] + document] = saved
            else:
                not_finite += 1
            bar.advance()
    if not_finite:
        get_logger("annotate").warning("long_range: %d documents with losses that are not finite", not_finite)
    return found


def _drawn(stores: Sequence[TokenStore], config: LongRangeConfig) -> list[tuple[int, int]]:
    """Return (store, document) of those that are measured, in store order."""
    by_source: dict[str, list[tuple[int, int, int]]] = {}
    for number, store in enumerate(stores):
        long = np.flatnonzero(np.asarray(store.lengths.tokens) >= config.context)
        order = hashed(np.asarray(store.lengths.key)[long], 0, "long-range")
        for document, place in zip(long.tolist(), order.tolist()):
            by_source.setdefault(store.source(document), []).append((place, number, document))
    return sorted(each[1:] for known in by_source.values() for each in sorted(known)[: config.documents])
