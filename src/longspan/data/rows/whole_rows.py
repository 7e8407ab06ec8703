"""Rows whose documents see each other: what trains without a document mask."""

from __future__ import annotations

import numpy as np

from longspan.data.plans.packing import PAD_DOCUMENT
from longspan.data.rows.loader import PackedRow, RowSource, RowsOver


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
