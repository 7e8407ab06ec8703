"""Documents on their way into MDS shards, and the columns that say where each one stands.

What a token store and a piece of one have in common: shards of ids (and loss weights), and one row a document.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import DataError
from longspan.data.store.directory import MDSDirectory, MDSWriter
from longspan.data.store.lengths import LengthTable
from longspan.data.store.mds import INDEX, Column, array_header

MAX_SOURCES = 1 << 16
ROW = np.dtype(
    [
        ("key", "<u8"),
        ("offset", "<u8"),
        ("mask_offset", "<u8"),
        ("mask_digest", "<u8"),
        ("shard", "<u4"),
        ("tokens", "<u4"),
        ("characters", "<u4"),
        ("source", "<u2"),
    ]
)
"""One document: see `LengthTable`; mask_digest is BLAKE2b of the loss weights, 0 where all are 1; characters is 0
where the text is not known."""

PARTS = np.dtype([("document", "<u4"), ("start", "<u4"), ("parent", "<u4"), ("position", "<u4")])
"""A part of a document that branches: its first token there, the part that it branches off (its own number: none) and
the position of its first token. Documents in one piece have none."""

_ROW = struct.Struct("<QQQQIIIH")
_TWO_SIZES, _THREE_SIZES = struct.Struct("<2I"), struct.Struct("<3I")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of stored ids: uint16 for a vocabulary of up to 65536, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def mask_digest(mask: NDArray[Any] | None) -> int:
    """Return what a store's fingerprint holds of loss weights; 0 where all are 1."""
    if mask is None or bool((mask == 1).all()):
        return 0
    digest = hashlib.blake2b(np.ascontiguousarray(mask).data, digest_size=8).digest()
    return int.from_bytes(digest, "little")


class DocumentColumns(NamedTuple):
    """Where every document of some shards stands."""

    rows: NDArray[Any]
    """ROW [documents], in the order of the shards."""
    source_names: tuple[str, ...]
    has_mask: bool
    parts: NDArray[Any] = np.zeros(0, PARTS)
    """PARTS of all documents that branch, by document."""

    def length_table(self) -> LengthTable:
        """Return the length table of a store that holds these documents and no other."""
        columns = {
            name: np.ascontiguousarray(self.rows[name])
            for name in ("source", "key", "shard", "offset", "mask_offset", "tokens")
        }
        position = np.arange(len(self.rows), dtype=np.uint32)
        characters = np.ascontiguousarray(self.rows["characters"]) if self.rows["characters"].any() else None
        return LengthTable(
            source_names=self.source_names, position=position, characters=characters, **columns
        )

    def fingerprint(self) -> str:
        """Return SHA-256 over key, token count and mask digest of every document."""
        digest = hashlib.sha256()
        for name in ("key", "tokens", "mask_digest"):
            digest.update(np.ascontiguousarray(self.rows[name]).data)
        digest.update(self.parts.tobytes())
        return digest.hexdigest()


class SourceNumbers:
    """Sources numbered in the order they are met. Raises DataError beyond 65536 of them."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __getitem__(self, source: str) -> int:
        number = self._numbers.setdefault(source, len(self._numbers))
        if number >= MAX_SOURCES:
            raise DataError(
                "too many sources",
                found=f"more than {MAX_SOURCES}",
                fix="name a field with few distinct values as --source-field",
            )
        return number

    @property
    def names(self) -> tuple[str, ...]:
        """Sources by number."""
        return tuple(self._numbers)


class DocumentWriter:
    """Append documents to MDS shards in an existing folder; `finish` writes the index.

    Holds one shard and 46 bytes a document in memory. Samples have a mask from the first mask on: what was
    written before is then written once more, with weights of 1.
    """

    def __init__(self, folder: Path, *, vocab_size: int, shard_bytes: int) -> None:
        self.folder, self.vocab_size = folder, vocab_size
        self.dtype = token_dtype(vocab_size)
        self._shard_bytes = shard_bytes
        self._sources = SourceNumbers()
        self._count, self._parts = 0, bytearray()
        self._start(has_mask=False)

    def add(
        self,
        ids: NDArray[Any],
        *,
        source: str,
        key: int,
        mask: NDArray[Any] | None = None,
        characters: int = 0,
        parts: NDArray[Any] | None = None,
    ) -> None:
        """Append a document; see `TokenStoreWriter.add`. Raises DataError when ids or mask do not fit."""
        if (
            not len(ids)
            or int(ids.max()) >= self.vocab_size
            or (ids.dtype.kind != "u" and int(ids.min()) < 0)
        ):
            raise DataError(
                "token ids do not fit the store",
                found=f"{len(ids)} ids" + (f" in {ids.min()}..{ids.max()}" if len(ids) else ""),
                allowed=f"at least one, each in 0..{self.vocab_size - 1}",
            )
        if mask is not None and (mask.shape != ids.shape or mask.dtype != np.uint8):
            raise DataError(
                "a mask does not fit its document",
                found=f"{mask.dtype} {list(mask.shape)}",
                allowed=f"uint8 {list(ids.shape)}",
            )
        if mask is not None and not self._has_mask:
            self._rewrite_with_mask()
        if parts is not None:
            number = np.full((len(parts), 1), self._count)
            columns = np.concatenate([number, np.asarray(parts).reshape(-1, 3)], axis=1)
            self._parts += columns.astype("<u4").tobytes()
        self._count += 1
        self._append(ids.astype(self.dtype, copy=False), source, key, mask, characters)

    def finish(self) -> DocumentColumns:
        """Write the last shard and the index."""
        self._writer.finish()
        rows = np.frombuffer(self._rows, ROW)
        body_start = np.array(self._writer.body_starts or [0], np.uint64)[rows["shard"]]
        rows["offset"] += body_start
        if self._has_mask:
            rows["mask_offset"] += body_start
        parts = np.frombuffer(bytes(self._parts), PARTS)
        return DocumentColumns(rows, self._sources.names, self._has_mask, parts)

    def _start(self, *, has_mask: bool) -> None:
        self._has_mask = has_mask
        columns = [
            Column("domain", "str"),
            Column("input_ids", f"ndarray:{self.dtype.name}"),
            Column("length", "int"),
        ]
        if has_mask:
            columns.append(Column("mask", "ndarray:uint8"))
        self._writer = MDSWriter(self.folder, columns, size_limit=self._shard_bytes)
        self._rows = bytearray()

    def _append(
        self, ids: NDArray[Any], source: str, key: int, mask: NDArray[Any] | None, characters: int
    ) -> None:
        # What `mds.encode_sample` would make, without its 20 us: sizes of the columns that have none of their
        # own (domain, input_ids, mask), then domain, input_ids, length, mask.
        number, domain = self._sources[source], source.encode()
        header = array_header(ids.shape)
        values = np.ascontiguousarray(ids).view(np.uint8).data
        size = len(header) + len(values)
        length = len(ids).to_bytes(8, "little")
        parts: list[bytes | memoryview]
        if self._has_mask:
            weights = np.ones(len(ids), np.uint8) if mask is None else np.ascontiguousarray(mask)
            sizes = _THREE_SIZES.pack(len(domain), size, len(header) + len(weights))
            parts = [sizes + domain + header, values, length + header, weights.data]
        else:
            parts = [_TWO_SIZES.pack(len(domain), size) + domain + header, values, length]
        shard, start = self._writer.write_encoded(parts)
        offset = start + len(parts[0])
        mask_offset = offset + len(values) + 8 + len(header) if self._has_mask else 0
        self._rows += _ROW.pack(
            key, offset, mask_offset, mask_digest(mask), shard, len(ids), characters, number
        )

    def _rewrite_with_mask(self) -> None:
        rows = np.frombuffer(bytes(self._rows), ROW)
        self._writer.finish()
        aside = self.folder / "without-mask"
        aside.mkdir()
        for file in [INDEX, *(info.basename for info in MDSDirectory(self.folder).shards)]:
            os.replace(self.folder / file, aside / file)
        self._start(has_mask=True)
        for row, sample in zip(rows, MDSDirectory(aside)):
            self._append(sample["input_ids"], sample["domain"], int(row["key"]), None, int(row["characters"]))
        shutil.rmtree(aside)


def join_columns(parts: Sequence[DocumentColumns], first_shards: Sequence[int]) -> DocumentColumns:
    """Return the columns of all parts, in order; `first_shards[i]` is added to the shards of part i."""
    sources = SourceNumbers()
    rows = np.empty(sum(len(part.rows) for part in parts), ROW)
    branching = [part.parts.copy() for part in parts]
    start = 0
    for part, first_shard, branches in zip(parts, first_shards, branching):
        branches["document"] += np.uint32(start)
        stop = start + len(part.rows)
        rows[start:stop] = part.rows
        rows["shard"][start:stop] += np.uint32(first_shard)
        renumber = np.array([sources[name] for name in part.source_names] or [0], np.uint16)
        rows["source"][start:stop] = renumber[part.rows["source"]]
        start = stop
    has_mask = any(part.has_mask for part in parts)
    return DocumentColumns(rows, sources.names, has_mask, np.concatenate(branching))
