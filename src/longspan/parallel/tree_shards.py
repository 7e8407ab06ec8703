"""A row in which documents branch, spread over ranks; see `kernels.attention.trees`.

Layouts and schedules are those of any row. Who sees whom between two sets of ranks is cut out of the bands of the whole
row: a branch sees tokens far before it, and none of those between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError
from longspan.kernels.attention.bands import Bands
from longspan.kernels.attention.trees import DocumentTree
from longspan.parallel.layout import Layout
from longspan.parallel.shards import Ranks, SequenceShards

__all__ = ["TreeShards", "refuse_states"]


class TreeShards(SequenceShards):
    """One row of documents that branch under one layout, as every rank of the group knows it.

    Args:
        layout, world, window: see `SequenceShards`.
        tree: the parts of the row.

    Raises:
        ArgumentError: as `SequenceShards`.
    """

    def __init__(self, layout: Layout, tree: DocumentTree, world: int, *, window: int | None = None) -> None:
        super().__init__(layout, tree.cu_seqlens, world, window=window, first_positions=tree.branches[:, 1])
        self.tree = tree.padded(self.num_padded)
        self._longest = int(self.tree.ends.max())
        self._attention_chunk: int | None = None
        self._whole: dict[int | None, Bands] = {}

    def positions(self, rank: int) -> NDArray[np.int64]:
        """Return the position of each of the rank's tokens in its sample: int64 [num_local]."""
        return self.tree.positions()[self.indices(rank)]

    def state_borders(self) -> NoReturn:
        """Refuse layers with a state. Raises ArgumentError."""
        refuse_states()

    def _cut_documents(self, attention_chunk: int) -> None:
        self._attention_chunk, self._whole = attention_chunk, {}

    def _make_bands(self, q_ranks: Ranks, k_ranks: Ranks, window: int | None) -> Bands:
        if window not in self._whole:
            self._whole[window] = self.tree.bands(window, self._attention_chunk)
        return self._whole[window].select(self._places(q_ranks), self._places(k_ranks))

    def _sight(self, places: Sequence[Ranks], window: int | None) -> Callable[[int, int], bool]:
        return lambda q, k: len(self.bands(places[q], places[k], window=window)) > 0


def refuse_states() -> NoReturn:
    """Refuse layers with a state on documents that branch. Raises ArgumentError."""
    # A branch goes on from the state in the middle of its parent, which a scan over the row does not keep.
    raise ArgumentError("documents that branch are not computed by layers with a state")
