"""Parquet and Arrow files: only the wanted columns are read, a few megabytes of rows at a time.

Parquet is cut into parts at row groups, Arrow (the file format, and the stream format that Hugging Face
`datasets` keeps on disk) at record batches. What Arrow maps into memory is checked before it is followed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from longspan.core.errors import DataError
from longspan.data.readers.base import (
    FilePart,
    InputFile,
    MissingFieldError,
    RawRecord,
    Reader,
    SkippedRecordError,
    cut_between,
    damaged,
    parse_values,
    whole_file,
)
from longspan.data.readers.fields import lookup, missing_column
from longspan.data.readers.opening import DamagedFileError, is_remote, open_raw

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_BYTES = 8 << 20
MAX_BATCH_ROWS = 2048
ARROW_FILE_MAGIC = b"ARROW1"


@contextmanager
def _checked(path: str, kind: str) -> Iterator[None]:
    """Turn what pyarrow says about a broken file into a DamagedFileError that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, MemoryError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read {path}", found=error.strerror or str(error)) from None
        found = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DamagedFileError(
            f"{path} is a damaged or cut-off {kind} file", found=found, fix="fetch or make it again"
        ) from None


def split_row_groups(file: InputFile, part_bytes: int) -> list[FilePart]:
    """Cut between row groups; reads the file's table of contents."""
    if _is_empty(file.path):
        return whole_file(file, part_bytes)
    with _parquet(file.path) as parquet:
        metadata = parquet.metadata
        sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    parts = cut_between(file, sizes, part_bytes)
    # Decoded they are larger: the size of a part is that of its share of the file.
    if len(parts) > 1:
        parts = [part._replace(size=file.size * part.size // max(sum(sizes), 1)) for part in parts]
    return parts


def read_parquet(part: FilePart, wanted: Sequence[str] | None) -> Iterator[RawRecord]:
    """Yield the rows of some row groups; the position is the number of the row in the file, from 1."""
    path = part.file.path
    if _is_empty(path):
        return
    with _parquet(path) as parquet:
        missing, columns = _columns(parquet.schema_arrow, wanted)
        if missing is not None:
            yield from _without(part, missing)
            return
        metadata = parquet.metadata
        stop = metadata.num_row_groups if part.stop is None else part.stop
        row = sum(metadata.row_group(number).num_rows for number in range(part.start))
        for number in range(part.start, stop):
            group = metadata.row_group(number)
            size = min(MAX_BATCH_ROWS, BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1))
            end = row + group.num_rows
            try:
                with _checked(f"{path} (row {row + 1} and later)", "parquet"):
                    batches = parquet.iter_batches(max(size, 1), row_groups=[number], columns=columns)
                    for batch in batches:
                        yield from _rows(batch, part.file, row)
                        row += batch.num_rows
            except DamagedFileError as error:
                yield damaged(part.file, row + 1, error)
            row = end


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Small reads in turn: without a buffer whole column chunks would be held.
    settings = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
    with _checked(path, "parquet"):
        if is_remote(path):
            with open_raw(path) as stream, pq.ParquetFile(stream, **settings) as parquet:
                yield parquet
        else:
            # Of a name, pyarrow wants UTF-8; of bytes it takes any.
            with pa.OSFile(os.fsencode(path)) as file, pq.ParquetFile(file, **settings) as parquet:
                yield parquet


def split_batches(file: InputFile, part_bytes: int) -> list[FilePart]:
    """Cut between record batches, as many in each part; a remote file stays whole."""
    if file.size <= part_bytes or is_remote(file.path):
        return whole_file(file, part_bytes)
    count = sum(1 for _ in _batches(file.path, None))
    num_parts = max(1, min(count, -(-file.size // part_bytes)))
    borders = [count * number // num_parts for number in range(num_parts + 1)]
    if num_parts == 1:
        return whole_file(file, part_bytes)
    size = file.size // num_parts
    return [FilePart(file, start, stop, size) for start, stop in itertools.pairwise(borders)]


def read_arrow(part: FilePart, wanted: Sequence[str] | None) -> Iterator[RawRecord]:
    """Yield the rows of some record batches; the position is the number of the row in the file, from 1."""
    path, row = part.file.path, 0
    if _is_empty(path):
        return
    with _arrow_schema(path) as schema:
        missing, _ = _columns(schema, wanted)
    if missing is not None:
        yield from _without(part, missing)
        return
    number = 0
    try:
        for number, batch in enumerate(_batches(path, wanted), 1):
            if part.stop is not None and number > part.stop:
                return
            if number > part.start:
                yield from _batch_rows(batch, part.file, row)
            row += batch.num_rows
    except DamagedFileError as error:
        # Nothing behind it can be found: the part that it stands in says so.
        if number >= part.start:
            yield damaged(part.file, row + 1, error)


def _batch_rows(batch: pa.RecordBatch, file: InputFile, row: int) -> Iterator[RawRecord]:
    size = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1)))
    try:
        with _checked(f"{file.path} (row {row + 1} and later)", "arrow"):
            _check_batch(batch)
            for start in range(0, batch.num_rows, size):
                yield from _rows(batch.slice(start, size), file, row + start)
    except DamagedFileError as error:
        yield damaged(file, row + 1, error)


@contextmanager
def _arrow(path: str) -> Iterator[tuple[Any, bool, Any]]:
    """Open an Arrow file; yield it, whether it is of the file format, and what opens that format."""
    import pyarrow as pa

    with _checked(path, "arrow"):
        source = (
            pa.PythonFile(open_raw(path), mode="r") if is_remote(path) else pa.memory_map(os.fsencode(path))
        )
        with source:
            head = source.read(len(ARROW_FILE_MAGIC))
            source.seek(0)
            is_file = head == ARROW_FILE_MAGIC
            yield source, is_file, pa.ipc.open_file if is_file else pa.ipc.open_stream


@contextmanager
def _arrow_schema(path: str) -> Iterator[pa.Schema]:
    with _arrow(path) as (source, _, open_):
        yield open_(source).schema


def is_columnar(path: str, extension: str) -> bool:
    """Whether a file can be opened as parquet or Arrow at all; of a table its first bytes may be a chance."""
    try:
        with _parquet(path) if extension == ".parquet" else _arrow_schema(path):
            return True
    except DataError:
        return False


def _batches(path: str, wanted: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """Yield the record batches with only the wanted columns, mapped where the file is local."""
    import pyarrow as pa

    with _arrow(path) as (source, is_file, open_):
        schema = open_(source).schema
        _, columns = _columns(schema, wanted)
        names = {name.partition(".")[0] for name in columns} | set(columns)
        included = [number for number, name in enumerate(schema.names) if name in names]
        source.seek(0)
        reader = open_(source, options=pa.ipc.IpcReadOptions(included_fields=included))
        if is_file:
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from reader


def _check_batch(batch: pa.RecordBatch) -> None:
    """Check that every offset points into its buffer; text that is not UTF-8 is left to its row."""
    import pyarrow as pa

    for column in batch.columns:
        kind = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
        (column.view(kind) if kind is not None else column).validate(full=True)


def _columns(schema: pa.Schema, wanted: Sequence[str] | None) -> tuple[MissingFieldError | None, list[str]]:
    """Return what is missing of the wanted columns, and those to read; some may be missing."""
    if wanted is None:
        return None, list(schema.names)
    tree = _tree(schema)
    return missing_column(tree, wanted), [name for name in wanted if _has(tree, name)]


def _has(tree: dict[str, Any], name: str) -> bool:
    try:
        lookup(tree, name)
    except MissingFieldError:
        return False
    return True


def _without(part: FilePart, missing: MissingFieldError) -> Iterator[RawRecord]:
    """Yield what stands for a file without a wanted column: once, with its first part."""
    if part.start == 0:
        yield RawRecord(part.file, 1, missing)


def _tree(fields: Any) -> dict[str, Any]:
    """Return the names of columns, structs as dicts of theirs."""
    import pyarrow as pa

    return {field.name: _tree(field.type) if pa.types.is_struct(field.type) else None for field in fields}


def _is_empty(path: str) -> bool:
    return not is_remote(path) and os.path.getsize(path) == 0


def _in_lists(batch: pa.RecordBatch) -> list[str]:
    """Return the names of columns with objects inside of lists."""
    import pyarrow as pa

    def objects(kind: pa.DataType) -> bool:
        inner = [kind.field(number).type for number in range(kind.num_fields)]
        return pa.types.is_struct(kind) or any(map(objects, inner))

    fields = zip(batch.schema.names, batch.schema.types)
    return [name for name, kind in fields if kind.num_fields and objects(kind)]


def _without_nulls(value: Any, *, in_list: bool = False) -> Any:
    """Return a value whose objects in lists have only the keys with a value.

    A table gives each object in a column the keys of all: two calls of tools with different arguments would both
    have been called with both.
    """
    if isinstance(value, dict):
        return {
            key: _without_nulls(each, in_list=in_list)
            for key, each in value.items()
            if each is not None or not in_list
        }
    if isinstance(value, list):
        return [_without_nulls(each, in_list=True) for each in value]
    return value


def _rows(batch: pa.RecordBatch, file: InputFile, before: int) -> Iterator[RawRecord]:
    names = batch.schema.names
    sparse = _in_lists(batch)
    for record in _all_rows(batch, names, file, before):
        if sparse and isinstance(record.data, dict):
            record.data.update((name, _without_nulls(record.data[name])) for name in sparse)
        yield record


def _all_rows(batch: pa.RecordBatch, names: list[str], file: InputFile, before: int) -> Iterator[RawRecord]:
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except (ValueError, OverflowError):  # bytes that are not text, a date that Python has not
        for number in range(batch.num_rows):
            yield RawRecord(file, before + number + 1, _row(batch, names, number))
        return
    for number, values in enumerate(zip(*columns), before + 1):
        yield RawRecord(file, number, dict(zip(names, values)))


def _row(batch: pa.RecordBatch, names: list[str], number: int) -> dict[str, Any] | SkippedRecordError:
    try:
        return {name: column[number].as_py() for name, column in zip(names, batch.columns)}
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at {error.start} is not UTF-8"
        return SkippedRecordError("invalid_text", found)
    except (ValueError, OverflowError) as error:
        return SkippedRecordError("broken_records", f"a value that cannot be read ({error})"[:200])


PARQUET = Reader(read_parquet, parse_values, split_row_groups, compressible=False)
ARROW = Reader(read_arrow, parse_values, split_batches, compressible=False)
