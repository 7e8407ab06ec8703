"""Rows as files of other tools: what one piece of a packed folder looks like in each format.

    mds      shard.00000.mds         input_ids, indices u32[n,2], doc_ids, sources, continued, domain, length, mask
    jsonl    rows.00000.jsonl        {"input_ids": [...], "labels": next token, "source": [{source, start, end}]}
    parquet  rows.00000.parquet      the same columns
    npy      input_ids.00000.npy     [rows, length], weights.00000.npy uint8 [rows, length] where used, and
             spans.00000.npy         int64 [spans, 6]: row, start, end, document, source, continued

`indices` are half-open; tokens that no index covers are padding. In the JSON form padding is a source of its
own, so the spans partition the row; `labels`, one number, is the token after the row if its last document goes
on, else -100, or the BOS of the next document where that is asked for.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from longspan.core.files import atomic_write
from longspan.data.plans.packing import PAD_DOCUMENT
from longspan.data.rows.loader import PackedRow
from longspan.data.rows.plan_rows import RowSpans
from longspan.data.store import Column
from longspan.data.store.mds import array_header
from longspan.data.store.shard_files import write_shard

RowFormat = Literal["mds", "jsonl", "parquet", "npy"]
FORMATS: tuple[RowFormat, ...] = ("mds", "jsonl", "parquet", "npy")
MIXED = "mixed"
"""Domain of an MDS row with documents of several sources."""


class RowFrame(NamedTuple):
    """What stands around the ids and weights of a row in MDS; see `row_frames`."""

    continued: bytes
    documents: bytes
    domain: bytes
    indices: bytes
    sources: bytes


class LabelledRow(NamedTuple):
    """A row, the token that follows it, and what MDS writes around it."""

    row: PackedRow
    label: int
    frame: RowFrame


def write_rows(
    folder: Path,
    number: int,
    rows: Iterable[LabelledRow],
    *,
    num_rows: int,
    format: RowFormat,
    has_mask: bool,
    dtype: str,
) -> dict[str, Any]:
    """Write the files of one piece, each whole or not at all; return file, rows, bytes and id_sum.

    `dtype` is that of the ids of an npy; MDS holds uint32.
    """
    summed = _Summed(rows)
    if format == "mds":
        name = f"shard.{number:05}.mds"
        samples = (_mds_sample(row, frame, has_mask) for row, _, frame in summed)
        write_shard(folder / name, mds_columns(has_mask), samples, num_rows)
    elif format == "jsonl":
        name = f"rows.{number:05}.jsonl"
        _write_jsonl(folder / name, summed, has_mask)
    elif format == "parquet":
        name = f"rows.{number:05}.parquet"
        _write_parquet(folder / name, summed, has_mask)
    else:
        name = f"input_ids.{number:05}.npy"
        _write_npy(folder, number, summed, num_rows, has_mask, dtype)
    return {
        "file": name,
        "rows": summed.count,
        "bytes": (folder / name).stat().st_size,
        "id_sum": summed.total,
    }


def id_sum(ids: np.ndarray) -> int:
    """Return the sum of ids as uint32 pairs, modulo 2**64: it shows damage, not forgery."""
    words = np.ascontiguousarray(ids, np.uint32)
    if len(words) % 2:
        words = np.append(words, np.uint32(0))
    return int(words.view(np.uint64).sum(dtype=np.uint64))


class _Summed:
    """Counts rows and sums their ids as they pass."""

    def __init__(self, rows: Iterable[LabelledRow]) -> None:
        self._rows = rows
        self.count = self.total = 0

    def __iter__(self) -> Iterator[LabelledRow]:
        for labelled in self._rows:
            self.count += 1
            self.total = (self.total + id_sum(labelled.row.input_ids)) % 2**64
            yield labelled


def mds_columns(has_mask: bool) -> list[Column]:
    """Return the columns of rows in MDS."""
    columns = [
        Column("continued", "ndarray:uint8"),
        Column("doc_ids", "ndarray:uint32"),
        Column("domain", "str"),
        Column("indices", "ndarray:uint32"),
        Column("input_ids", "ndarray:uint32"),
        Column("length", "int"),
        Column("sources", "ndarray:uint16"),
    ]
    if has_mask:
        columns.insert(6, Column("mask", "ndarray:uint8"))
    return columns


def spans_of(row: PackedRow) -> RowSpans:
    """Return the spans of one row."""
    return RowSpans(
        offsets=np.array([0, len(row.documents)]),
        cu_seqlens=row.cu_seqlens,
        documents=row.documents,
        sources=row.sources,
        continuation=row.continuation,
    )


def row_frames(spans: RowSpans, source_names: Sequence[str]) -> Iterator[RowFrame]:
    """Yield the bytes of the small columns of each row; padding is left out.

    Worked out for a block of rows at once: one by one these tiny arrays cost more than the ids.
    """
    num_rows = len(spans.offsets) - 1
    row_of = np.repeat(np.arange(num_rows), np.diff(spans.offsets))
    begin = np.arange(len(row_of)) + row_of  # a row has one bound more than spans
    real = spans.documents != PAD_DOCUMENT
    begin, sources = begin[real], spans.sources[real]
    bounds = np.stack([spans.cu_seqlens[begin], spans.cu_seqlens[begin + 1]], axis=1)
    columns = (
        (1, spans.continuation[real].astype("u1").tobytes()),
        (4, spans.documents[real].astype("<u4").tobytes()),
        (8, bounds.astype("<u4").tobytes()),
        (2, sources.astype("<u2").tobytes()),
    )
    names = [name.encode() for name in source_names]
    stops = np.cumsum(np.bincount(row_of[real], minlength=num_rows)).tolist()
    numbers, low = sources.tolist(), 0
    for high in stops:
        continued, documents, indices, source = (data[low * width : high * width] for width, data in columns)
        one = len(set(numbers[low:high])) == 1
        header = _header(high - low)
        yield RowFrame(
            continued=header + continued,
            documents=header + documents,
            domain=names[numbers[low]] if one else MIXED.encode(),
            indices=_header(high - low, 2) + indices,
            sources=header + source,
        )
        low = high


def _mds_sample(row: PackedRow, frame: RowFrame, has_mask: bool) -> list[bytes | memoryview]:
    """Return the bytes of a sample with the columns of `mds_columns`; the ids are not copied.

    The same as `store.mds.encode_sample`, at a fraction of its cost: most of these arrays are tiny.
    """
    ids = row.input_ids.astype("<u4", copy=False)
    header = _header(len(ids))
    sizes = [
        len(frame.continued),
        len(frame.documents),
        len(frame.domain),
        len(frame.indices),
        len(header) + ids.nbytes,
        len(frame.sources),
    ]
    fixed = len(ids).to_bytes(8, "little")
    behind: list[bytes | memoryview] = [fixed + frame.sources]
    if has_mask:
        mask = weights_of(row)
        sizes.insert(5, len(header) + len(mask))
        behind = [fixed + header, mask.data, frame.sources]
    head = struct.pack(f"<{len(sizes)}I", *sizes)
    head += frame.continued + frame.documents + frame.domain + frame.indices + header
    return [head, ids.view("u1").data, *behind]


@lru_cache(maxsize=4096)
def _header(*shape: int) -> bytes:
    return array_header(shape)


def weights_of(row: PackedRow) -> np.ndarray:
    """Return the loss weights of a row, uint8 [T]: 1 where it carries none, but 0 for padding."""
    if row.weights is not None:
        return row.weights
    return np.repeat((row.documents != PAD_DOCUMENT).astype(np.uint8), np.diff(row.cu_seqlens))


def _source_spans(row: PackedRow) -> list[dict[str, Any]]:
    bounds = row.cu_seqlens.tolist()
    names = [row.source_names[source] for source in row.sources.tolist()]
    return [
        {"source": name, "start": start, "end": end}
        for name, start, end in zip(names, bounds[:-1], bounds[1:])
    ]


def _write_jsonl(path: Path, rows: _Summed, has_mask: bool) -> None:
    with atomic_write(path) as file:
        for row, label, _ in rows:
            record = {"input_ids": row.input_ids.tolist(), "labels": label, "source": _source_spans(row)}
            if has_mask:
                record["mask"] = weights_of(row).tolist()
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _write_parquet(path: Path, rows: _Summed, has_mask: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    span = pa.struct([("source", pa.string()), ("start", pa.int64()), ("end", pa.int64())])
    fields = [("input_ids", pa.list_(pa.int32())), ("labels", pa.int64()), ("source", pa.list_(span))]
    if has_mask:
        fields.append(("mask", pa.list_(pa.uint8())))
    schema = pa.schema(fields)
    with (
        atomic_write(path) as file,
        pq.ParquetWriter(file, schema, compression="snappy", use_dictionary=False) as writer,
    ):
        for row, label, _ in rows:
            # Ids are below 2**31 in every vocabulary; int32 is what readers of these files expect.
            columns = [
                pa.array([row.input_ids.astype(np.int32)], schema.field(0).type),
                pa.array([label], pa.int64()),
                pa.array([_source_spans(row)], schema.field(2).type),
            ]
            if has_mask:
                columns.append(pa.array([weights_of(row)], schema.field(3).type))
            writer.write_table(pa.table(columns, schema=schema))


def _write_npy(folder: Path, number: int, rows: _Summed, num_rows: int, has_mask: bool, dtype: str) -> None:
    spans, weights = [], []
    with atomic_write(folder / f"input_ids.{number:05}.npy") as file:
        first = True
        for index, (row, *_) in enumerate(rows):
            if first:
                _npy_header(file, (num_rows, len(row.input_ids)), dtype)
                first = False
            file.write(row.input_ids.astype(dtype, copy=False).data)
            bounds = row.cu_seqlens.astype(np.int64)
            columns = (bounds[:-1], bounds[1:], row.documents, row.sources, row.continuation)
            spans.append(np.stack([np.full(len(row.documents), index), *columns], axis=1).astype(np.int64))
            if has_mask:
                weights.append(weights_of(row).copy())
    with atomic_write(folder / f"spans.{number:05}.npy") as file:
        np.save(file, np.concatenate(spans), allow_pickle=False)
    if has_mask:
        with atomic_write(folder / f"weights.{number:05}.npy") as file:
            np.save(file, np.stack(weights), allow_pickle=False)


def _npy_header(file: IO[bytes], shape: tuple[int, ...], dtype: str) -> None:
    head = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)
