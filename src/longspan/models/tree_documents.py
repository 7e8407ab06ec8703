"""The document table of a row in which documents branch; see `kernels.attention.trees`."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.kernels.attention import Bands, DocumentTree
from longspan.models.documents import Documents
from longspan.parallel.layout import Layout
from longspan.parallel.tree_shards import TreeShards, refuse_states

__all__ = ["TreeDocuments"]


class TreeDocuments(Documents):
    """Parts of documents of which some branch off others.

    Args:
        cu_seqlens: int64 [parts + 1], borders of the parts.
        branches: int64 [parts, 2], what each branches off and where; see `DocumentTree`.

    Raises:
        ArgumentError: parts that do not fit together.
    """

    def __init__(self, cu_seqlens: NDArray[np.int64], branches: NDArray[np.integer]) -> None:
        super().__init__(cu_seqlens)
        self.tree = DocumentTree(cu_seqlens, branches)

    def __repr__(self) -> str:
        branches = self.tree.num_branches
        return (
            f"TreeDocuments({len(self) - branches} documents, {branches} branches, {self.num_tokens} tokens)"
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each part and of what it follows, [parts]."""
        return self.tree.ends

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return int64 [tokens], counted on within each branch from where it leaves."""
        return torch.from_numpy(self.tree.positions()).to(device)

    def shards(self, layout: Layout, world: int, *, window: int | None = None) -> TreeShards:
        """Return the row spread over ranks; see `Documents.shards`."""
        return TreeShards(layout, self.tree, world, window=window)

    def state_borders(self) -> NoReturn:
        """Refuse layers with a state: a branch would need what its parent's tokens left. Raises ArgumentError."""
        refuse_states()

    def _make_bands(self, window: int | None, attention_chunk: int | None) -> Bands:
        return self.tree.bands(window, attention_chunk)
