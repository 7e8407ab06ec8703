"""The token store: every document of a corpus as token ids, in a memory-mapped MDS directory.

    STORE/index.json, shard.00000.mds ...   columns domain, input_ids, length and, where used, mask
    STORE/lengths/                          the length table: where the ids of every document stand
    STORE/parts/                            where documents branch, which then are trees of answers; mostly not there
    STORE/longspan.json                     the manifest, written last: without it the store is incomplete

The store holds document text only: no BOS, EOS or padding. The mask is a loss weight for each token: 0 = not
trained, 1 = ordinary, up to 255 times.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

import longspan
from longspan.core.columns import load_columns, save_columns
from longspan.core.errors import DataError
from longspan.core.files import atomic_dir, read_json, remove_leftovers, write_json
from longspan.core.log import get_logger
from longspan.data.store.directory import MDSDirectory
from longspan.data.store.document_columns import PARTS, DocumentColumns, DocumentWriter, token_dtype
from longspan.data.store.lengths import LengthTable
from longspan.data.store.mds import INDEX, array_header

MANIFEST = "longspan.json"
LENGTHS = "lengths"
PARTS_KIND = "document-parts"
FORMAT = "longspan token store"
SCHEMA = 1
SHARD_BYTES = 1 << 26
_PARTS_COLUMNS = dict.fromkeys(PARTS.names or (), np.uint32)


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
    """fingerprint, vocab_size, bos_id, eos_id, pad_id, and adds_bos: whether it begins a text with BOS; None where that
    is not known."""
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
        self._shard_bytes = shard_bytes
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.path.exists():
            raise DataError(f"{self.path} already exists", fix="choose another place or remove it first")
        remove_leftovers(self.path.parent, self.path.name)
        self._folder = self._stack.enter_context(atomic_dir(self.path))
        self._documents = DocumentWriter(
            self._folder, vocab_size=self.tokenizer.vocab_size, shard_bytes=self._shard_bytes
        )
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Raised inside the stack, an error meets the clean-up and the translation of disk errors.
        with self._stack:
            if error is not None:
                raise error
            self._finish()

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
        """Append a document. The arrays are kept by reference until their shard is written.

        Args:
            ids: token ids [tokens], at least one, each below the vocabulary size.
            source: name of the corpus part.
            key: 64-bit identity of the document.
            mask: uint8 loss weight of each token [tokens]; None: all 1.
            characters: of its text; 0: not known.
            parts: of a document that branches, [parts, 3]: first token, the part that it branches off (its own number:
                none), position of its first token.
        """
        self._documents.add(ids, source=source, key=key, mask=mask, characters=characters, parts=parts)

    def _finish(self) -> None:
        columns = self._documents.finish()
        if not len(columns.rows):
            raise DataError(f"no document with a token for {self.path}")
        seal_store(self._folder, columns, tokenizer=self.tokenizer, config=self.config, counts=self.counts)


def seal_store(
    folder: Path,
    columns: DocumentColumns,
    *,
    tokenizer: TokenizerIdentity,
    config: dict[str, Any],
    counts: dict[str, Any],
) -> None:
    """Write length table and manifest beside finished shards: with them `folder` is a token store."""
    lengths = columns.length_table()
    lengths.save(folder / LENGTHS)
    if len(columns.parts):
        save_columns(
            folder / "parts",
            kind=PARTS_KIND,
            head={},
            columns={name: np.ascontiguousarray(columns.parts[name]) for name in _PARTS_COLUMNS},
        )
    manifest = Manifest(
        documents=len(lengths),
        tokens=lengths.total_tokens,
        dtype=token_dtype(tokenizer.vocab_size).name,
        has_mask=columns.has_mask,
        fingerprint=columns.fingerprint(),
        tokenizer={
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
            "adds_bos": getattr(tokenizer, "adds_bos", None),
        },
        config=config,
        counts=counts,
    )
    write_json(folder / MANIFEST, manifest._asdict())


def open_stores(
    paths: Iterable[str | os.PathLike[str]], opened: dict[Path, TokenStore] | None = None
) -> list[TokenStore]:
    """Open stores in the order given; says which of them are the same, by place or by content.

    Those in `opened` are not read again, and what is read goes there.
    """
    opened = {} if opened is None else opened
    stores = []
    first: dict[str, Path] = {}
    for path in map(Path, paths):
        store = opened[path] = opened.get(path) or TokenStore(path)
        if store.fingerprint in first:
            get_logger("data.store").warning(
                "%s holds the same documents as %s: each of them counts again",
                path, first[store.fingerprint],
            )  # fmt: skip
        first.setdefault(store.fingerprint, path)
        stores.append(store)
    return stores


class TokenStore:
    """Read a token store; ids come as views of the mapped shards, without a copy.

    Opening checks the manifest, the index, the file sizes and that every row of the length table lies inside
    its shard; reading a document checks the header that stands before its values. `data.verify` checks every byte.

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
        self.part_table = self._load_parts()
        """uint32 [parts, 4]: document, first token, part that it branches off, position; see `PARTS`."""

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

    @property
    def branching(self) -> NDArray[np.uint32]:
        """Documents that branch: their ids are those of several samples, whose beginnings they share."""
        return np.unique(self.part_table[:, 0])

    def parts(self, document: int) -> NDArray[np.uint32] | None:
        """Return the parts of a document that branches, [parts, 3] as `TokenStoreWriter.add` has them; None: it does
        not."""
        first, last = np.searchsorted(self.part_table[:, 0], [document, document + 1])
        return None if first == last else self.part_table[first:last, 1:]

    def tokens(self, document: int) -> NDArray[Any]:
        """Return the ids of a document [tokens], a read-only uint16 or uint32 view, perhaps unaligned.

        Raises:
            DataError: the document branches; see `tree_tokens`.
        """
        if len(self.part_table) and self.parts(document) is not None:
            raise DataError(
                f"document {document} of {self.path} branches: its ids are not one text",
                fix="tokenize without true_prefixes, or train on the store as it is",
            )
        return self.tree_tokens(document)

    def tree_tokens(self, document: int) -> NDArray[Any]:
        """Return the ids of a document, also of one that branches, whose `parts` say what follows what."""
        return self._view(document, self.lengths.offset, self._dtype)

    def mask(self, document: int) -> NDArray[np.uint8] | None:
        """Return the loss weights of a document [tokens], a read-only uint8 view; None without masks."""
        return self._view(document, self.lengths.mask_offset, np.dtype("u1")) if self.has_mask else None

    def source(self, document: int) -> str:
        """Return the source of a document."""
        return self.lengths.source_names[int(self.lengths.source[document])]

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

    def _load_parts(self) -> NDArray[np.uint32]:
        """Return [parts, 4]: document, first token, part that it branches off, position."""
        if not (self.path / "parts").is_dir():
            return np.zeros((0, 4), np.uint32)
        _, columns = load_columns(self.path / "parts", kind=PARTS_KIND, dtypes=_PARTS_COLUMNS)
        table = np.stack([columns[name] for name in _PARTS_COLUMNS], axis=1)
        inside = table[:, 0] < len(self.lengths)
        if not inside.all() or (np.diff(table[:, 0].astype(np.int64)) < 0).any():
            raise DataError(f"{self.path / 'parts'} does not fit its store", fix="make the store again")
        return table

    def _check_lengths(self) -> None:
        """Check that no row of the length table points outside its shard."""
        table, manifest = self.lengths, self.manifest
        sizes = np.array([info.num_bytes for info in self._shards.shards], np.int64)
        # Stores that others wrote may hold more columns, no domain, or ids as signed numbers.
        wanted: dict[str, tuple[str, ...]] = {
            "input_ids": (f"ndarray:{manifest.dtype}", f"ndarray:{manifest.dtype[1:]}")
        }
        if manifest.has_mask:
            wanted["mask"] = ("ndarray:uint8",)
        columns = [{column.name: column.encoding for column in info.columns} for info in self._shards.shards]
        agree = (
            all(found.get(name) in allowed for found in columns for name, allowed in wanted.items())
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
