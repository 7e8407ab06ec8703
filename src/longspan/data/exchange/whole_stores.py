"""Whole token stores: several made one, one split by document, and token data of others taken over.

No token is decoded. Merging and taking over link the shards where the file system has hard links.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import atomic_dir, read_json, remove_leftovers, write_json
from longspan.core.progress import progress
from longspan.data.plans.mixture import MixturePlan, plan_mixture, split_place
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.store import (
    Column,
    MDSDirectory,
    TokenStore,
    TokenStoreWriter,
    open_stores,
    read_manifest,
    token_dtype,
)
from longspan.data.store.assemble import ShardFolder, assemble_store
from longspan.data.store.document_columns import PARTS, ROW, DocumentColumns, SourceNumbers, mask_digest
from longspan.data.store.lengths import LengthTable
from longspan.data.store.mds import INDEX
from longspan.data.store.shard_files import write_index
from longspan.data.store.token_store import MANIFEST, TokenizerIdentity, seal_store

NO_SOURCE = "."
"""Source of documents whose MDS has no domain column."""


@dataclass(unsafe_hash=True)
class _Identity:
    """The tokenizer of a store, as its manifest remembers it."""

    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool | None = field(default=None, compare=False)

    @classmethod
    def of(cls, store: TokenStore) -> _Identity:
        known = store.manifest.tokenizer
        return cls(*(known.get(name) for name in cls.__dataclass_fields__))  # type: ignore[arg-type]


def merge_stores(paths: Sequence[str | Path], out: str | Path) -> TokenStore:
    """Make one store of several, documents in the order of the stores.

    A document that stands in two stores stands twice in the result.

    Raises:
        DataError: the stores were made with different tokenizers, of which one may begin texts with BOS and another
            not, or something stands at `out`.
    """
    stores = open_stores(paths)
    identities = {_Identity.of(store) for store in stores}
    if len(identities) != 1:
        raise DataError(
            "the stores were made with different tokenizers",
            found=", ".join(f"{store.path} {store.manifest.tokenizer['fingerprint']}" for store in stores),
            fix="tokenize them with the same tokenizer",
        )
    (identity,) = identities
    begins = {store: store.manifest.tokenizer.get("adds_bos") for store in stores}
    identity.adds_bos = next((each for each in begins.values() if each is not None), None)
    if {True, False} <= set(begins.values()):
        raise DataError(
            "the tokenizers of the stores have the same ids, and only some begin a text with BOS",
            found=", ".join(
                f"{store.path} {'with' if each else 'without'}" for store, each in begins.items()
            ),
            fix="tokenize them with the same tokenizer; or give both to `data pack` with --specials",
        )
    config = {"merged": [store.fingerprint for store in stores], **_conversations(stores)}
    counts = {"merged_stores": len(stores)}
    plain = all(store.manifest.dtype == token_dtype(identity.vocab_size).name for store in stores)
    if plain and all(_columns(store.path) <= _own_columns(store) for store in stores):
        folders = [ShardFolder(store.path, _document_columns(store)) for store in stores]
        return assemble_store(Path(out), folders, tokenizer=identity, config=config, counts=counts)
    # Shards that others wrote have columns of their own: their documents are written anew.
    with TokenStoreWriter(out, config=config, tokenizer=identity) as writer:
        for store in stores:
            for document in range(len(store)):
                _copy(store, document, writer)
        writer.counts = counts
    return TokenStore(out)


def split_store(path: str | Path, parts: Mapping[str, float]) -> dict[str, TokenStore]:
    """Copy a store into several, split as `split_plans` splits it; `parts` are paths and shares.

    Raises:
        ArgumentError: the shares do not sum to 1.
        DataError: a part would be empty, or something stands at its path.
    """
    store = TokenStore(path)
    shares = list(parts.values())
    part_of = _parts(store.lengths, parts)
    for name in parts:
        if Path(name).exists():
            raise DataError(f"{name} already exists", fix="choose another place or remove it first")
    config = {"split_of": store.fingerprint, "shares": shares, **_conversations([store])}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                TokenStoreWriter(name, config=config | {"part": number}, tokenizer=_Identity.of(store))
            )
            for number, name in enumerate(parts)
        ]
        with progress("split", total=len(store), unit="docs") as bar:
            for document, part in enumerate(part_of.tolist()):
                _copy(store, document, writers[part])
                bar.advance()
    return {name: TokenStore(name) for name in parts}


def split_plans(lengths: LengthTable, parts: Mapping[str, float]) -> dict[str, MixturePlan]:
    """Split the documents of stores by the hashes of their keys, as one mixture plan a part; nothing is copied.

    Which part a document goes to depends on its source and text alone: stores made of more files put the
    documents they share with others into the same parts, and equal documents never stand in two parts.

    Args:
        parts: names and shares.

    Raises:
        ArgumentError: the shares do not sum to 1.
        DataError: a part would be empty.
    """
    _parts(lengths, parts)
    bounds = [0.0, *np.cumsum(list(parts.values()))[:-1].tolist(), 1.0]
    specs = [MixtureConfig(mode="none", part=(start, stop)) for start, stop in pairwise(bounds)]
    return {name: plan_mixture(spec, lengths, 0) for name, spec in zip(parts, specs)}


def split_parts(keys: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Return the part of each document, int64 [documents], from its 64-bit key alone."""
    return np.searchsorted(np.cumsum(shares)[:-1], split_place(keys), side="right")


def _parts(lengths: LengthTable, parts: Mapping[str, float]) -> np.ndarray:
    """Return the part of each document. Raises for shares that do not sum to 1, and for an empty part."""
    shares = list(parts.values())
    if not all(0 < share < math.inf for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ArgumentError("the shares of a split are above 0 and sum to 1", found=dict(parts))
    part_of = split_parts(lengths.key, shares)
    # An empty document is in no plan.
    counts = np.bincount(part_of[np.asarray(lengths.tokens) > 0], minlength=len(parts))
    empty = [name for name, count in zip(parts, counts.tolist()) if not count]
    if empty:
        raise DataError("there are too few documents for this split", found=f"none for {', '.join(empty)}")
    return part_of


def import_mds(path: str | Path, out: str | Path, tokenizer: TokenizerIdentity) -> TokenStore:
    """Make a token store of an MDS folder of `input_ids` (datatools' or ProLong's raw data); nothing is copied.

    Shards are linked under `out`, a merged index of subfolders is followed, and a length table and manifest
    are written beside them. Reads every id once: to check its range, and because keys are hashes of the ids.

    Raises:
        DataError: there is no `input_ids` column of uint16, uint32, int32 or int16, rows are packed already,
            or an id is not in the vocabulary.
    """
    path, out = Path(path), Path(out)
    if out.exists():
        raise DataError(f"{out} already exists", fix="choose another place or remove it first")
    # Read where it stands: what is wrong is named by the place that stays.
    columns, dtype = _scan(path, tokenizer.vocab_size)
    remove_leftovers(out.parent, out.name)
    with atomic_dir(out) as aside:
        _link_shards(path, aside)
        seal_store(aside, columns, tokenizer=tokenizer, config={"imported": path.name}, counts={})
        manifest = read_manifest(aside)._replace(dtype=dtype)
        write_json(aside / MANIFEST, manifest._asdict())
    return TokenStore(out)


def _link_shards(path: Path, aside: Path) -> None:
    """Link the shards of a folder, flat, and write their index; what is followed here was checked by opening it."""
    flat = []
    for number, entry in enumerate(read_json(path / INDEX)["shards"]):
        for part, suffix in (("raw_data", ""), ("zip_data", ".zip")):
            data = entry.get(part)
            if not data:
                continue
            source = path / data["basename"]
            name = f"shard.{number:05}.mds{suffix}"
            entry[part] = {**data, "basename": name}
            if source.is_file():
                os.symlink(source.resolve(), aside / name)
        flat.append(entry)
    write_index(aside, flat)


def _scan(folder: Path, vocab_size: int) -> tuple[DocumentColumns, str]:
    """Return where every document stands, and the unsigned dtype of the ids."""
    shards = MDSDirectory(folder)
    encodings = {
        column.encoding for info in shards.shards for column in info.columns if column.name == "input_ids"
    }
    names = {column.name for info in shards.shards for column in info.columns}
    dtypes = {encoding.removeprefix("ndarray:").lstrip("u") for encoding in encodings}
    if len(dtypes) != 1 or not dtypes <= {"int16", "int32"}:
        raise DataError(
            f"{folder} has no ids that a token store can hold",
            found=", ".join(sorted(encodings)) or f"columns {', '.join(sorted(names))}",
            allowed="input_ids of ndarray:uint32, ndarray:uint16, ndarray:int32 or ndarray:int16",
        )
    if "indices" in names:
        raise DataError(
            f"the rows of {folder} are packed already", fix="train on them, or convert them to another format"
        )
    has_mask = all(
        any(column.name == "mask" and column.encoding == "ndarray:uint8" for column in info.columns)
        for info in shards.shards
    )
    dtype = np.dtype(f"u{dtypes.pop()}")
    rows = np.zeros(len(shards), ROW)
    sources, document = SourceNumbers(), 0
    with progress("import", total=len(shards), unit="docs") as bar:
        for number, info in enumerate(shards.shards):
            shard = shards.shard(number)
            for sample in range(info.num_samples):
                values, spans = shard[sample], shard.spans(sample)
                ids = values["input_ids"].reshape(-1)
                if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
                    raise DataError(
                        f"document {document} of {folder} has ids that the tokenizer does not know",
                        found=f"{ids.min()}..{ids.max()}",
                        allowed=f"0..{vocab_size - 1}",
                    )
                source = str(values.get("domain", NO_SOURCE))
                row = rows[document]
                row["source"], row["shard"], row["tokens"] = sources[source], number, len(ids)
                row["offset"] = spans["input_ids"][1] - ids.nbytes
                row["key"] = token_key(source, ids)
                if has_mask:
                    row["mask_offset"] = spans["mask"][1] - len(values["mask"])
                    row["mask_digest"] = mask_digest(values["mask"])
                document += 1
                bar.advance()
    return DocumentColumns(rows, sources.names, has_mask), dtype.name


def token_key(source: str, ids: np.ndarray) -> int:
    """Return the 64-bit identity of a document whose text is not known: XXH3 of source and ids."""
    digest = xxhash.xxh3_64(source.encode() + b"\0ids")
    digest.update(np.ascontiguousarray(ids, dtype="<u4").data)
    return digest.intdigest()


def _document_columns(store: TokenStore) -> DocumentColumns:
    rows = np.zeros(len(store), ROW)
    for name in ("source", "key", "shard", "offset", "mask_offset", "tokens"):
        rows[name] = getattr(store.lengths, name)
    if store.lengths.characters is not None:
        rows["characters"] = store.lengths.characters
    if store.has_mask:
        rows["mask_digest"] = [mask_digest(store.mask(document)) for document in range(len(store))]
    parts = np.ascontiguousarray(store.part_table).view(PARTS).reshape(-1)
    return DocumentColumns(rows, store.lengths.source_names, store.has_mask, parts)


def _columns(path: Path) -> set[Column]:
    return {column for info in MDSDirectory(path).shards for column in info.columns}


def _own_columns(store: TokenStore) -> set[Column]:
    """Return the columns that our own writer gives a store like this."""
    ids = Column("input_ids", f"ndarray:{store.manifest.dtype}")
    return {Column("domain", "str"), ids, Column("length", "int"), Column("mask", "ndarray:uint8")}


def _copy(store: TokenStore, document: int, writer: TokenStoreWriter) -> None:
    mask, characters = store.mask(document), store.lengths.characters
    writer.add(
        store.tree_tokens(document),
        source=store.source(document),
        parts=store.parts(document),
        key=int(store.lengths.key[document]),
        mask=None if mask is None or bool((mask == 1).all()) else mask,
        characters=0 if characters is None else int(characters[document]),
    )


def _conversations(stores: Sequence[TokenStore]) -> dict[str, Any]:
    """Return what says that a store made of these holds conversations: their masks are answers, and no loss weights."""
    chats = [store.manifest.config.get("chat") for store in stores]
    return {"chat": chats[0]} if all(chats) else {}
