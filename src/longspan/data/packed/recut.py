"""Packed rows as rows of another length: their documents stay apart and are placed anew by a pack plan.

    split       stored rows follow one another and are cut where a new row ends: nothing is lost but the last rest
    drop_tail   the first tokens of each stored row are a row; the others are left out, and counted

With best_fit the short documents of all rows are joined again, so that none that fits a row is cut. What the end of a
stored row cut stays cut, for rows do not say which pieces belong together.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from longspan.core.errors import ConfigError, DataError
from longspan.core.files import sha256_bytes
from longspan.core.log import get_logger
from longspan.data.packed.packed_rows import PackedRows
from longspan.data.plans.pack_config import STRATEGIES, PackConfig
from longspan.data.plans.packing import plan_packing
from longspan.data.rows.loader import PAD_SOURCE, PackedRow, RowLoader, check_row
from longspan.data.rows.read_otherwise import RowsOver
from longspan.data.store.lengths import LengthTable

Overflow = Literal["split", "drop_tail"]
HELD_ROWS = 8
"""Stored rows that are kept while their documents are read."""
SLOW_BLOCK = 64


class RowDocuments:
    """The documents of packed rows one by one, as `RowLoader` reads those of a token store; padding is left out.

    Raises:
        DataError: the spans of a row overlap or reach outside.
    """

    def __init__(self, rows: PackedRows) -> None:
        index = rows.index
        index.check(rows.path)
        self._rows = rows
        row_of = np.repeat(np.arange(len(index.lengths)), np.diff(index.offsets))
        padding = [number for number, name in enumerate(index.names) if name == PAD_SOURCE]
        kept = ~np.isin(index.sources, padding)
        self.row_of = row_of[kept]
        """int64 [documents] row in which each stands."""
        self._starts, self._ends = index.starts[kept], index.ends[kept]
        count = len(self.row_of)
        if count >= 1 << 32:
            raise DataError(f"{rows.path} holds more documents than a plan can", found=count)
        nothing = np.zeros(count, np.uint64)
        self.lengths = LengthTable(
            source=np.array(index.sources[kept]),
            source_names=index.names,
            key=np.flatnonzero(kept).astype(np.uint64),
            shard=nothing.astype(np.uint32),
            offset=nothing,
            mask_offset=nothing + np.uint64(rows.has_mask),
            tokens=(self._ends - self._starts).astype(np.uint32),
            position=np.arange(count, dtype=np.uint32),
        )
        self._stored = lru_cache(maxsize=HELD_ROWS)(rows.stored)

    @property
    def fingerprint(self) -> str:
        """Return 16 hex characters over what the rows hold."""
        return self._rows.fingerprint

    def tokens(self, index: int, /) -> np.ndarray:
        """Return the ids of a document."""
        return self._stored(int(self.row_of[index])).ids[self._place(index)]

    def mask(self, index: int, /) -> np.ndarray | None:
        """Return the loss weights of a document, uint8, or None where its row has none."""
        mask = self._stored(int(self.row_of[index])).mask
        return None if mask is None else mask[self._place(index)]

    def _place(self, index: int) -> slice:
        return slice(int(self._starts[index]), int(self._ends[index]))


class RecutRows(RowsOver):
    """Packed rows of any lengths as rows of `length` tokens by a pack plan; takes the place of a `RowLoader`.

    Raises:
        ConfigError: they do not fill one row.
        DataError: the spans of a row overlap or reach outside.
    """

    def __init__(self, rows: PackedRows, *, length: int, strategy: str = "concat") -> None:
        documents, flows = RowDocuments(rows), STRATEGIES[strategy].flows
        spec = PackConfig(
            length=length,
            strategy=strategy,
            remainder="drop" if flows else "pad",
            pad_id=0,
            shuffle=False,
        )
        plan = plan_packing(spec, documents.lengths, np.arange(len(documents.row_of), dtype=np.uint32), 0)
        _need_rows(plan.num_rows, rows, length)
        super().__init__(RowLoader(documents, plan), how=None)
        self.has_mask, self.mask_is = rows.has_mask, rows.mask_is
        self.left_out = {
            "cut_documents": len(np.unique(np.asarray(plan.span_document)[np.asarray(plan.span_start) > 0])),
            "tail_tokens": sum(plan.report.dropped.values()),
        }
        """Documents that the new rows cut, and tokens that fill none."""
        first = documents.row_of[plan.span_document[plan.row_offsets[:-1].astype(np.int64)]]
        self.blocks = _blocks_of(rows, first) if flows else np.zeros(0, np.int64)
        """See `PackedRows.blocks`."""
        if not flows and rows.blocks.max(initial=0) > SLOW_BLOCK:
            get_logger("data").warning(
                "%s: a row of documents from everywhere reads %d stored rows for each: convert it to mds first",
                rows.path, rows.blocks.max(),
            )  # fmt: skip

    def row(self, index: int) -> PackedRow:
        """Read one row. Raises ArgumentError and DataError as `RowLoader.row`."""
        return self._rows.row(index)


class HeadRows:
    """The first `length` tokens of each packed row that has as many; takes the place of a `RowLoader`.

    Raises:
        ConfigError: no row has as many.
    """

    def __init__(self, rows: PackedRows, *, length: int) -> None:
        stored = rows.index.lengths
        self._rows, self.length = rows, length
        self._numbers = np.flatnonzero(stored >= length)
        _need_rows(len(self._numbers), rows, length)
        self.num_rows = len(self._numbers)
        self.has_mask, self.mask_is, self.source_names = rows.has_mask, rows.mask_is, rows.source_names
        self.left_out = {
            "short_rows": len(stored) - self.num_rows,
            "tail_tokens": int((stored[self._numbers] - length).sum()),
        }
        """Rows that are too short, and tokens behind the first `length` of the others."""
        self.blocks = _blocks_of(rows, self._numbers)
        """See `PackedRows.blocks`."""

    @property
    def fingerprint(self) -> str:
        """Return 16 hex characters over the stored rows and the length."""
        return sha256_bytes(f"{self._rows.fingerprint} head {self.length}".encode())[:16]

    def row(self, index: int) -> PackedRow:
        """Read one row.

        Raises:
            ArgumentError: there is no such row.
            DataError: it is damaged.
        """
        check_row(index, self.num_rows)
        row, length = self._rows.row_of_any_length(int(self._numbers[index])), self.length
        count = int(np.searchsorted(row.cu_seqlens, length, side="left"))
        return row._replace(
            input_ids=row.input_ids[:length],
            cu_seqlens=np.append(row.cu_seqlens[:count], np.int32(length)).astype(np.int32),
            documents=row.documents[:count],
            sources=row.sources[:count],
            continuation=row.continuation[:count],
            weights=row.weights[:length],
        )


def recut(
    rows: PackedRows, *, length: int, strategy: str = "concat", overflow: Overflow = "split"
) -> RecutRows | HeadRows:
    """Return packed rows as rows of `length` tokens, and log what becomes of them.

    Args:
        rows: rows of any lengths.
        strategy: how documents are placed with overflow split; see `packing`.
        overflow: see the module's table.

    Raises:
        ConfigError: they do not fill one row.
        DataError: the spans of a row overlap or reach outside.
    """
    made = (
        HeadRows(rows, length=length)
        if overflow == "drop_tail"
        else RecutRows(rows, length=length, strategy=strategy)
    )
    stored = rows.index.lengths
    counts = [f"{count} {name.replace('_', ' ')}" for name, count in made.left_out.items() if count]
    get_logger("data").info(
        "%s: %d rows of %s tokens become %d of %d; %s",
        rows.path, rows.num_rows, _range(stored), made.num_rows, length, ", ".join(counts) or "nothing is cut",
    )  # fmt: skip
    return made


def _need_rows(count: int, rows: PackedRows, length: int) -> None:
    if not count:
        raise ConfigError(
            f"{rows.path} does not fill one row",
            found=f"{rows.num_rows} rows of {_range(rows.index.lengths)} tokens",
            allowed=f"at least {length} tokens",
            fix="give it more rows or a shorter context_length",
        )


def _range(lengths: np.ndarray) -> str:
    low, high = int(lengths.min()), int(lengths.max())
    return str(low) if low == high else f"{low} to {high}"


def _blocks_of(rows: PackedRows, first: np.ndarray) -> np.ndarray:
    """Return the sizes of runs of new rows that begin in the same block of stored rows."""
    if not len(rows.blocks):
        return rows.blocks
    block = np.searchsorted(np.cumsum(rows.blocks), first, side="right")
    return np.diff(np.flatnonzero(np.diff(block, prepend=-1, append=-1)))
