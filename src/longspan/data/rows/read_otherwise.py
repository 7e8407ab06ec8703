"""Rows of another source read otherwise: documents that see each other, conversations that are learnt whole."""

from __future__ import annotations

import numpy as np

from longspan.core.files import sha256_bytes
from longspan.data.plans.packing import PAD_DOCUMENT
from longspan.data.rows.loader import BranchingStore, PackedRow, RowSource
from longspan.data.store.lengths import LengthTable


class RowsOver:
    """Rows that are those of another source read in another way; a subclass says which, by `row`.

    Args:
        rows: the other source.
        how: goes into the fingerprint, which is then not the other's. None: it is.
    """

    def __init__(self, rows: RowSource, *, how: str | None) -> None:
        self._rows = rows
        self.num_rows, self.length, self.source_names = rows.num_rows, rows.length, rows.source_names
        own = rows.fingerprint
        self.fingerprint = own if how is None else sha256_bytes(f"{own} {how}".encode())[:16]
        """16 hex characters that stand for the content."""
        self.blocks: np.ndarray = np.asarray(getattr(rows, "blocks", ()), np.int64)
        """See `PackedRows.blocks`."""


class WholeRows(RowsOver):
    """Rows as one document each, padding at the end apart; takes the place of the `RowSource` that they are of.

    Positions, labels and attention follow from the borders of documents, so all of them run over the whole row.
    """

    def __init__(self, rows: RowSource) -> None:
        super().__init__(rows, how="whole")

    def row(self, index: int, /) -> PackedRow:
        """Read one row."""
        return whole(self._rows.row(index))


def whole(row: PackedRow) -> PackedRow:
    """Return the row with all its documents as one; padding behind the last stays a document of its own."""
    real = np.flatnonzero(row.documents != PAD_DOCUMENT)
    if not len(real):
        return row
    # The first document stands for all; padding before or between them is in it, with weight 0.
    kept = [int(real[0]), *range(int(real[-1]) + 1, len(row.documents))]
    ends = row.cu_seqlens[[int(real[-1]) + 1, *(number + 1 for number in kept[1:])]]
    return row._replace(
        cu_seqlens=np.concatenate([[0], ends]).astype(np.int32),
        documents=row.documents[kept],
        sources=row.sources[kept],
        continuation=row.continuation[kept],
        token_sources=np.repeat(row.sources, np.diff(row.cu_seqlens)),
    )


class UnmaskedStore:
    """A token store without its masks, as `RowLoader` reads it."""

    def __init__(self, store: BranchingStore) -> None:
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

    def tree_tokens(self, index: int, /) -> np.ndarray:
        """Return the tokens of a document, also of one that branches."""
        return self._store.tree_tokens(index)

    def parts(self, index: int, /) -> np.ndarray | None:
        """Return the parts of a document that branches, or None."""
        return self._store.parts(index)

    @property
    def branching(self) -> np.ndarray:
        """Return the documents that branch."""
        return self._store.branching

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
