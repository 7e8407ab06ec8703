"""Conversations of which every token is learnt: stores and rows whose masks are not used."""

from __future__ import annotations

import numpy as np

from longspan.core.files import sha256_bytes
from longspan.data.plans.packing import PAD_DOCUMENT
from longspan.data.rows.loader import DocumentStore, PackedRow, RowSource, RowsOver
from longspan.data.store.lengths import LengthTable


class UnmaskedStore:
    """A token store without its masks, as `RowLoader` reads it."""

    def __init__(self, store: DocumentStore) -> None:
        self._store = store

    @property
    def lengths(self) -> LengthTable:
        """Return the length table of the store."""
        return self._store.lengths

    @property
    def fingerprint(self) -> str:
        """Return what identifies the content, other than that of the store with its masks."""
        return sha256_bytes(f"{self._store.fingerprint} unmasked".encode())[:16]

    def tokens(self, index: int, /) -> np.ndarray:
        """Return the tokens of a document."""
        return self._store.tokens(index)

    def mask(self, index: int, /) -> np.ndarray | None:
        """Return None: every token has weight 1."""
        return None


class UnmaskedRows(RowsOver):
    """Rows whose tokens all have weight 1, and padding 0; takes the place of the `RowSource` that they are of."""

    def __init__(self, rows: RowSource) -> None:
        super().__init__(rows, how="unmasked")

    def row(self, index: int, /) -> PackedRow:
        """Read one row."""
        row = self._rows.row(index)
        real = (row.documents != PAD_DOCUMENT).astype(np.uint8)
        return row._replace(weights=np.repeat(real, np.diff(row.cu_seqlens)))
