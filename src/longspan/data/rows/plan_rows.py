"""The rows of a pack plan, one after another, copied from mapped shards into one buffer.

What `RowLoader.row` does for one row, worked out for thousands of rows at once: a span costs one slice
assignment, about 1 us, so rows of ordinary documents are read at a billion tokens a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from longspan.core.errors import DataError
from longspan.data.plans.packing import PAD_DOCUMENT, PackPlan
from longspan.data.rows.loader import PAD_SOURCE, PackedRow
from longspan.data.store import MDSDirectory, TokenStore
from longspan.data.store.lengths import LengthTable

NO_LABEL = -100
Labels = Literal["document", "next"]
"""Label of a row whose last document ends with it: none, or the BOS of the next document."""


class RowSpans(NamedTuple):
    """Which documents stand where in a block of rows."""

    offsets: np.ndarray
    """int64 [rows + 1]: the spans of row i are offsets[i] to offsets[i + 1]."""
    cu_seqlens: np.ndarray
    """int32: those of row i are the spans' begins and the row's end, at offsets[i] + i onwards."""
    documents: np.ndarray
    """uint32 [spans]"""
    sources: np.ndarray
    """uint16 [spans]"""
    continuation: np.ndarray
    """bool [spans]"""


class _Spans(NamedTuple):
    """Spans of a block of rows, int64 columns: where ids are copied from and to."""

    document: np.ndarray
    start: np.ndarray
    at: np.ndarray
    """Where the span begins in its row."""
    size: np.ndarray
    store: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    """Byte at which the ids of the document begin in its shard."""
    low: np.ndarray
    """First own token that the span holds."""
    num_own: np.ndarray
    own_at: np.ndarray
    """Where the own tokens stand in the row."""
    repeated: np.ndarray
    ends: np.ndarray
    """bool: the span ends its document."""


class _Marks(NamedTuple):
    """Tokens that belong to no document, in the order of the spans."""

    first: list[int]
    """first[i] to first[i + 1] are those of span i."""
    at: np.ndarray
    value: np.ndarray


class PlanRows:
    """Reads rows of a plan in order.

    Raises:
        DataError: the stores are not those of the plan.
    """

    def __init__(self, stores: Sequence[TokenStore], plan: PackPlan) -> None:
        self.plan = plan
        self.lengths = LengthTable.concatenate([store.lengths for store in stores])
        self._stores = stores
        self._folders = [MDSDirectory(store.path) for store in stores]
        self._dtypes = [np.dtype(store.manifest.dtype).newbyteorder("<") for store in stores]
        self._views = lru_cache(maxsize=128)(self._map)
        pads = plan.spec.remainder == "pad"
        self.source_names = self.lengths.source_names + ((PAD_SOURCE,) if pads else ())
        self.has_mask = plan.span_untrained is not None or any(store.has_mask for store in stores)
        """Whether rows have weights other than 0 for padding and 1 for all else."""

    def read(
        self, first: int, stop: int, dtype: DTypeLike = np.uint32
    ) -> tuple[RowSpans, Iterator[PackedRow]]:
        """Return what stands in rows `first` to `stop`, and the rows; each row's ids and weights are overwritten
        by the next. Weights are None without masks.

        Raises:
            DataError: the plan does not fit the documents in the stores.
        """
        plan = self.plan
        offsets = plan.row_offsets[first : stop + 1].astype(np.int64)
        spans = self._spans(offsets)
        offsets -= offsets[0]
        sources = np.full(len(spans.document), len(self.lengths.source_names), np.uint16)
        real = spans.document != PAD_DOCUMENT
        sources[real] = self.lengths.source[spans.document[real]]
        block = RowSpans(
            offsets=offsets,
            cu_seqlens=np.insert(spans.at, offsets[1:], plan.spec.length).astype(np.int32),
            documents=spans.document.astype(np.uint32),
            sources=sources,
            continuation=spans.start > 0,
        )
        return block, self._rows(spans, block, dtype)

    def _rows(self, spans: _Spans, block: RowSpans, dtype: DTypeLike) -> Iterator[PackedRow]:
        length = self.plan.spec.length
        ids: np.ndarray = np.empty(length, dtype)
        weights = np.empty(length, np.uint8) if self.has_mask else None
        copies, marks = self._copies(spans), self._marks(spans)
        padding = (spans.document == PAD_DOCUMENT).tolist() if self.plan.spec.remainder == "pad" else []
        bounds = block.offsets.tolist()
        for row, (low, high) in enumerate(pairwise(bounds)):
            for store, shard, align, begin, count, at in copies[low:high]:
                if count:
                    ids[at : at + count] = self._views(store, shard)[align][begin : begin + count]
            begin, end = marks.first[low], marks.first[high]
            ids[marks.at[begin:end]] = marks.value[begin:end]
            if any(padding[low:high]):
                for span in range(low, high):
                    if padding[span]:
                        at = int(spans.at[span])
                        ids[at : at + int(spans.size[span])] = self.plan.spec.pad_id
            if weights is not None:
                self._fill_weights(spans, low, high, weights)
            yield PackedRow(
                input_ids=ids,
                cu_seqlens=block.cu_seqlens[low + row : high + row + 1],
                documents=block.documents[low:high],
                sources=block.sources[low:high],
                source_names=self.source_names,
                continuation=block.continuation[low:high],
                weights=weights,  # type: ignore[arg-type]
            )

    def next_token(self, row: int, labels: Labels = "document") -> int:
        """Return the token that follows the last one of a row in its document; at its end what `labels` says."""
        plan, spec = self.plan, self.plan.spec
        last = int(plan.row_offsets[row + 1]) - 1
        document, start = int(plan.span_document[last]), int(plan.span_start[last])
        if document == PAD_DOCUMENT:
            return NO_LABEL
        position = start + int(plan.span_tokens[last]) - spec.num_mos * (start > 0) - spec.num_bos
        tokens = self._stores[int(self.lengths.store[document])].tokens(int(self.lengths.position[document]))
        if position < len(tokens):
            return int(tokens[position])
        if spec.num_eos and position == len(tokens):
            return int(spec.eos_id or 0)
        return NO_LABEL if labels == "document" else int(spec.bos_id or 0)

    def _spans(self, offsets: np.ndarray) -> _Spans:
        plan, spec, lengths = self.plan, self.plan.spec, self.lengths
        block = slice(int(offsets[0]), int(offsets[-1]))
        document, start, count = (
            column[block].astype(np.int64)
            for column in (plan.span_document, plan.span_start, plan.span_tokens)
        )
        ends = np.cumsum(count)
        rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        row_ends = ends[offsets[1:] - offsets[0] - 1]
        if not np.array_equal(row_ends, spec.length * np.arange(1, len(offsets))):
            raise DataError("the rows of the pack plan are damaged", fix="pack again")
        real = document != PAD_DOCUMENT
        known = np.where(real, document, 0)
        if len(known) and int(known.max()) >= len(lengths):
            raise DataError("the pack plan names a document that the stores do not have", fix="pack again")
        tokens = np.where(real, lengths.tokens[known], 0).astype(np.int64)
        end = start + count - spec.num_mos * (start > 0)
        framed = tokens + spec.num_bos + spec.num_eos
        if np.any(end[real] > framed[real]):
            raise DataError("the pack plan reaches behind the end of a document", fix="pack again")
        low = np.maximum(start - spec.num_bos, 0)
        num_own = np.where(real, np.maximum(np.minimum(end - spec.num_bos, tokens) - low, 0), 0)
        at = ends - count - rows * spec.length
        own_at = at + spec.num_mos * (start > 0) + low + spec.num_bos - start
        repeated = plan.span_untrained
        spans = _Spans(
            document=document,
            start=start,
            at=at,
            size=count,
            store=lengths.store[known].astype(np.int64),
            shard=lengths.shard[known].astype(np.int64),
            offset=lengths.offset[known].astype(np.int64),
            low=low,
            num_own=num_own,
            own_at=own_at,
            repeated=np.zeros_like(start) if repeated is None else repeated[block].astype(np.int64),
            ends=real & (end == framed),
        )
        self._check_places(spans, real, tokens)
        return spans

    def _copies(self, spans: _Spans) -> list[tuple[int, int, int, int, int, int]]:
        """Return store, shard, which of its views, begin in it, number of ids and place in the row, by span."""
        width = np.array([dtype.itemsize for dtype in self._dtypes])[spans.store]
        align = spans.offset % width
        begin = spans.offset // width + spans.low
        columns = (spans.store, spans.shard, align, begin, spans.num_own, spans.own_at)
        return list(zip(*(column.tolist() for column in columns)))

    def _marks(self, spans: _Spans) -> _Marks:
        """Return where BOS, MOS and EOS stand."""
        spec = self.plan.spec
        continues = spans.start > 0
        value = np.full((len(spans.at), 2), -1, np.int64)
        if spec.bos_id is not None and spec.num_bos:
            value[~continues & (spans.document != PAD_DOCUMENT), 0] = spec.bos_id
        if spec.mos_id is not None:
            value[continues, 0] = spec.mos_id
        if spec.eos_id is not None and spec.num_eos:
            value[spans.ends, 1] = spec.eos_id
        there = value >= 0
        place = np.stack([spans.at, spans.at + spans.size - 1], axis=1)
        first = np.cumsum([0, *np.count_nonzero(there, axis=1)]).tolist()
        return _Marks(first, place[there], value[there])

    def _fill_weights(self, spans: _Spans, low: int, high: int, weights: np.ndarray) -> None:
        weights[:] = 1
        for number in range(low, high):
            document, at = int(spans.document[number]), int(spans.at[number])
            if document == PAD_DOCUMENT:
                weights[at : at + int(spans.size[number])] = 0
                continue
            begin, count, own_at = (int(c[number]) for c in (spans.low, spans.num_own, spans.own_at))
            mask = self._stores[int(spans.store[number])].mask(int(self.lengths.position[document]))
            if mask is not None:
                weights[own_at : own_at + count] = mask[begin : begin + count]
            behind = at + self.plan.spec.num_mos * int(spans.start[number] > 0)
            weights[behind : behind + int(spans.repeated[number])] = 0

    def _map(self, store: int, shard: int) -> list[np.ndarray]:
        """Return a shard as ids, one view for each alignment a document may have."""
        data, dtype = self._folders[store].shard(shard).data, self._dtypes[store]
        return [
            np.frombuffer(
                data[: (len(data) - first) // dtype.itemsize * dtype.itemsize + first], dtype, offset=first
            )
            for first in range(dtype.itemsize)
        ]

    def _check_places(self, spans: _Spans, real: np.ndarray, tokens: np.ndarray) -> None:
        """Check that before each document's ids stands the header of an array of its length."""
        place = spans.store << 32 | spans.shard
        for number in np.unique(place[real]).tolist():
            members = real & (place == number)
            data = np.frombuffer(self._folders[number >> 32].shard(number & 0xFFFFFFFF).data, np.uint8)
            offset = spans.offset[members]
            length = tokens[members]
            code = (length > 0xFF).astype(np.int64) + (length > 0xFFFF)
            width = np.int64(1) << code
            found = np.zeros_like(length)
            for byte in range(4):
                inside = byte < width
                found += (
                    np.where(inside, data[offset - width + np.minimum(byte, width - 1)], 0).astype(np.int64)
                    << 8 * byte
                )
            if not (np.array_equal(found, length) and np.array_equal(data[offset - width - 1], 4 | code)):
                raise DataError(
                    f"{self._stores[number >> 32].path}: a document does not stand where the length table says",
                    fix="verify the store, copy or make it again",
                )
