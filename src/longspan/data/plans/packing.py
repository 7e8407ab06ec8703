"""Packing: where each token of the chosen documents stands; a pure function of lengths, nothing is copied.

    concat    documents follow one another and are cut where a row ends; nothing is wasted
    intact    a row holds one document only; a longer document fills several rows
    best_fit  no document that fits a row is cut; rows are filled best-fit-decreasing and padded
    split     documents are cut into pieces of listed lengths, the longest that fits first; one plan a length

A plan is a list of spans `(document, start, tokens)`, cut into rows of exactly `length` tokens. A span that
does not begin at its document's start continues it. What finds no place in a row is counted, never lost.

Spans count in *framed* tokens: the document with the BOS and EOS that the settings ask for. A document of 5
tokens framed by both is 7 long; position 0 is the BOS, positions 1 to 5 its tokens, position 6 the EOS.

A span that continues a document may begin with a token of its own (`mos_id`) and with the last `overlap`
tokens of the piece before it. Those stand in two rows and are trained on in the first: in the second they are
context only, of weight 0. Pieces of two documents never overlap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from longspan.core.columns import load_columns, save_columns
from longspan.core.config import Config
from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.seeds import rng
from longspan.data.plans.cutting import cut_across, own_tokens
from longspan.data.plans.pack_config import STRATEGIES, PackConfig
from longspan.data.store.lengths import LengthTable

KIND = "pack-plan"
PAD_DOCUMENT = 2**32 - 1
"""Document number of a span of padding."""
BLOCK = 2**20
"""Documents worked on at a time; it bounds memory and has no influence on the plan."""
ROW_BLOCK = 2**18
"""Rows moved at a time while shuffling; bounds memory only."""
WINDOW = 2**22
"""Pieces that are joined to rows at a time."""

_DTYPES: dict[str, type] = {
    "span_document": np.uint32,
    "span_start": np.uint32,
    "span_tokens": np.uint32,
    "row_offsets": np.uint64,
}
_OPTIONAL: dict[str, type] = {"span_repeated": np.uint32}


class PackReport(Config):
    """Where the tokens went: tokens_in == tokens_packed + the sum of dropped."""

    rows: int
    documents_in: int
    documents: int
    """Documents whose beginning stands in a row."""
    continuations: int
    """Spans that continue a document."""
    tokens_in: int
    tokens_packed: int
    """Document tokens in rows; specials and padding not counted."""
    special_tokens: int
    padding_tokens: int
    dropped: dict[str, int]
    """Tokens left out: "short" documents, "tail" pieces, the "remainder" that fills no row, with overflow drop_tail
    what documents have beyond a row ("overflow"), and with split the pieces of "other_lengths", which stand in the
    plans of those lengths."""
    sources: dict[str, int]
    """Document tokens in rows, per source."""
    repeated_tokens: int = 0
    """Tokens that overlapping pieces hold a second time."""


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Rows of spans; row r holds spans `row_offsets[r]` to `row_offsets[r + 1]`."""

    span_document: np.ndarray
    """uint32 [spans] index into the length table, or PAD_DOCUMENT."""
    span_start: np.ndarray
    """uint32 [spans] first framed token of the document; above 0 the span continues a document."""
    span_tokens: np.ndarray
    """uint32 [spans] number of framed tokens."""
    row_offsets: np.ndarray
    """uint64 [rows + 1]."""
    report: PackReport
    spec: PackConfig
    seed: int
    lengths_fingerprint: str
    fingerprint: str
    """16 hex characters over settings, seed, length table and the documents that were packed."""
    stores: tuple[str, ...] = ()
    """Paths of the token stores behind the length table, in order; empty when unknown."""
    span_repeated: np.ndarray | None = None
    """uint32 [spans] tokens that the piece before holds too, behind the MOS; None: no piece overlaps."""

    @property
    def num_rows(self) -> int:
        """Return the number of rows."""
        return len(self.row_offsets) - 1

    @property
    def span_untrained(self) -> np.ndarray | None:
        """Return `span_repeated` where repeated tokens have weight 0, else None."""
        return None if self.spec.overlap_across else self.span_repeated

    def save(self, path: str | Path, *, stores: Sequence[str | Path] = ()) -> None:
        """Write the plan as a folder, whole or not at all; `stores` are remembered for whoever loads rows."""
        head: dict[str, Any] = {
            "spec": self.spec.to_dict(),
            "seed": self.seed,
            "lengths": self.lengths_fingerprint,
            "fingerprint": self.fingerprint,
            "stores": [str(store) for store in stores or self.stores],
            "report": self.report.to_dict(),
        }
        columns = {name: getattr(self, name) for name in _DTYPES}
        if self.span_repeated is not None:
            columns["span_repeated"] = self.span_repeated
        save_columns(path, kind=KIND, head=head, columns=columns)

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = True) -> Self:
        """Read a saved plan, memory-mapped. Raises DataError when it is incomplete or of another kind."""
        head, columns = load_columns(path, kind=KIND, dtypes=_DTYPES, optional=_OPTIONAL, mmap=mmap)
        num_spans, offsets = len(columns["span_document"]), columns["row_offsets"]
        if any(len(column) != num_spans for name, column in columns.items() if name != "row_offsets") or not (
            len(offsets)
            and offsets[0] == 0
            and offsets[-1] == num_spans
            and np.all(offsets[1:] > offsets[:-1])
        ):
            raise DataError(f"the rows of the plan {path} do not fit its spans", fix="pack again")
        try:
            return cls(
                **columns,
                report=PackReport.from_dict(head["report"], where="report"),
                spec=PackConfig.from_dict(head["spec"], where="spec"),
                seed=head["seed"],
                lengths_fingerprint=head["lengths"],
                fingerprint=head["fingerprint"],
                stores=tuple(head["stores"]),
            )
        except (ConfigError, KeyError, TypeError) as error:
            raise DataError(f"the head of the plan {path} is damaged", found=str(error)) from None


def plan_packing(spec: PackConfig, lengths: LengthTable, documents: np.ndarray, seed: int) -> PackPlan:
    """Place `documents` (indices into `lengths`, in order) in rows; about 0.2 s for 1 million documents.

    Works through blocks of documents, so memory is that of the plan and one block.

    Raises:
        ArgumentError: a document number is not in the table, or strategy split is given no `piece_length`.
    """
    strategy = STRATEGIES[spec.strategy]
    if strategy.by_lengths and spec.piece_length is None:
        raise ArgumentError(
            "a split plan holds pieces of one length", allowed=spec.split_lengths, fix="use plan_split"
        )
    if len(documents) and int(np.max(documents)) >= len(lengths):
        raise ArgumentError(
            "a document number is not in the length table",
            found=int(np.max(documents)),
            allowed=f"0 to {len(lengths) - 1}",
            fix="give the stores that the mixture was planned on",
        )
    parts, dropped = [], dict.fromkeys(("short", "tail", "remainder"), 0)
    if strategy.by_lengths:
        dropped["other_lengths"] = 0
    if spec.overflow == "drop_tail":
        dropped["overflow"] = 0
    for group in _groups(spec, lengths, documents):
        columns = _place(spec, lengths, group, dropped)
        if strategy.join is not None:
            columns = _join_rows(columns, spec.length, strategy.join)
        parts.append(_pad_rows(columns, spec.length) if spec.remainder == "pad" else columns)
    columns = _Columns.join(parts)
    if spec.shuffle:
        columns = _shuffle_rows(columns, rng(seed, "packing", "rows"))
    report = _report(spec, lengths, documents, columns, dropped)
    head = f"{spec.fingerprint()} {seed} {lengths.fingerprint}\n".encode()
    digest = hashlib.sha256(head)
    digest.update(np.ascontiguousarray(documents, dtype=np.uint32).data)
    return PackPlan(
        span_document=columns.span_document,
        span_start=columns.span_start,
        span_tokens=columns.span_tokens,
        row_offsets=columns.row_offsets,
        span_repeated=columns.span_repeated if spec.overlap else None,
        report=report,
        spec=spec,
        seed=seed,
        lengths_fingerprint=lengths.fingerprint,
        fingerprint=digest.hexdigest()[:16],
    )


def plan_split(
    spec: PackConfig, lengths: LengthTable, documents: np.ndarray, seed: int
) -> dict[int, PackPlan]:
    """Return the plan of every length in `spec.split_lengths`, for strategy split.

    Each document is cut into the longest listed pieces that fit, from its start on: 150 with lengths 64 and 16
    gives 64, 64, 16 and a tail of 6. Over all plans, tokens in = packed + short + tail + remainders.
    """
    plans = {}
    for piece in spec.split_lengths:
        one = spec.model_copy(update={"piece_length": piece})
        plans[piece] = plan_packing(one, lengths, documents, seed)
    return plans


class _Columns(NamedTuple):
    """The columns of a plan."""

    span_document: np.ndarray
    span_start: np.ndarray
    span_tokens: np.ndarray
    span_repeated: np.ndarray
    row_offsets: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Put the rows of several parts one after another."""
        if len(parts) == 1:
            return parts[0]
        nothing = np.zeros(0, np.uint32)
        spans = [np.concatenate([nothing, *(part[index] for part in parts)]) for index in range(4)]
        offsets, first = [np.zeros(1, np.uint64)], 0
        for part in parts:
            offsets.append(part.row_offsets[1:] + np.uint64(first))
            first += len(part.span_document)
        return cls._make([*spans, np.concatenate(offsets)])


def _groups(spec: PackConfig, lengths: LengthTable, documents: np.ndarray) -> Iterable[np.ndarray]:
    """Yield the documents that may share rows: all, or with `by_source` those of each source, by name."""
    if not spec.by_source:
        yield documents
        return
    sources = lengths.source[documents]
    for _, number in sorted((name, number) for number, name in enumerate(lengths.source_names)):
        yield documents[sources == number]


def _place(
    spec: PackConfig, lengths: LengthTable, documents: np.ndarray, dropped: dict[str, int]
) -> _Columns:
    """Cut all documents, block by block, into unpadded rows; add the tokens dropped for each reason."""
    if spec.overlap_across:
        return _place_across(spec, lengths, documents, dropped)
    nothing = np.zeros(0, np.uint32)
    parts, ends = [(nothing, nothing, nothing, nothing)], [np.zeros(1, np.uint64)]
    strategy = STRATEGIES[spec.strategy]
    num_spans = phase = 0  # phase: tokens in the row that is being filled
    for first in range(0, len(documents), BLOCK):
        part = np.asarray(documents[first : first + BLOCK], np.uint32)
        tokens = lengths.tokens[part].astype(np.int64)
        long_enough = tokens >= spec.min_length
        dropped["short"] += int(tokens[~long_enough].sum())
        part, tokens = part[long_enough], tokens[long_enough]
        pieces = strategy.cut(spec, tokens, phase, dropped)
        filled = phase + np.cumsum(pieces.tokens)
        if len(filled) and strategy.flows:
            phase = int(filled[-1]) % spec.length
        full = (filled % spec.length == 0) | (not strategy.flows)
        ends.append((num_spans + 1 + np.flatnonzero(full)).astype(np.uint64))
        parts.append((part[pieces.document], *(column.astype(np.uint32) for column in pieces[1:])))
        num_spans += len(pieces.document)
    spans = _Columns._make([*(np.concatenate(column) for column in zip(*parts)), np.concatenate(ends)])
    if phase and spec.remainder == "pad":
        return spans._replace(row_offsets=np.append(spans.row_offsets, np.uint64(num_spans)))
    if spec.remainder == "drop_last" and phase == 0 and len(spans.row_offsets) > 1:
        spans = spans._replace(row_offsets=spans.row_offsets[:-1])
    return _full_rows(spec, lengths, spans, dropped)


def _place_across(
    spec: PackConfig, lengths: LengthTable, documents: np.ndarray, dropped: dict[str, int]
) -> _Columns:
    """Place all documents in rows that repeat the end of the row before; see `cut_across`."""
    tokens = lengths.tokens[documents].astype(np.int64)
    long_enough = tokens >= spec.min_length
    dropped["short"] += int(tokens[~long_enough].sum())
    kept = np.asarray(documents, np.uint32)[long_enough]
    pieces, offsets = cut_across(spec, tokens[long_enough])
    ends = offsets.astype(np.uint64)
    num_rows = len(offsets) - 1
    if num_rows:
        last = slice(int(offsets[-2]), None)
        short = int(pieces.tokens[last].sum()) < spec.length
        new = int((pieces.tokens - pieces.repeated)[last].sum())
        if short and (spec.remainder == "drop" or not new):
            ends = ends[:-1]
    columns = (kept[pieces.document], *(column.astype(np.uint32) for column in pieces[1:]))
    return _full_rows(spec, lengths, _Columns._make([*columns, ends]), dropped)


def _full_rows(spec: PackConfig, lengths: LengthTable, spans: _Columns, dropped: dict[str, int]) -> _Columns:
    """Leave out the spans behind the last row and count their tokens."""
    end = int(spans.row_offsets[-1])
    own = own_tokens(spec, lengths.tokens[spans.span_document[end:]], *(c[end:] for c in spans[1:4]))
    dropped["remainder"] += int(own.sum())
    return _Columns._make([*(column[:end] for column in spans[:4]), spans.row_offsets])


def _join_rows(columns: _Columns, length: int, join: Callable[[np.ndarray, int], np.ndarray]) -> _Columns:
    """Put rows of one piece each together, within windows of WINDOW pieces.

    Pieces of a row keep their order. The window bounds time and memory; its last rows alone are not full.
    """
    if not len(columns.span_tokens):
        return columns
    bins, num_bins = [], 0
    for first in range(0, len(columns.span_tokens), WINDOW):
        tokens = columns.span_tokens[first : first + WINDOW].astype(np.int64)
        bins.append(num_bins + join(tokens, length))
        num_bins = int(bins[-1].max()) + 1
    row = np.concatenate(bins)
    order = np.argsort(row, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.uint64)
    return _Columns._make([*(column[order] for column in columns[:4]), offsets])


def _pad_rows(columns: _Columns, length: int) -> _Columns:
    """Append a span of padding to every row that is not full."""
    document, start, count, repeated, offsets = columns
    if len(offsets) == 1:
        return columns
    missing = length - np.add.reduceat(count, offsets[:-1].astype(np.int64), dtype=np.int64)
    rows = np.flatnonzero(missing)
    at = offsets[1:][rows].astype(np.int64)
    added = np.zeros(len(offsets), np.uint64)
    added[1:] = np.cumsum(missing > 0)
    return _Columns(
        np.insert(document, at, np.uint32(PAD_DOCUMENT)),
        np.insert(start, at, np.uint32(0)),
        np.insert(count, at, missing[rows].astype(np.uint32)),
        np.insert(repeated, at, np.uint32(0)),
        offsets + added,
    )


def _shuffle_rows(columns: _Columns, generator: np.random.Generator) -> _Columns:
    """Put rows in random order, copying the spans block by block."""
    offsets = columns.row_offsets
    order = generator.permutation(len(offsets) - 1)
    sizes = np.diff(offsets)[order]
    new_offsets = np.zeros(len(offsets), np.uint64)
    np.cumsum(sizes, out=new_offsets[1:])
    shuffled = [np.empty_like(column) for column in columns[:4]]
    for first in range(0, len(order), ROW_BLOCK):
        block = slice(first, first + ROW_BLOCK)
        size = sizes[block].astype(np.int64)
        moved = offsets[order[block]].astype(np.int64) - new_offsets[:-1][block].astype(np.int64)
        low = int(new_offsets[first])
        high = low + int(size.sum())
        spans = np.arange(low, high) + np.repeat(moved, size)
        for column, new in zip(columns[:4], shuffled):
            new[low:high] = column[spans]
    return _Columns._make([*shuffled, new_offsets])


def _report(
    spec: PackConfig, lengths: LengthTable, documents: np.ndarray, columns: _Columns, dropped: dict[str, int]
) -> PackReport:
    by_source = np.zeros(len(lengths.source_names), np.int64)
    count = dict.fromkeys(("own", "all", "repeated", "padding", "begun", "continued"), 0)
    for first in range(0, len(columns.span_document), BLOCK):
        part = [column[first : first + BLOCK] for column in columns[:4]]
        real = part[0] != PAD_DOCUMENT
        count["padding"] += int(part[2][~real].sum(dtype=np.uint64))
        document, start, tokens, repeated = (column[real] for column in part)
        own = own_tokens(spec, lengths.tokens[document], start, tokens, repeated)
        by_source += np.bincount(lengths.source[document], own, len(by_source)).astype(np.int64)
        count["own"] += int(own.sum())
        count["all"] += int(tokens.sum(dtype=np.uint64))
        count["repeated"] += int(repeated.sum(dtype=np.uint64))
        count["continued"] += int(np.count_nonzero(start))
        count["begun"] += len(start) - int(np.count_nonzero(start))
    tokens_in = 0
    for first in range(0, len(documents), BLOCK):
        tokens_in += int(lengths.tokens[documents[first : first + BLOCK]].sum(dtype=np.uint64))
    report = PackReport(
        rows=len(columns.row_offsets) - 1,
        documents_in=len(documents),
        documents=count["begun"],
        continuations=count["continued"],
        tokens_in=tokens_in,
        tokens_packed=count["own"],
        special_tokens=count["all"] - count["own"] - count["repeated"],
        padding_tokens=count["padding"],
        dropped=dropped,
        sources={name: int(tokens) for name, tokens in zip(lengths.source_names, by_source) if tokens},
        repeated_tokens=count["repeated"],
    )
    placed = count["all"] + count["padding"]
    assert placed == report.rows * spec.length
    assert report.tokens_in == report.tokens_packed + sum(dropped.values())
    return report
