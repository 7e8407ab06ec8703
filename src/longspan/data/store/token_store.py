"""The token store: every document of a corpus as token ids, in a memory-mapped MDS directory.

    STORE/index.json, shard.00000.mds ...   columns domain, input_ids, length and, where used, mask
    STORE/lengths/                          the length table: where the ids of every document stand
    STORE/longspan.json                     the manifest, written last: without it the store is incomplete

The store holds document text only: no BOS, EOS or padding. The mask is a loss weight for each token: 0 = not
trained, 1 = ordinary, up to 255 times.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from array import array
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

import longspan
from longspan.core.errors import DataError
from longspan.core.files import atomic_dir, read_json, remove_leftovers, write_json
from longspan.data.lengths import LengthTable
from longspan.data.store.directory import MDSDirectory, MDSWriter
from longspan.data.store.mds import INDEX, Column, array_header

MANIFEST = "longspan.json"
LENGTHS = "lengths"
FORMAT = "longspan token store"
SCHEMA = 1
SHARD_BYTES = 1 << 26
MAX_SOURCES = 1 << 16


class TokenizerIdentity(Protocol):
    """What a store keeps of the tokenizer that made it."""

    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


class Manifest(NamedTuple):
    """Content of `longspan.json`."""

    documents: int
    tokens: int
    dtype: str
    """"uint16" or "uint32"."""
    has_mask: bool
    fingerprint: str
    """SHA-256 over key, token count and mask digest of every document, in store order."""
    tokenizer: dict[str, Any]
    """fingerprint, vocab_size, bos_id, eos_id, pad_id."""
    config: dict[str, Any]
    """Settings and input files that made the store."""
    counts: dict[str, Any]
    """What was read and what was left out."""
    format: str = FORMAT
    schema: int = SCHEMA
    longspan: str = longspan.__version__


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a store.

    Raises:
        DataError: there is none (the store is incomplete), or it is malformed or of another version.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        what = "is not a token store" if not (folder / INDEX).exists() else "is an incomplete token store"
        raise DataError(
            f"{folder} {what}",
            found=f"no {MANIFEST}" if folder.is_dir() else "no such folder",
            fix="make the store with `longspan data tokenize`",
        )
    content = read_json(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{file} is not the manifest of a token store")
    if content.get("schema") != SCHEMA:
        raise DataError(f"{file} was written by another version", found=content.get("schema"), allowed=SCHEMA)
    types = {name: type(content.get(name)) for name in Manifest._fields}
    wanted = {
        "documents": int,
        "tokens": int,
        "has_mask": bool,
        "tokenizer": dict,
        "config": dict,
        "counts": dict,
    }
    bad = [
        name for name, kind in types.items() if kind is not wanted.get(name, int if name == "schema" else str)
    ]
    if bad or set(content) != set(Manifest._fields) or content["dtype"] not in ("uint16", "uint32"):
        raise DataError(f"{file} is malformed", found=f"bad fields {bad or sorted(content)}")
    return Manifest(**content)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of stored ids: uint16 for a vocabulary of up to 65536, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class TokenStoreWriter:
    """Write a token store; it appears at `path`, whole, when the `with` block ends without an error.

        with TokenStoreWriter("corpus.tokens", config={}, tokenizer=tokenizer) as writer:
            writer.add(ids, source="book", key=7)

    Holds one shard and about 40 bytes a document in memory.

    Raises:
        DataError: something already stands at `path`, or the store would be empty.
        RunError: the disk refuses; nothing is left at `path`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        config: dict[str, Any],
        tokenizer: TokenizerIdentity,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.path = Path(path)
        self.config, self.tokenizer = config, tokenizer
        self.counts: dict[str, Any] = {}
        """Free record of what was read and left out, kept in the manifest."""
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._shard_bytes = shard_bytes
        self._stack = ExitStack()
        self._sources: dict[str, int] = {}

    def __enter__(self) -> Self:
        if self.path.exists():
            raise DataError(f"{self.path} already exists", fix="choose another place or remove it first")
        remove_leftovers(self.path.parent, self.path.name)
        self._folder = self._stack.enter_context(atomic_dir(self.path))
        self._start(has_mask=False)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Raised inside the stack, an error meets the clean-up and the translation of disk errors.
        with self._stack:
            if error is not None:
                raise error
            self._finish()

    def add(self, ids: NDArray[Any], *, source: str, key: int, mask: NDArray[Any] | None = None) -> None:
        """Append a document. The arrays are kept by reference until their shard is written.

        Args:
            ids: token ids [tokens], at least one, each below the vocabulary size.
            source: name of the corpus part.
            key: 64-bit identity of the document.
            mask: uint8 loss weight of each token [tokens]; None: all 1.
        """
        if not len(ids) or int(ids.max()) >= self.tokenizer.vocab_size or int(ids.min()) < 0:
            raise DataError(
                "token ids do not fit the store",
                found=f"{len(ids)} ids" + (f" in {ids.min()}..{ids.max()}" if len(ids) else ""),
                allowed=f"at least one, each in 0..{self.tokenizer.vocab_size - 1}",
            )
        if mask is not None and (mask.shape != ids.shape or mask.dtype != np.uint8):
            raise DataError(
                "a mask does not fit its document",
                found=f"{mask.dtype} {list(mask.shape)}",
                allowed=f"uint8 {list(ids.shape)}",
            )
        if mask is not None and not self._has_mask:
            self._rewrite_with_mask()
        self._append(ids.astype(self.dtype, copy=False), source, key, mask)

    def _start(self, *, has_mask: bool) -> None:
        self._has_mask = has_mask
        columns = [
            Column("domain", "str"),
            Column("input_ids", f"ndarray:{self.dtype.name}"),
            Column("length", "int"),
        ]
        if has_mask:
            columns.append(Column("mask", "ndarray:uint8"))
        self._writer = MDSWriter(self._folder, columns, size_limit=self._shard_bytes)
        self._source, self._shard, self._tokens = array("H"), array("I"), array("I")
        self._key, self._offset, self._mask_offset = array("Q"), array("Q"), array("Q")
        self._mask_digest = array("Q")

    def _append(self, ids: NDArray[Any], source: str, key: int, mask: NDArray[Any] | None) -> None:
        values: dict[str, Any] = {"domain": source, "input_ids": ids, "length": len(ids)}
        if self._has_mask:
            values["mask"] = np.ones(len(ids), np.uint8) if mask is None else mask
        shard, start = self._writer.write(values)
        # In a sample: 2 or 3 sizes of 4 bytes, domain, array header, ids, 8 bytes of length, array header,
        # mask.
        header = len(array_header(ids.shape))
        offset = start + 4 * (2 + self._has_mask) + len(source.encode()) + header
        self._source.append(self._source_id(source))
        self._key.append(key)
        self._shard.append(shard)
        self._tokens.append(len(ids))
        self._offset.append(offset)
        self._mask_offset.append(offset + ids.nbytes + 8 + header if self._has_mask else 0)
        digest = b"" if mask is None else hashlib.blake2b(mask.tobytes(), digest_size=8).digest()
        self._mask_digest.append(int.from_bytes(digest, "little"))

    def _source_id(self, source: str) -> int:
        number = self._sources.setdefault(source, len(self._sources))
        if number >= MAX_SOURCES:
            raise DataError(
                "too many sources",
                found=f"more than {MAX_SOURCES}",
                fix="name a field with few distinct values as --source-field",
            )
        return number

    def _rewrite_with_mask(self) -> None:
        """Write the documents so far once more, with a mask of ones: all shards have the same columns."""
        keys = self._key
        self._writer.finish()
        aside = self._folder / "without-mask"
        aside.mkdir()
        for file in [INDEX, *(info.basename for info in MDSDirectory(self._folder).shards)]:
            os.replace(self._folder / file, aside / file)
        self._start(has_mask=True)
        for key, sample in zip(keys, MDSDirectory(aside)):
            self._append(sample["input_ids"], sample["domain"], key, None)
        shutil.rmtree(aside)

    def _finish(self) -> None:
        if not self._tokens:
            raise DataError(f"no document with a token for {self.path}")
        self._writer.finish()
        shard = np.array(self._shard, np.uint32)
        body_start = np.array(self._writer.body_starts, np.uint64)[shard]
        mask_offset = np.array(self._mask_offset, np.uint64)
        lengths = LengthTable(
            source=np.array(self._source, np.uint16),
            source_names=tuple(self._sources),
            key=np.array(self._key, np.uint64),
            shard=shard,
            offset=np.array(self._offset, np.uint64) + body_start,
            mask_offset=mask_offset + body_start if self._has_mask else mask_offset,
            tokens=np.array(self._tokens, np.uint32),
            position=np.arange(len(shard), dtype=np.uint32),
        )
        lengths.save(self._folder / LENGTHS)
        digest = hashlib.sha256()
        for column in (lengths.key, lengths.tokens, np.array(self._mask_digest, np.uint64)):
            digest.update(column.data)
        tokenizer = self.tokenizer
        manifest = Manifest(
            documents=len(lengths),
            tokens=lengths.total_tokens,
            dtype=self.dtype.name,
            has_mask=self._has_mask,
            fingerprint=digest.hexdigest(),
            tokenizer={
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "bos_id": tokenizer.bos_id,
                "eos_id": tokenizer.eos_id,
                "pad_id": tokenizer.pad_id,
            },
            config=self.config,
            counts=self.counts,
        )
        write_json(self._folder / MANIFEST, manifest._asdict())


class TokenStore:
    """Read a token store; ids come as views of the mapped shards, without a copy.

    Opening checks the manifest, the index, the file sizes and that every row of the length table lies inside
    its shard; reading a document checks the header that stands before its values. `verify` checks every byte.

    Raises:
        DataError: anything is missing, cut off, malformed, or contradicts the rest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._shards = MDSDirectory(self.path)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self.lengths = LengthTable.load(self.path / LENGTHS)
        """The length table: one row per document, `position` = document index."""
        self._check_lengths()

    def __len__(self) -> int:
        return self.manifest.documents

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content: keys, token counts and masks in store order."""
        return self.manifest.fingerprint

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return self.manifest.tokens

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the tokenizer that made the store."""
        return int(self.manifest.tokenizer["vocab_size"])

    @property
    def has_mask(self) -> bool:
        """Whether documents carry a loss weight for each token."""
        return self.manifest.has_mask

    def tokens(self, document: int) -> NDArray[Any]:
        """Return the ids of a document [tokens], a read-only uint16 or uint32 view, perhaps unaligned."""
        return self._view(document, self.lengths.offset, self._dtype)

    def mask(self, document: int) -> NDArray[np.uint8] | None:
        """Return the loss weights of a document [tokens], a read-only uint8 view; None without masks."""
        return self._view(document, self.lengths.mask_offset, np.dtype("u1")) if self.has_mask else None

    def source(self, document: int) -> str:
        """Return the source of a document."""
        return self.lengths.source_names[int(self.lengths.source[document])]

    def verify(self) -> None:
        """Check every byte: hashes, every sample, and that the length table and manifest say what is there.

        Raises:
            DataError: naming what differs.
        """
        self._shards.verify()
        for document, sample in enumerate(self._shards):
            ids, mask = self.tokens(document), self.mask(document)
            if (
                sample["domain"] != self.source(document)
                or sample["length"] != len(ids)
                or not np.array_equal(sample["input_ids"], ids)
                or not (mask is None or np.array_equal(sample["mask"], mask))
                or int(ids.max()) >= self.vocab_size
            ):
                raise DataError(f"{self.path}: document {document} is not what its length table says")

    def _view(self, document: int, offsets: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        start, count = int(offsets[document]), int(self.lengths.tokens[document])
        shard = self._shards.shard(int(self.lengths.shard[document]))
        header = array_header((count,))
        if shard.data[start - len(header) : start] != header:
            raise DataError(
                f"{shard.where}: document {document} does not stand where the length table says",
                fix="copy or make the store again",
            )
        return np.frombuffer(shard.data, dtype, count=count, offset=start)

    def _check_lengths(self) -> None:
        """Check that no row of the length table points outside its shard."""
        table, manifest = self.lengths, self.manifest
        sizes = np.array([info.num_bytes for info in self._shards.shards], np.int64)
        columns = {column for info in self._shards.shards for column in info.columns}
        wanted = {
            Column("domain", "str"),
            Column("input_ids", f"ndarray:{manifest.dtype}"),
            Column("length", "int"),
        }
        if manifest.has_mask:
            wanted.add(Column("mask", "ndarray:uint8"))
        agree = (
            columns == wanted
            and len(table) == len(self._shards) == manifest.documents > 0
            and table.total_tokens == manifest.tokens
            and int(table.shard.max()) < len(sizes)
            and int(table.tokens.min()) > 0
            and isinstance(manifest.tokenizer.get("vocab_size"), int)
            and np.array_equal(table.position, np.arange(len(table), dtype=np.uint32))
        )
        if agree:
            limit = sizes[table.shard]
            agree = _inside(table.offset, table.tokens, self._dtype.itemsize, limit)
            agree = agree and (not manifest.has_mask or _inside(table.mask_offset, table.tokens, 1, limit))
        if not agree:
            raise DataError(
                f"{self.path} contradicts itself: manifest, shards and length table do not fit together",
                fix="make the store again",
            )


def _inside(offset: NDArray[Any], count: NDArray[Any], width: int, limit: NDArray[Any]) -> bool:
    # Shards are below 4 GiB: a larger offset is wrong, and is cut before the sum could overflow.
    start = np.minimum(offset, np.uint64(1 << 32)).astype(np.int64)
    return bool(np.all((start >= 8) & (start + count.astype(np.int64) * width <= limit)))
