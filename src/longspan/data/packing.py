"""Packing: where each token of the chosen documents stands; a pure function of lengths, nothing is copied.

    concat    documents follow one another and are cut where a row ends; nothing is wasted
    intact    a row holds one document only; a longer document fills several rows
    best_fit  no document that fits a row is cut; rows are filled best-fit-decreasing and padded

A plan is a list of spans `(document, start, tokens)`, cut into rows of exactly `length` tokens. A span that
does not begin at its document's start continues it. What finds no place in a row is counted, never lost.

Spans count in *framed* tokens: the document with the BOS and EOS that the settings ask for. A document of 5
tokens framed by both is 7 long; position 0 is the BOS, positions 1 to 5 its tokens, position 6 the EOS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pydantic

from longspan.core.config import Config
from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.seeds import rng
from longspan.data.best_fit import best_fit_decreasing
from longspan.data.columns import load_columns, save_columns
from longspan.data.lengths import Length, LengthTable

KIND = "pack-plan"
PAD_DOCUMENT = 2**32 - 1
"""Document number of a span of padding."""
BLOCK = 2**22
"""Documents worked on at a time; it bounds memory and has no influence on the plan."""

_DTYPES: dict[str, type] = {
    "span_document": np.uint32,
    "span_start": np.uint32,
    "span_tokens": np.uint32,
    "row_offsets": np.uint64,
}


class PackSpec(Config):
    """How documents are placed in rows."""

    length: Length = pydantic.Field(ge=1, lt=2**32)
    """Tokens in a row, such as 128k."""
    strategy: Literal["concat", "intact", "best_fit"] = "concat"
    """See the module's table."""
    min_length: Length = pydantic.Field(1, ge=1)
    """Documents with fewer tokens than this, specials not counted, are left out. 1: only empty ones."""
    min_tail: Length = pydantic.Field(1, ge=1)
    """The last piece of a cut document is dropped if it has fewer tokens than this. 1: never."""
    remainder: Literal["drop", "pad"] = "drop"
    """What becomes of a row that is not full: dropped (and counted) or filled with padding of weight 0."""
    specials: Literal["none", "bos", "eos", "both"] = "none"
    """Which special tokens frame a document; a token store holds none."""
    bos_id: int | None = pydantic.Field(None, ge=0)
    """Token that begins a document if `specials` asks for it."""
    eos_id: int | None = pydantic.Field(None, ge=0)
    """Token that ends a document if `specials` asks for it."""
    pad_id: int | None = pydantic.Field(None, ge=0)
    """Token of padding; any valid id serves, because padding has weight 0."""
    shuffle: bool = True
    """Put the rows in random order, so that the rows of one long document do not follow one another."""

    @pydantic.model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.min_tail > self.length:
            raise ValueError(f"min_tail {self.min_tail} is longer than a row of {self.length}")
        if self.num_bos and self.bos_id is None:
            raise ValueError(f"specials {self.specials} needs bos_id")
        if self.num_eos and self.eos_id is None:
            raise ValueError(f"specials {self.specials} needs eos_id")
        if self.strategy == "best_fit" and self.remainder == "drop":
            raise ValueError("best_fit leaves most rows a little short of full: it needs remainder pad")
        if self.remainder == "pad" and self.pad_id is None:
            raise ValueError("remainder pad needs pad_id")
        return self

    @property
    def num_bos(self) -> int:
        """Return the number of tokens in front of a document: 0 or 1."""
        return int(self.specials in ("bos", "both"))

    @property
    def num_eos(self) -> int:
        """Return the number of tokens behind a document: 0 or 1."""
        return int(self.specials in ("eos", "both"))


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
    """Tokens left out: "short" documents, "tail" pieces, the "remainder" that fills no row."""
    sources: dict[str, int]
    """Document tokens in rows, per source."""


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
    spec: PackSpec
    seed: int
    lengths_fingerprint: str
    fingerprint: str
    """16 hex characters over settings, seed, length table and the documents that were packed."""
    stores: tuple[str, ...] = ()
    """Paths of the token stores behind the length table, in order; empty when unknown."""

    @property
    def num_rows(self) -> int:
        """Return the number of rows."""
        return len(self.row_offsets) - 1

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
        save_columns(path, kind=KIND, head=head, columns={name: getattr(self, name) for name in _DTYPES})

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = True) -> Self:
        """Read a saved plan, memory-mapped. Raises DataError when it is incomplete or of another kind."""
        head, columns = load_columns(path, kind=KIND, dtypes=_DTYPES, mmap=mmap)
        num_spans, offsets = len(columns["span_document"]), columns["row_offsets"]
        if any(len(columns[name]) != num_spans for name in ("span_start", "span_tokens")) or not (
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
                spec=PackSpec.from_dict(head["spec"], where="spec"),
                seed=head["seed"],
                lengths_fingerprint=head["lengths"],
                fingerprint=head["fingerprint"],
                stores=tuple(head["stores"]),
            )
        except (ConfigError, KeyError, TypeError) as error:
            raise DataError(f"the head of the plan {path} is damaged", found=str(error)) from None


def plan_packing(spec: PackSpec, lengths: LengthTable, documents: np.ndarray, seed: int) -> PackPlan:
    """Place `documents` (indices into `lengths`, in order) in rows; about 0.2 s for 1 million documents.

    Works through blocks of documents, so memory is that of the plan and one block.

    Raises:
        ArgumentError: a document number is not in the table.
    """
    if len(documents) and int(np.max(documents)) >= len(lengths):
        raise ArgumentError(
            "a document number is not in the length table",
            found=int(np.max(documents)),
            allowed=f"0 to {len(lengths) - 1}",
            fix="give the stores that the mixture was planned on",
        )
    columns, dropped = _place(spec, lengths, documents)
    if spec.strategy == "best_fit":
        columns = _join_rows(columns, spec.length)
    if spec.remainder == "pad":
        columns = _pad_rows(columns, spec.length)
    if spec.shuffle:
        columns = _shuffle_rows(columns, rng(seed, "packing", "rows"))
    report = _report(spec, lengths, documents, columns, dropped)
    head = f"{spec.fingerprint()} {seed} {lengths.fingerprint}\n".encode()
    digest = hashlib.sha256(head)
    digest.update(np.ascontiguousarray(documents, dtype=np.uint32).data)
    return PackPlan(
        **columns._asdict(),
        report=report,
        spec=spec,
        seed=seed,
        lengths_fingerprint=lengths.fingerprint,
        fingerprint=digest.hexdigest()[:16],
    )


class _Pieces(NamedTuple):
    """Pieces of the documents of a block, int64 columns; `document` counts within the block."""

    document: np.ndarray
    start: np.ndarray
    tokens: np.ndarray


class _Columns(NamedTuple):
    """The columns of a plan."""

    span_document: np.ndarray
    span_start: np.ndarray
    span_tokens: np.ndarray
    row_offsets: np.ndarray


def _place(spec: PackSpec, lengths: LengthTable, documents: np.ndarray) -> tuple[_Columns, dict[str, int]]:
    """Cut all documents, block by block; return unpadded rows and the tokens dropped for each reason."""
    nothing = np.zeros(0, np.uint32)
    parts, ends = [(nothing, nothing, nothing)], [np.zeros(1, np.uint64)]
    dropped = {"short": 0, "tail": 0, "remainder": 0}
    intact = spec.strategy != "concat"
    num_spans = phase = 0  # phase: tokens in the row that is being filled
    for first in range(0, len(documents), BLOCK):
        part = np.asarray(documents[first : first + BLOCK], np.uint32)
        tokens = lengths.tokens[part].astype(np.int64)
        long_enough = tokens >= spec.min_length
        dropped["short"] += int(tokens[~long_enough].sum())
        part, tokens = part[long_enough], tokens[long_enough]
        framed = tokens + spec.num_bos + spec.num_eos
        kept = framed - _short_tails(framed, phase, spec)
        dropped["tail"] += int(_own_tokens(spec, tokens, kept, framed - kept).sum())
        if intact and spec.remainder == "drop":
            rest = kept % spec.length
            kept = kept - rest
            dropped["remainder"] += int(_own_tokens(spec, tokens, kept, rest).sum())
        begin = np.zeros_like(kept) if intact else phase + np.cumsum(kept) - kept
        pieces = _cut(begin, kept, spec.length)
        filled = phase + np.cumsum(pieces.tokens)
        if len(filled) and not intact:
            phase = int(filled[-1]) % spec.length
        ends.append((num_spans + 1 + np.flatnonzero((filled % spec.length == 0) | intact)).astype(np.uint64))
        parts.append((part[pieces.document], pieces.start.astype(np.uint32), pieces.tokens.astype(np.uint32)))
        num_spans += len(pieces.document)
    document, start, count = (np.concatenate(column) for column in zip(*parts))
    offsets = np.concatenate(ends)
    if phase and spec.remainder == "pad":
        offsets = np.append(offsets, np.uint64(num_spans))
    full = int(offsets[-1])
    own = _own_tokens(spec, lengths.tokens[document[full:]].astype(np.int64), start[full:], count[full:])
    dropped["remainder"] += int(own.sum())
    return _Columns(document[:full], start[:full], count[:full], offsets), dropped


def _short_tails(framed: np.ndarray, phase: int, spec: PackSpec) -> np.ndarray:
    """Return how many tokens each document loses at its end because they would be a short last piece."""
    length, least = spec.length, spec.min_tail
    if least == 1:
        return np.zeros_like(framed)
    if spec.strategy != "concat":
        last = framed % length
        return np.where((framed > length) & (last < least), last, 0)
    # Every tail moves all that follows, so this is a loop: 0.15 us a document.
    tails = []
    for tokens in framed.tolist():
        end = phase + tokens
        phase = end % length
        tail = phase if end > length and phase < least else 0
        phase -= tail
        tails.append(tail)
    return np.array(tails, np.int64)


def _cut(begin: np.ndarray, tokens: np.ndarray, length: int) -> _Pieces:
    """Cut documents that stand at `begin` of a token stream wherever a row of `length` ends.

    begin [0, 3], tokens [3, 6], length 4 -> document [0, 1, 1, 1], start [0, 0, 1, 5], tokens [3, 1, 4, 1].
    """
    end = begin + tokens
    first_row = begin // length
    num_pieces = (end - 1) // length - first_row + 1
    document = np.repeat(np.arange(len(tokens)), num_pieces)
    ordinal = np.arange(len(document)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    row_begin = (first_row[document] + ordinal) * length
    low = np.maximum(begin[document], row_begin)
    high = np.minimum(end[document], row_begin + length)
    return _Pieces(document, low - begin[document], high - low)


def _own_tokens(spec: PackSpec, tokens: np.ndarray, start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return how many tokens of each piece are the document's own: framed position p is token p - num_bos."""
    low = np.maximum(start.astype(np.int64), spec.num_bos)
    high = np.minimum(start.astype(np.int64) + count, spec.num_bos + tokens)
    return np.maximum(high - low, 0)


def _join_rows(columns: _Columns, length: int) -> _Columns:
    """Put rows of one piece each together, best-fit-decreasing; pieces of a row keep their order."""
    bins = best_fit_decreasing(columns.span_tokens.astype(np.int64), length)
    order = np.argsort(bins, kind="stable")
    ends = np.cumsum(np.bincount(bins)) if len(bins) else np.zeros(0, np.int64)
    offsets = np.concatenate([[0], ends]).astype(np.uint64)
    document, start, count, _ = columns
    return _Columns(document[order], start[order], count[order], offsets)


def _pad_rows(columns: _Columns, length: int) -> _Columns:
    """Append a span of padding to every row that is not full."""
    document, start, count, offsets = columns
    if len(offsets) == 1:
        return columns
    missing = length - np.add.reduceat(count.astype(np.int64), offsets[:-1].astype(np.int64))
    rows = np.flatnonzero(missing)
    at = offsets[1:][rows].astype(np.int64)
    added = np.zeros(len(offsets), np.uint64)
    added[1:] = np.cumsum(missing > 0)
    return _Columns(
        np.insert(document, at, np.uint32(PAD_DOCUMENT)),
        np.insert(start, at, np.uint32(0)),
        np.insert(count, at, missing[rows].astype(np.uint32)),
        offsets + added,
    )


def _shuffle_rows(columns: _Columns, generator: np.random.Generator) -> _Columns:
    document, start, count, offsets = columns
    begins, row_ends = offsets[:-1].astype(np.int64), offsets[1:].astype(np.int64)
    order = generator.permutation(len(begins))
    sizes = (row_ends - begins)[order]
    ends = np.cumsum(sizes)
    spans = np.arange(len(document)) + np.repeat(begins[order] - (ends - sizes), sizes)
    new_offsets = np.concatenate([[0], ends]).astype(np.uint64)
    return _Columns(document[spans], start[spans], count[spans], new_offsets)


def _report(
    spec: PackSpec, lengths: LengthTable, documents: np.ndarray, columns: _Columns, dropped: dict[str, int]
) -> PackReport:
    is_padding = columns.span_document == PAD_DOCUMENT
    document, start, count = (column[~is_padding] for column in columns[:3])
    own = _own_tokens(spec, lengths.tokens[document].astype(np.int64), start, count)
    by_source = np.bincount(lengths.source[document], weights=own, minlength=len(lengths.source_names))
    report = PackReport(
        rows=len(columns.row_offsets) - 1,
        documents_in=len(documents),
        documents=int((start == 0).sum()),
        continuations=int((start > 0).sum()),
        tokens_in=int(lengths.tokens[documents].sum(dtype=np.uint64)),
        tokens_packed=int(own.sum()),
        special_tokens=int(count.sum(dtype=np.uint64)) - int(own.sum()),
        padding_tokens=int(columns.span_tokens[is_padding].sum(dtype=np.uint64)),
        dropped=dropped,
        sources={name: int(tokens) for name, tokens in zip(lengths.source_names, by_source) if tokens},
    )
    placed = report.tokens_packed + report.special_tokens + report.padding_tokens
    assert placed == report.rows * spec.length
    assert report.tokens_in == report.tokens_packed + sum(dropped.values())
    return report
