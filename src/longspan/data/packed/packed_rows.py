"""Stores that are packed already, read as rows for training.

    mds                   rows with `indices`: ProLong's packed data, and our own
    jsonl, parquet, arrow chunks with `input_ids` and `source` spans: the packed SlimPajama of Fu et al. 2024, and ours
    npy                   ours
    hf://org/name         a data set of the hub, read there: row groups of parquet files, or JSON lines, which are read
                          through once for their places

Such a row says which tokens belong together, and, if we wrote it, which documents they are. Tokens outside of
`indices` are padding. Documents of others get numbers of their own, and a span that starts a row of a chunked
stream may continue a document of the row before: only our own rows say so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longspan.core.errors import DataError
from longspan.core.files import hash_sample, sha256_bytes
from longspan.core.log import get_logger
from longspan.data.packed.row_files import (
    ArrowRows,
    JsonlRows,
    MdsRows,
    NpyRows,
    ParquetRows,
    RowFile,
    StoredRow,
)
from longspan.data.packed.row_index import (
    ROW_ERRORS,
    Key,
    RowIndex,
    file_key,
    keep_index,
    load_index,
    make_index,
)
from longspan.data.plans.packing import PAD_DOCUMENT
from longspan.data.readers import ReadReport, list_inputs
from longspan.data.readers.hub import SCHEME, expand_hub
from longspan.data.readers.walking import files_below
from longspan.data.rows.loader import PAD_SOURCE, PackedRow, check_row
from longspan.data.store import MDSDirectory
from longspan.data.store.mds import INDEX
from longspan.data.store.token_store import MANIFEST

SUFFIXES = (".parquet", ".jsonl", ".arrow")
_TRAIN = re.compile(r"(?:^|[/._-])train(?:[/._-]|$)")
_OTHER_SPLIT = re.compile(r"(?:^|[/._-])(?:validation|valid|val|dev|eval|test)(?:[/._-]|$)")


class PackedRows:
    """The rows of a folder or file that is packed already; takes the place of a `RowLoader`.

    Rows are read at random. Those of others are read once for what only they say (see `row_index`).

    Raises:
        DataError: nothing packed is there, or something that is not a row.
    """

    def __init__(self, path: str | Path) -> None:
        on_hub = isinstance(path, str) and path.startswith(SCHEME)
        self.path: Path | str = path if on_hub else Path(path)
        self._on_disk = _find(self.path) if isinstance(self.path, Path) else _find_on_hub(self.path)
        self._kept = None if self._on_disk.is_ours else load_index(self.path, self._on_disk.key)
        self._files = self._on_disk.open(self._kept)
        self._first = np.cumsum([0, *(file.num_rows for file in self._files)])
        if not self.num_rows:
            raise DataError(f"{self.path} holds no rows")
        first = self._read(0)
        self.length, self.has_mask = len(first.ids), first.mask is not None
        self.mask_is = self._on_disk.mask_is if self.has_mask else ""
        """What the masks are: "answers" of an assistant, as in the rows of others, or "weights" of the loss."""
        names = self._on_disk.names or self.index.names
        self.source_names = tuple(dict.fromkeys([*names, PAD_SOURCE]))
        """What the rows' source numbers stand for; the last is that of padding."""
        self._number = {name: number for number, name in enumerate(self.source_names)}

    @property
    def num_rows(self) -> int:
        """Return the number of rows."""
        return int(self._first[-1])

    @cached_property
    def longest(self) -> int:
        """Return the tokens in the longest row."""
        return self.length if self._on_disk.is_ours else int(self.index.lengths.max())

    def lengths_are(self, length: int) -> bool:
        """Whether every row has so many tokens."""
        same = self._on_disk.is_ours or bool((self.index.lengths == length).all())
        return same and self.length == length

    @property
    def fingerprint(self) -> str:
        """Return 16 hex characters: those of the plan if we wrote the rows, else over a sample of the bytes."""
        return self._on_disk.fingerprint or self.index.fingerprint

    @property
    def blocks(self) -> np.ndarray:
        """Return how many rows are read at once, block by block, int64; empty where each is read by itself."""
        return np.concatenate([np.zeros(0, np.int64), *(file.blocks for file in self._files)]).astype(
            np.int64
        )

    @cached_property
    def index(self) -> RowIndex:
        """Where the documents of all rows stand.

        Raises:
            DataError: something is not a row.
        """
        if self._kept is not None:
            return self._kept
        fingerprint = self._on_disk.fingerprint or self._on_disk.sampled()
        index = make_index(self.path, self._files, fingerprint=fingerprint)
        if not self._on_disk.is_ours:
            keep_index(self.path, self._on_disk.key, index)
        return index

    def row(self, index: int) -> PackedRow:
        """Read one row.

        Raises:
            ArgumentError: there is no such row.
            DataError: it is damaged, or of another length than the first.
        """
        row = self.row_of_any_length(index)
        if len(row.input_ids) != self.length:
            raise DataError(
                f"row {index} of {self.path} has another length",
                found=len(row.input_ids),
                allowed=self.length,
            )
        return row

    def row_of_any_length(self, index: int) -> PackedRow:
        """Read one row, as long as it is.

        Raises:
            ArgumentError: there is no such row.
            DataError: it is damaged.
        """
        found = self.stored(index)
        spans, length = found.spans, len(found.ids)
        starts, ends = spans.starts.astype(np.int64), spans.ends.astype(np.int64)
        bounds = np.stack([starts, ends], axis=1).reshape(-1)
        if np.any(np.diff(bounds) < 0) or np.any(starts >= ends) or (len(ends) and ends[-1] > length):
            raise DataError(
                f"row {index} of {self.path} has spans that overlap or reach outside",
                fix="verify or pack again",
            )
        return self._row(index, found, starts, ends)

    def stored(self, index: int) -> StoredRow:
        """Return a row as it is stored.

        Raises:
            ArgumentError: there is no such row.
            DataError: it is damaged.
        """
        check_row(index, self.num_rows)
        found = self._read(index)
        if found.mask is not None and len(found.mask) != len(found.ids):
            raise DataError(
                f"row {index} of {self.path} has a mask of another length",
                found=len(found.mask),
                allowed=len(found.ids),
            )
        return found

    def _row(self, index: int, found: StoredRow, starts: np.ndarray, ends: np.ndarray) -> PackedRow:
        spans, length = found.spans, len(found.ids)
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
            source_names=self.source_names,
            continuation=np.concatenate([continued, np.zeros(num_gaps, bool)])[order],
            weights=weights,
        )

    def _read(self, index: int) -> StoredRow:
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        try:
            return self._files[file].read(index - int(self._first[file]))
        except ROW_ERRORS as error:
            raise DataError(
                f"row {index} of {self.path} is not a packed row", found=f"{type(error).__name__}: {error}"
            ) from None


class _OnDisk(NamedTuple):
    """What holds the rows of a path."""

    key: Key
    sampled: Callable[[], str]
    """Makes a fingerprint of the bytes."""
    open: Callable[[RowIndex | None], Sequence[RowFile]]
    """Opens the files with the index that is kept of them."""
    names: list[str]
    """Of sources; empty when only the rows know them."""
    fingerprint: str | None
    is_ours: bool
    mask_is: str = "answers"


def _find(path: Path) -> _OnDisk:
    from longspan.data.packed.manifest import read_rows_manifest

    if not path.exists():
        raise DataError(f"{path} does not exist")
    manifest = read_rows_manifest(path) if (path / MANIFEST).is_file() else None
    if (path / INDEX).is_file():
        names, fingerprint = (manifest.source_names, manifest.fingerprint) if manifest else ([], None)
        found = _mds(path, names, fingerprint)
        return found if manifest is None else found._replace(mask_is=manifest.mask_is or "weights")
    if manifest is None:
        paths = _chunk_files(path)
        if paths[0].name == INDEX:
            return _mds(paths[0].parent, [], None)
        return _OnDisk(
            file_key(path, paths),
            partial(_sampled, paths),
            lambda index: _open_files(paths, [], index),
            [],
            None,
            False,
        )
    paths = [path / str(piece["file"]) for piece in manifest.pieces]
    gone = [file.name for file in paths if not file.is_file()]
    if gone:
        raise DataError(f"{path} is incomplete", found=f"no {gone[0]}", fix="write the rows again")
    names = manifest.source_names
    return _OnDisk(
        [],
        partial(_sampled, paths),
        lambda index: _open_files(paths, names, index),
        names,
        manifest.fingerprint,
        True,
        manifest.mask_is or "weights",
    )


def _find_on_hub(address: str) -> _OnDisk:
    """Return the parquet files, or files of JSON lines, that an address of the hub stands for."""
    entries = sorted(expand_hub(address, is_data=lambda path: path.endswith(SUFFIXES)))
    other = [entry.path for entry in entries if not entry.path.endswith((".parquet", ".jsonl"))]
    if other or not entries:
        raise DataError(
            f"{address} cannot be read where it is",
            found=other[0] if other else "no files",
            allowed="parquet files and JSON lines, of which parts can be read",
            fix=f"bring it here: longspan data fetch {address} --out DIR",
        )
    key: Key = [[entry.path, entry.size, 0] for entry in entries]

    paths = [entry.path for entry in entries]
    return _OnDisk(
        key,
        lambda: sha256_bytes(json.dumps(key).encode())[:16],
        lambda index: _open_files(paths, [], index),
        [],
        None,
        False,
    )


def _mds(path: Path, names: list[str], fingerprint: str | None) -> _OnDisk:
    folder = MDSDirectory(path)
    shards = [
        path / (info.basename if (path / info.basename).is_file() else str(info.zip_basename))
        for info in folder.shards
    ]

    def open_shards(_: RowIndex | None) -> Sequence[RowFile]:
        return [MdsRows(folder, shard, names) for shard in range(len(shards))]

    files = [path / INDEX, *shards]
    is_ours = fingerprint is not None
    key = [] if is_ours else file_key(path, files)
    return _OnDisk(key, partial(_sampled, files), open_shards, names, fingerprint, is_ours)


def _open_files(
    paths: Sequence[Path | str], names: Sequence[str], index: RowIndex | None
) -> Sequence[RowFile]:
    opened: list[RowFile] = []
    first = 0
    for number, path in enumerate(paths):
        suffix = os.path.splitext(path)[1]
        if suffix == ".parquet":
            opened.append(ParquetRows(path))
        elif suffix == ".arrow":
            opened.append(ArrowRows(Path(path)))
        elif suffix == ".npy":
            opened.append(NpyRows(Path(path), names))
        elif index is None:
            opened.append(JsonlRows(path))
        else:
            rows = slice(first, first + int(index.file_rows[number]))
            opened.append(JsonlRows(path, np.stack([index.line_starts[rows], index.line_ends[rows]], axis=1)))
            first = rows.stop
    return opened


def _chunk_files(path: Path) -> list[Path]:
    """Return the files of rows of a folder, at any depth: a data set of the hub, a saved one, or chunks.

    Of several splits the one called train is taken. The index of an MDS folder stands for it.
    """
    if path.is_file():
        found = [path]
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        # Which split it is, and which pieces belong to it, its own files say.
        found = [Path(file.path) for file in list_inputs([path], report=ReadReport())]
    else:
        below = [path / Path(file).relative_to(path.absolute()) for file in files_below(path)]
        found = sorted(file for file in below if file.suffix in SUFFIXES or file.name == INDEX)
        found = _train_split(path, found)
    kinds = {INDEX if file.name == INDEX else file.suffix for file in found}
    if kinds == {INDEX} and len(found) == 1:
        return found
    if not found or len(kinds) > 1 or not kinds <= set(SUFFIXES):
        folders = sorted({str(file.parent.relative_to(path)) for file in found if path.is_dir()})
        raise DataError(
            f"{path} is not a store of packed rows",
            found=", ".join(sorted(kinds)) or "no MDS index, .jsonl, .parquet or .arrow",
            allowed="an MDS folder with indices, files .jsonl or .parquet with input_ids and source, or a data set "
            "that Hugging Face `datasets` saved",
            fix=f"name one of its folders: {', '.join(folders[:5])}" if len(folders) > 1 else None,
        )
    return found


def _train_split(path: Path, files: list[Path]) -> list[Path]:
    names = {file: file.relative_to(path).as_posix() for file in files}
    if not any(_TRAIN.search(name) for name in names.values()):
        return files
    kept = [file for file in files if _TRAIN.search(names[file]) or not _OTHER_SPLIT.search(names[file])]
    if len(kept) < len(files):
        get_logger("data").info("%s: %d of %d files are read: the split train", path, len(kept), len(files))
    return kept


def _sampled(files: Sequence[Path]) -> str:
    """Return 16 hex characters over name, size and 16 blocks of each file."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(os.fsencode(f"{file.name} {size}\n"))
        with open(file, "rb") as stream:
            hash_sample(stream, size, digest)
    return digest.hexdigest()[:16]
