"""A token store out of folders of finished shards, which are linked and not copied."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longspan.core.errors import DataError
from longspan.core.files import atomic_dir, link_file, read_json, remove_leftovers
from longspan.data.store.directory import MDSDirectory
from longspan.data.store.document_columns import PARTS, ROW, DocumentColumns, DocumentWriter, join_columns
from longspan.data.store.mds import INDEX
from longspan.data.store.shard_files import write_index
from longspan.data.store.token_store import SHARD_BYTES, TokenizerIdentity, TokenStore, seal_store


class ShardFolder(NamedTuple):
    """An MDS directory written by `DocumentWriter`, and where its documents stand."""

    path: Path
    columns: DocumentColumns


def assemble_store(
    out: Path,
    folders: Sequence[ShardFolder],
    *,
    tokenizer: TokenizerIdentity,
    config: dict[str, Any],
    counts: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> TokenStore:
    """Make the store at `out` of the shards of `folders`, in order.

    Shards are hard links where the file system has them, else copies: no byte is written twice. Where some
    folders have masks and others do not, the others are written anew with weights of 1. Needs 46 bytes of
    memory a document, twice.

    Raises:
        DataError: something stands at `out`, or there is no document.
        RunError: the disk refuses; nothing is left at `out`.
    """
    if out.exists():
        raise DataError(f"{out} already exists", fix="choose another place or remove it first")
    if not any(len(folder.columns.rows) for folder in folders):
        raise DataError(f"no document with a token for {out}")
    remove_leftovers(out.parent, out.name)
    has_mask = any(folder.columns.has_mask for folder in folders)
    with atomic_dir(out) as aside:
        entries: list[dict[str, Any]] = []
        columns: list[DocumentColumns] = []
        first_shards: list[int] = []
        for folder in folders:
            if not len(folder.columns.rows):
                continue
            with_mask = aside / "with-mask"
            if has_mask and not folder.columns.has_mask:
                folder = _write_mask(folder, with_mask, tokenizer.vocab_size, shard_bytes)
            first_shards.append(len(entries))
            columns.append(folder.columns)
            for entry in _entries(folder.path):
                name = f"shard.{len(entries):05}.mds"
                link_file(folder.path / entry["raw_data"]["basename"], aside / name)
                entries.append({**entry, "raw_data": {**entry["raw_data"], "basename": name}})
            if with_mask.exists():
                shutil.rmtree(with_mask)
        write_index(aside, entries)
        joined = join_columns(columns, first_shards)
        seal_store(aside, joined, tokenizer=tokenizer, config=config, counts=counts)
    return TokenStore(out)


def _entries(path: Path) -> list[dict[str, Any]]:
    # Opened first, because that checks what is then taken for good.
    MDSDirectory(path)
    entries: list[dict[str, Any]] = read_json(path / INDEX)["shards"]
    return entries


def _write_mask(folder: ShardFolder, aside: Path, vocab_size: int, shard_bytes: int) -> ShardFolder:
    aside.mkdir()
    writer = DocumentWriter(aside, vocab_size=vocab_size, shard_bytes=shard_bytes)
    for row, sample in zip(folder.columns.rows, MDSDirectory(folder.path)):
        ids, mask = sample["input_ids"], np.ones(len(sample["input_ids"]), np.uint8)
        key, characters = int(row["key"]), int(row["characters"])
        writer.add(ids, source=sample["domain"], key=key, mask=mask, characters=characters)
    return ShardFolder(aside, writer.finish())


def save_rows(path: Path, columns: DocumentColumns) -> None:
    """Write the rows of `columns` as one .npy file, and their parts beside, into a folder not in place yet."""
    with open(path, "wb") as file:
        np.save(file, columns.rows, allow_pickle=False)
    if len(columns.parts):
        with open(path.with_suffix(".parts.npy"), "wb") as file:
            np.save(file, columns.parts, allow_pickle=False)


def load_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the rows and parts that `save_rows` wrote. Raises DataError when a file is damaged."""
    beside = path.with_suffix(".parts.npy")
    parts = _load_rows(beside, PARTS) if beside.is_file() else np.zeros(0, PARTS)
    return _load_rows(path, ROW), parts


def _load_rows(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    try:
        rows: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read", found=str(error), fix="remove its folder") from None
    if rows.dtype != dtype:
        raise DataError(f"{path} was written by another version", fix="remove its folder")
    return rows
