"""Stores that are packed already, read as rows for training.

    mds            rows with `indices`: ProLong's packed data, and our own
    jsonl, parquet chunks with `input_ids` and `source` spans: the packed SlimPajama of Fu et al. 2024, and ours
    npy            ours

Such a row says which tokens belong together, and, if we wrote it, which documents they are. Tokens outside of
`indices` are padding. Documents of others get numbers of their own, and a span that starts a row of a chunked
stream may continue a document of the row before: only our own rows say so.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longspan.core.errors import ArgumentError, DataError
from longspan.data.loader import PAD_SOURCE, PackedRow
from longspan.data.packing import PAD_DOCUMENT
from longspan.data.store import MDSDirectory
from longspan.data.store.mds import INDEX
from longspan.data.store.token_store import MANIFEST

SAMPLE_BLOCKS = 16
SAMPLE_BYTES = 1 << 16
ROW_GROUPS_CACHED = 4


class _Spans(NamedTuple):
    """The documents of a row; None where the store does not say."""

    starts: np.ndarray
    ends: np.ndarray
    sources: Sequence[str]
    documents: np.ndarray | None
    continued: np.ndarray | None


class _Row(NamedTuple):
    """A row as a store holds it."""

    ids: np.ndarray
    spans: _Spans
    mask: np.ndarray | None


class PackedRows:
    """The rows of a folder or file that is packed already; takes the place of a `RowLoader`.

    Rows are read at random; a chunk file of JSON lines is scanned once for the places of its lines.

    Raises:
        DataError: nothing packed is there, or the rows are of different lengths.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = _Files.open(self.path)
        self._first = np.cumsum([0, *self._files.counts])
        if not self.num_rows:
            raise DataError(f"{self.path} holds no rows")
        first = self._read(0)
        self._length, self.has_mask = len(first.ids), first.mask is not None
        names = self._files.source_names or self._scan_sources()
        self._names = tuple(dict.fromkeys([*names, PAD_SOURCE]))
        self._number = {name: number for number, name in enumerate(self._names)}

    @property
    def num_rows(self) -> int:
        """Return the number of rows."""
        return int(self._first[-1])

    @property
    def length(self) -> int:
        """Return the tokens in a row."""
        return self._length

    @property
    def source_names(self) -> tuple[str, ...]:
        """Return the names that the rows' source numbers stand for; the last is that of padding."""
        return self._names

    @property
    def fingerprint(self) -> str:
        """Return 16 hex characters: those of the plan if we wrote the rows, else over a sample of the bytes."""
        return self._files.fingerprint

    def row(self, index: int) -> PackedRow:
        """Read one row.

        Raises:
            ArgumentError: there is no such row.
            DataError: it is damaged, or of another length than the first.
        """
        if not 0 <= index < self.num_rows:
            raise ArgumentError("there is no such row", found=index, allowed=f"0 to {self.num_rows - 1}")
        found = self._read(index)
        where = f"row {index} of {self.path}"
        if len(found.ids) != self.length or (found.mask is not None and len(found.mask) != self.length):
            raise DataError(f"{where} has another length", found=len(found.ids), allowed=self.length)
        spans = found.spans
        starts, ends = spans.starts.astype(np.int64), spans.ends.astype(np.int64)
        bounds = np.stack([starts, ends], axis=1).reshape(-1)
        if np.any(np.diff(bounds) < 0) or np.any(starts >= ends) or (len(ends) and ends[-1] > self.length):
            raise DataError(f"{where} has spans that overlap or reach outside", fix="verify or pack again")
        return self._row(index, found, starts, ends)

    def _row(self, index: int, found: _Row, starts: np.ndarray, ends: np.ndarray) -> PackedRow:
        spans, length = found.spans, self.length
        documents = spans.documents
        if documents is None:
            # Numbers of their own: row and place, so that documents of other rows differ.
            documents = (index * length + starts) % PAD_DOCUMENT
        continued = np.zeros(len(starts), bool) if spans.continued is None else spans.continued.astype(bool)
        # Gaps before, between and behind the spans are documents of padding.
        gap_starts = np.concatenate([[0], ends])
        gap_ends = np.concatenate([starts, [length]])
        gaps = gap_ends > gap_starts
        begin = np.concatenate([starts, gap_starts[gaps]])
        order = np.argsort(begin, kind="stable")
        num_gaps = int(gaps.sum())
        try:
            sources = np.array([self._number[name] for name in spans.sources], np.uint16)
        except KeyError as error:
            raise DataError(f"row {index} of {self.path} has a source without a name", found=error) from None
        padding = np.full(num_gaps, self._number[PAD_SOURCE], np.uint16)
        all_documents = np.concatenate([documents, np.full(num_gaps, PAD_DOCUMENT)]).astype(np.uint32)[order]
        # A source called padding is padding: so it is written in the forms that have no gaps.
        all_sources = np.concatenate([sources, padding])[order]
        all_documents[all_sources == self._number[PAD_SOURCE]] = PAD_DOCUMENT
        cu_seqlens = np.append(begin[order], length).astype(np.int32)
        weights = np.ones(length, np.uint8) if found.mask is None else found.mask.astype(np.uint8)
        for number in np.flatnonzero(all_documents == PAD_DOCUMENT).tolist():
            weights[cu_seqlens[number] : cu_seqlens[number + 1]] = 0
        return PackedRow(
            input_ids=found.ids.astype(np.int64),
            cu_seqlens=cu_seqlens,
            documents=all_documents,
            sources=all_sources,
            source_names=self._names,
            continuation=np.concatenate([continued, np.zeros(num_gaps, bool)])[order],
            weights=weights,
        )

    def _read(self, index: int) -> _Row:
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        try:
            return self._files.read(file, index - int(self._first[file]))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise DataError(
                f"row {index} of {self.path} is not a packed row", found=f"{type(error).__name__}: {error}"
            ) from None

    def _scan_sources(self) -> list[str]:
        """Return the names of all sources, which only the rows of others say: one pass over the spans."""
        names: dict[str, None] = {}
        for index in range(self.num_rows):
            names.update(dict.fromkeys(self._read(index).spans.sources))
        return list(names)


class _Files(NamedTuple):
    """How the rows of a folder are stored."""

    counts: list[int]
    """Rows of each file."""
    read: Callable[[int, int], _Row]
    source_names: list[str]
    """Empty when only the rows know them."""
    fingerprint: str

    @classmethod
    def open(cls, path: Path) -> _Files:
        from longspan.data.materialize import read_rows_manifest

        ours = path / MANIFEST
        manifest = read_rows_manifest(path) if ours.is_file() else None
        names = manifest.source_names if manifest else []
        if (path / INDEX).is_file():
            return _mds_files(path, names, manifest.fingerprint if manifest else None)
        if manifest is not None:
            files = [path / str(piece["file"]) for piece in manifest.pieces]
            gone = [file.name for file in files if not file.is_file()]
            if gone:
                raise DataError(f"{path} is incomplete", found=f"no {gone[0]}", fix="write the rows again")
        else:
            files = _chunk_files(path)
        suffix = files[0].suffix if files else ""
        if suffix == ".npy":
            counts, read = _npy_files(files, names)
        elif suffix == ".parquet":
            counts, read = _parquet_files(files)
        else:
            counts, read = _jsonl_files(files)
        return cls(counts, read, names, manifest.fingerprint if manifest else _sampled(files))


def _chunk_files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path} does not exist")
    files = [path] if path.is_file() else [*sorted(path.glob("*.parquet")), *sorted(path.glob("*.jsonl"))]
    kinds = {file.suffix for file in files}
    if not files or len(kinds) > 1 or not kinds <= {".parquet", ".jsonl"}:
        raise DataError(
            f"{path} is not a store of packed rows",
            found=", ".join(sorted(kinds)) or "no MDS index, .jsonl or .parquet",
            allowed="an MDS folder with indices, or files .jsonl or .parquet with input_ids and source",
        )
    return files


def _mds_files(path: Path, names: list[str], fingerprint: str | None) -> _Files:
    folder = MDSDirectory(path)
    counts = [info.num_samples for info in folder.shards]

    def read(file: int, row: int) -> _Row:
        sample = folder.shard(file)[row]
        ids = sample["input_ids"]
        indices = np.asarray(sample["indices"] if "indices" in sample else [[0, len(ids)]])
        if indices.ndim != 2 or indices.shape[1] != 2 or ids.ndim != 1:
            raise ValueError(f"input_ids {list(ids.shape)}, indices {list(indices.shape)}")
        if names and "sources" in sample:
            sources = [names[number] for number in sample["sources"].tolist()]
        else:
            sources = [str(sample.get("domain", "."))] * len(indices)
        documents, continued = sample.get("doc_ids"), sample.get("continued")
        if not len(indices) == len(sources) == len(indices if documents is None else documents):
            raise ValueError("indices, sources and doc_ids are of different lengths")
        spans = _Spans(indices[:, 0], indices[:, 1], sources, documents, continued)
        return _Row(ids, spans, sample.get("mask"))

    files = [
        path / (info.basename if (path / info.basename).is_file() else str(info.zip_basename))
        for info in folder.shards
    ]
    return _Files(counts, read, names, fingerprint or _sampled([path / INDEX, *files]))


def _record(record: Any) -> _Row:
    """Return a row from a chunk: input_ids, source [{source, start, end}] and perhaps mask."""
    ids = np.asarray(record["input_ids"])
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (len(ids) and int(ids.min()) < 0):
        raise ValueError(f"input_ids of {ids.dtype} {list(ids.shape)}")
    spans = record.get("source")
    if spans is None:
        spans = [{"source": ".", "start": 0, "end": len(ids)}]
    found = _Spans(
        np.array([int(span["start"]) for span in spans], np.int64),
        np.array([int(span["end"]) for span in spans], np.int64),
        [str(span["source"]) for span in spans],
        None,
        None,
    )
    mask = record.get("mask")
    return _Row(ids, found, None if mask is None else np.asarray(mask, np.uint8))


def _jsonl_files(files: list[Path]) -> tuple[list[int], Callable[[int, int], _Row]]:
    maps, places = [], []
    for file in files:
        with open(file, "rb") as stream:
            size = file.stat().st_size
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        starts, at = [], 0
        while at < len(data):
            end = data.find(b"\n", at)
            end = len(data) if end < 0 else end
            if data[at:end].strip():
                starts.append((at, end))
            at = end + 1
        maps.append(data)
        places.append(starts)

    def read(file: int, row: int) -> _Row:
        low, high = places[file][row]
        return _record(json.loads(maps[file][low:high]))

    return [len(starts) for starts in places], read


def _parquet_files(files: list[Path]) -> tuple[list[int], Callable[[int, int], _Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = [pq.ParquetFile(file, memory_map=True) for file in files]
    except (pa.ArrowException, OSError) as error:
        raise DataError("a parquet file is damaged or cut off", found=str(error)) from None
    sizes = [
        [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] for file in opened
    ]

    @lru_cache(maxsize=ROW_GROUPS_CACHED)
    def group_of(file: int, group: int) -> Any:
        names = opened[file].schema_arrow.names
        columns = [name for name in ("input_ids", "source", "mask") if name in names]
        return opened[file].read_row_group(group, columns=columns)

    def read(file: int, row: int) -> _Row:
        ends = np.cumsum(sizes[file])
        group = int(np.searchsorted(ends, row, side="right"))
        try:
            table = group_of(file, group)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"damaged parquet: {error}") from None
        at = row - (int(ends[group - 1]) if group else 0)
        record = {"input_ids": table["input_ids"][at].values.to_numpy(zero_copy_only=False)}
        if "source" in table.column_names:
            record["source"] = table["source"][at].as_py()
        if "mask" in table.column_names:
            record["mask"] = table["mask"][at].values.to_numpy(zero_copy_only=False)
        return _record(record)

    return [sum(size) for size in sizes], read


def _npy_files(files: list[Path], names: list[str]) -> tuple[list[int], Callable[[int, int], _Row]]:
    from longspan.data.columns import NPY_ERRORS

    def load(path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except NPY_ERRORS as error:
            raise DataError(f"{path} cannot be read", found=str(error), fix="write the rows again") from None

    ids = [load(file) for file in files]
    parts = [file.name.removeprefix("input_ids") for file in files]
    spans = [load(file.with_name(f"spans{part}")) for file, part in zip(files, parts)]
    beside = [file.with_name(f"weights{part}") for file, part in zip(files, parts)]
    weights = [load(file) if file.is_file() else None for file in beside]
    if any(part.ndim != 2 or part.shape[1] != 6 for part in spans) or any(part.ndim != 2 for part in ids):
        raise DataError("npy rows have another shape than they were written with", fix="write the rows again")

    def read(file: int, row: int) -> _Row:
        low, high = np.searchsorted(spans[file][:, 0], [row, row + 1])
        _, starts, ends, documents, sources, continued = spans[file][low:high].T
        named = [names[number] for number in sources.tolist()]
        found = _Spans(starts, ends, named, documents, continued)
        mask = weights[file]
        return _Row(ids[file][row], found, None if mask is None else mask[row])

    return [len(part) for part in ids], read


def _sampled(files: Sequence[Path]) -> str:
    """Return 16 hex characters over name, size and 16 blocks of each file."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(os.fsencode(f"{file.name} {size}\n"))
        with open(file, "rb") as stream:
            for block in range(SAMPLE_BLOCKS):
                stream.seek(max(size - SAMPLE_BYTES, 0) * block // (SAMPLE_BLOCKS - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
