"""Files of packed rows as other tools leave them, and ours: how a row is read, and where its documents stand.

    mds       a folder with an index, rows with `indices`
    jsonl     chunks with `input_ids` and `source` spans
    parquet   the same columns; a data set of the hub has them under `data/`
    arrow     the same, as Hugging Face `datasets` saves them to disk
    npy       ours

`row_table` says where all documents of a file stand without decoding its ids, as far as the format allows.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longspan.core.columns import NPY_ERRORS
from longspan.core.errors import DataError
from longspan.data.readers.opening import open_raw, remote_filesystem
from longspan.data.store import MDSDirectory

HELD_BYTES = 2 << 30
"""Decoded row groups of a parquet file that are kept in memory."""
MAX_HELD_GROUPS = 8
_ID_LIST = re.compile(rb'"(input_ids|labels|mask|attention_mask|token_type_ids)"\s*:\s*\[')


class Spans(NamedTuple):
    """The documents of a row; None where the file does not say."""

    starts: np.ndarray
    ends: np.ndarray
    sources: Sequence[str]
    documents: np.ndarray | None = None
    continued: np.ndarray | None = None


class StoredRow(NamedTuple):
    """A row as a file holds it."""

    ids: np.ndarray
    spans: Spans
    mask: np.ndarray | None


class RowTable(NamedTuple):
    """Where the documents of some rows stand."""

    lengths: np.ndarray
    """int64 [rows] tokens of each row."""
    counts: np.ndarray
    """int64 [rows] documents of each row."""
    starts: np.ndarray
    """int64 [documents] first token, counted in the row."""
    ends: np.ndarray
    """int64 [documents]."""
    sources: np.ndarray
    """int64 [documents] index into `names`."""
    names: list[str]


class RowFile:
    """The rows of one file, or of one MDS shard."""

    num_rows: int
    blocks: Sequence[int] = ()
    """How many rows are read at once, block by block; empty where a row is read by itself."""

    def read(self, row: int, /) -> StoredRow:
        """Read a row. Raises ValueError, KeyError, TypeError or IndexError if it is not one."""
        raise NotImplementedError

    def table(self) -> RowTable | None:
        """Return where the documents stand, if that is known without reading all rows."""
        return None


def row_table(file: RowFile) -> RowTable:
    """Return where the documents of a file stand.

    Raises:
        ValueError, KeyError, TypeError, IndexError: a row is not one.
    """
    table = file.table()
    if table is not None:
        return table
    names: dict[str, int] = {}
    rows: list[tuple[int, Spans]] = []
    for number in range(file.num_rows):
        found = file.read(number)
        rows.append((len(found.ids), found.spans))
    return _table(rows, names)


def _table(rows: Sequence[tuple[int, Spans]], names: dict[str, int]) -> RowTable:
    nothing = np.zeros(0, np.int64)
    sources = [names.setdefault(name, len(names)) for _, spans in rows for name in spans.sources]
    return RowTable(
        np.array([length for length, _ in rows], np.int64),
        np.array([len(spans.starts) for _, spans in rows], np.int64),
        np.concatenate([nothing, *(spans.starts for _, spans in rows)]).astype(np.int64),
        np.concatenate([nothing, *(spans.ends for _, spans in rows)]).astype(np.int64),
        np.array(sources, np.int64),
        list(names),
    )


class MdsRows(RowFile):
    """The rows of one shard of an MDS folder; `names` are those of its source numbers, if we wrote it."""

    def __init__(self, folder: MDSDirectory, shard: int, names: Sequence[str]) -> None:
        self._folder, self._shard, self._names = folder, shard, names
        self.num_rows = folder.shards[shard].num_samples

    def read(self, row: int, /) -> StoredRow:
        """See `RowFile`."""
        sample, names = self._folder.shard(self._shard)[row], self._names
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
        return StoredRow(
            ids, Spans(indices[:, 0], indices[:, 1], sources, documents, continued), sample.get("mask")
        )


class JsonlRows(RowFile):
    """The rows of a file of JSON lines, here or (an address) elsewhere.

    `places` int64 [rows, 2] are the lines, for which the file is else read through.
    """

    def __init__(self, path: Path | str, places: np.ndarray | None = None) -> None:
        self._path = path
        if places is not None:
            self.places = places

    @cached_property
    def _read_bytes(self) -> Callable[[int, int], bytes]:
        """Return what reads from one place to another, wherever another reader may be."""
        if isinstance(self._path, str):
            filesystem, inside = remote_filesystem(self._path)
            return lambda low, high: filesystem.cat_file(inside, start=low, end=high)
        with open(self._path, "rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return lambda low, high: data[low:high]

    def _lines(self) -> Iterator[bytes]:
        """Yield every line that is not empty, and remember where they are."""
        found, at = [], 0
        with open_raw(os.fspath(self._path)) as stream:
            for line in stream:
                end = at + len(line)
                if not line.isspace():
                    found.append((at, end))
                    yield line
                at = end
        self.places = np.array(found, np.int64).reshape(-1, 2)

    @cached_property
    def places(self) -> np.ndarray:
        """Where each line starts and ends; empty lines are none."""
        for _ in self._lines():
            pass
        found: np.ndarray = self.__dict__["places"]
        return found

    @property
    def num_rows(self) -> int:  # type: ignore[override]
        """See `RowFile`."""
        return len(self.places)

    def read(self, row: int, /) -> StoredRow:
        """See `RowFile`."""
        return read_record(json.loads(self._read_bytes(*self.places[row].tolist())))

    def table(self) -> RowTable | None:
        """See `RowFile`: lists of ids are counted, not parsed."""
        rows = []
        for data in self._lines():
            try:
                line, length = _without_ids(data)
                rows.append((length, _spans_of(json.loads(line), length)))
            except (KeyError, TypeError, ValueError, AttributeError):
                # Whatever is unusual about it, reading it as a whole says what.
                found = read_record(json.loads(data))
                rows.append((len(found.ids), found.spans))
        return _table(rows, {})


def _without_ids(line: bytes) -> tuple[bytes, int]:
    """Return a line of JSON with its lists of ids empty, and how many `input_ids` there were.

    Raises:
        KeyError: there are none.
        ValueError: a list holds something else than numbers.
    """
    parts, at, counts = [], 0, {}
    while found := _ID_LIST.search(line, at):
        start = found.end()
        end = line.find(b"]", start)
        if end < 0 or line.find(b"[", start, end) >= 0 or line.find(b'"', start, end) >= 0:
            raise ValueError("a list of other lists or of text")
        # Views: copies of rows of a megabyte are what this would spend its time on.
        commas = np.count_nonzero(np.frombuffer(line, np.uint8, end - start, start) == ord(","))
        is_empty = not line[start : min(end, start + 64)].strip()
        counts[found.group(1)] = 0 if is_empty else int(commas) + 1
        parts.append(line[at:start])
        at = end
    return b"".join([*parts, line[at:]]), counts[b"input_ids"]


def read_record(record: Any) -> StoredRow:
    """Return a row from a chunk: input_ids, source [{source, start, end}] and perhaps mask."""
    ids = np.asarray(record["input_ids"])
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (len(ids) and int(ids.min()) < 0):
        raise ValueError(f"input_ids of {ids.dtype} {list(ids.shape)}")
    mask = record.get("mask")
    return StoredRow(ids, _spans_of(record, len(ids)), None if mask is None else np.asarray(mask, np.uint8))


def _spans_of(record: Any, length: int) -> Spans:
    """Return the spans of a chunk: a list of {source, start, end}, or such lists under these names."""
    spans = record.get("source")
    if spans is None:
        spans = [{"source": ".", "start": 0, "end": length}]
    if isinstance(spans, dict):
        starts, ends, sources = spans["start"], spans["end"], spans["source"]
        if not len(starts) == len(ends) == len(sources):
            raise ValueError("the lists of source are of different lengths")
    else:
        starts, ends, sources = ([span[name] for span in spans] for name in ("start", "end", "source"))
    return Spans(
        np.array([int(start) for start in starts], np.int64),
        np.array([int(end) for end in ends], np.int64),
        [str(source) for source in sources],
    )


@contextmanager
def _damage(path: Path | str, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        found = str(error).splitlines()[0][:200]
        raise DataError(f"{path} is damaged or cut off as a {kind} file", found=found) from None


def _arrow_row(table: Any, row: int) -> StoredRow:
    """Return a row of a pyarrow table."""
    record = {"input_ids": table["input_ids"][row].values.to_numpy(zero_copy_only=False)}
    if "source" in table.column_names:
        record["source"] = table["source"][row].as_py()
    if "mask" in table.column_names:
        record["mask"] = table["mask"][row].values.to_numpy(zero_copy_only=False)
    return read_record(record)


def _arrow_table(lengths: np.ndarray, source: Any) -> RowTable | None:
    """Return where documents stand by a column of spans (None: each row is one); None if it is of another form."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if source is None:
        ones = np.ones(len(lengths), np.int64)
        return RowTable(lengths, ones, 0 * ones, lengths, 0 * ones, ["."])
    column = pa.concat_arrays(source.chunks) if source.num_chunks else pa.array([], source.type)
    try:
        if pa.types.is_struct(column.type):
            parts = [pc.struct_field(column, name) for name in ("start", "end", "source")]
            counts = pc.list_value_length(parts[0])
            starts, ends, names = map(pc.list_flatten, parts)
        else:
            counts = pc.list_value_length(column)
            flat = pc.list_flatten(column)
            starts, ends, names = (pc.struct_field(flat, name) for name in ("start", "end", "source"))
        if (
            column.null_count
            or not pa.types.is_integer(starts.type)
            or not len(starts) == len(ends) == len(names)
        ):
            return None
        encoded = names.cast(pa.string()).dictionary_encode()
    except (pa.ArrowException, KeyError):
        return None
    if any(each.null_count for each in (counts, starts, ends, encoded)):
        return None

    def numbers(values: Any) -> np.ndarray:
        return values.to_numpy(zero_copy_only=False).astype(np.int64)

    return RowTable(
        lengths,
        numbers(counts),
        numbers(starts),
        numbers(ends),
        numbers(encoded.indices),
        encoded.dictionary.to_pylist(),
    )


class ParquetRows(RowFile):
    """The rows of a parquet file, here or (an address) elsewhere; a row group is decoded as a whole, and the last ones
    are kept."""

    def __init__(self, path: Path | str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = path
        with _damage(path, "parquet"):
            source = open_raw(path) if isinstance(path, str) else pa.memory_map(os.fsencode(path))
            self._file = pq.ParquetFile(source)
        names = self._file.schema_arrow.names
        self._columns = [name for name in ("input_ids", "source", "mask") if name in names]
        groups = [self._file.metadata.row_group(number) for number in range(self._file.num_row_groups)]
        self._ends = np.cumsum([0, *(group.num_rows for group in groups)])
        self.num_rows = int(self._ends[-1])
        self.blocks = [group.num_rows for group in groups]
        largest = max((group.total_byte_size for group in groups), default=1)
        held = max(1, min(MAX_HELD_GROUPS, HELD_BYTES // max(largest, 1)))
        self._group = lru_cache(maxsize=held)(self._read_group)

    def read(self, row: int, /) -> StoredRow:
        """See `RowFile`."""
        group = int(np.searchsorted(self._ends, row, side="right")) - 1
        return _arrow_row(self._group(group), row - int(self._ends[group]))

    def table(self) -> RowTable | None:
        """See `RowFile`: the numbers of values in each row group tell the lengths, if all rows are as long."""
        if "input_ids" not in self._columns or not self.num_rows:
            return None
        with _damage(self._path, "parquet"):
            batch = next(self._file.iter_batches(1, columns=["input_ids"]))
            length = len(batch.column(0)[0].values)
            if any(self._num_values(group) != length * rows for group, rows in enumerate(self.blocks)):
                return None
            source = self._file.read(columns=["source"])["source"] if "source" in self._columns else None
        return _arrow_table(np.full(self.num_rows, length, np.int64), source)

    def _num_values(self, group: int) -> int:
        metadata = self._file.metadata.row_group(group)
        columns = (metadata.column(number) for number in range(metadata.num_columns))
        return sum(column.num_values for column in columns if column.path_in_schema.startswith("input_ids"))

    def _read_group(self, group: int) -> Any:
        with _damage(self._path, "parquet"):
            return self._file.read_row_group(group, columns=self._columns)


class ArrowRows(RowFile):
    """The rows of a file that Hugging Face `datasets` saved, mapped into memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        with _damage(path, "arrow"):
            source = pa.memory_map(os.fsencode(path))
            try:
                self._table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                self._table = pa.ipc.open_file(source).read_all()
        self.num_rows = int(self._table.num_rows)

    def read(self, row: int, /) -> StoredRow:
        """See `RowFile`."""
        return _arrow_row(self._table, row)

    def table(self) -> RowTable | None:
        """See `RowFile`."""
        import pyarrow.compute as pc

        names = self._table.column_names
        if "input_ids" not in names:
            return None
        lengths = pc.list_value_length(self._table["input_ids"])
        if lengths.null_count:
            return None
        source = self._table["source"] if "source" in names else None
        return _arrow_table(lengths.to_numpy().astype(np.int64), source)


class NpyRows(RowFile):
    """The rows of one piece that we wrote as npy."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._names = names
        part = path.name.removeprefix("input_ids")
        self._ids, self._spans = _load(path), _load(path.with_name(f"spans{part}"))
        weights = path.with_name(f"weights{part}")
        self._weights = _load(weights) if weights.is_file() else None
        if self._spans.ndim != 2 or self._spans.shape[1] != 6 or self._ids.ndim != 2:
            raise DataError(
                "npy rows have another shape than they were written with", fix="write the rows again"
            )
        self.num_rows = len(self._ids)

    def read(self, row: int, /) -> StoredRow:
        """See `RowFile`."""
        low, high = np.searchsorted(self._spans[:, 0], [row, row + 1])
        _, starts, ends, documents, sources, continued = self._spans[low:high].T
        named = [self._names[number] for number in sources.tolist()]
        mask = None if self._weights is None else self._weights[row]
        return StoredRow(self._ids[row], Spans(starts, ends, named, documents, continued), mask)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_ERRORS as error:
        raise DataError(f"{path} cannot be read", found=str(error), fix="write the rows again") from None
