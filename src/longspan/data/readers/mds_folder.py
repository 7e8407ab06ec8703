"""MDS folders with a column of text: one shard after another, compressed ones too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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
from longspan.data.readers.fields import decode_utf8, missing_column
from longspan.data.readers.opening import DamagedFileError, is_remote
from longspan.data.store.directory import MDSDirectory
from longspan.data.store.mds import PickledColumnError, Shard, ShardInfo


def split_shards(file: InputFile, part_bytes: int) -> list[FilePart]:
    """Cut between shards."""
    if is_remote(file.path):
        return whole_file(file, part_bytes)
    return cut_between(file, [info.num_bytes for info in _directory(file.path).shards], part_bytes)


def read_mds(part: FilePart, wanted: Sequence[str] | None) -> Iterator[RawRecord]:
    """Yield the samples of some shards; the position is the number of the sample in the folder, from 1."""
    path = part.file.path
    if is_remote(path):
        raise DataError(f"{path} is a remote MDS folder", fix="get it first with `longspan data fetch`")
    directory = _directory(path)
    position = sum(info.num_samples for info in directory.shards[: part.start])
    lacking = [_columns(info, wanted)[0] for info in directory.shards]
    if lacking and all(lacking):
        if part.start == 0:
            yield RawRecord(part.file, 1, lacking[0])
        return
    for number in range(part.start, len(directory.shards) if part.stop is None else part.stop):
        missing, end = lacking[number], position + directory.shards[number].num_samples
        try:
            shard = directory.shard(number)
        except DataError as error:
            yield damaged(part.file, position + 1, error)
            position = end
            continue
        _, names = _columns(shard.info, wanted)
        for sample in range(len(shard)):
            position += 1
            if missing is None:
                yield RawRecord(part.file, position, _values(shard, sample, names))
            else:  # several writers' shards may stand in one folder
                yield RawRecord(part.file, position, MissingFieldError(missing.reason, found=missing.found))


def _directory(path: str) -> MDSDirectory:
    try:
        return MDSDirectory(path, check_sizes=False)
    except PickledColumnError:
        raise
    except DataError as error:
        raise DamagedFileError(str(error)) from None


def _columns(info: ShardInfo, wanted: Sequence[str] | None) -> tuple[MissingFieldError | None, set[str]]:
    names = [column.name for column in info.columns]
    if wanted is None:
        return None, set(names)
    # A dotted name reaches into a column of JSON.
    tops = [name if name in names else name.partition(".")[0] for name in wanted]
    return missing_column(dict.fromkeys(names), tops), set(tops)


def _values(shard: Shard, sample: int, names: set[str]) -> dict[str, Any] | SkippedRecordError:
    try:
        spans = shard.spans(sample)
    except DataError as error:
        return SkippedRecordError("broken_records", str(error))
    values: dict[str, Any] = {}
    for column in shard.info.columns:
        if column.name in names:
            data = shard.data[slice(*spans[column.name])]
            try:
                values[column.name] = (
                    decode_utf8(bytes(data)) if column.encoding == "str" else column.decode(data)
                )
            except SkippedRecordError as error:
                return error
            except DataError as error:
                return SkippedRecordError("broken_records", str(error))
    return values


MDS = Reader(read_mds, parse_values, split_shards, compressible=False)
