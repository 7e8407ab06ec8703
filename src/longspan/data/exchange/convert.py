"""From one form of data to another: rows, documents, and token data of others.

pack plan, packed rows        -> mds, jsonl, parquet, npy     rows: `materialize`
token store                   -> jsonl, parquet, columns      documents, in store order
token store                   -> npy                          documents as CEPE's token files, one for each source
MDS of ids, documents, rows,  -> store                        a token store: `import_tokens`
CEPE, datatrove, Megatron
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longspan.core.columns import folder_kind
from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import atomic_dir, atomic_write, write_json
from longspan.core.progress import progress
from longspan.data.exchange.cepe import write_cepe
from longspan.data.exchange.import_tokens import NPY_NAMES, import_tokens
from longspan.data.exchange.token_documents import Specials, StoreDocuments
from longspan.data.packed.manifest import is_token_store
from longspan.data.packed.materialize import materialize
from longspan.data.packed.row_formats import FORMATS
from longspan.data.plans import packing
from longspan.data.store import TokenStore
from longspan.data.store.token_store import TokenizerIdentity

DOCUMENT_FORMATS = ("jsonl", "parquet", "columns", "npy")
PARQUET_DOCUMENTS = 1024


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format: str,
    tokenizer: TokenizerIdentity | None = None,
    specials: Specials | None = None,
    num_workers: int = 1,
) -> str:
    """Write `source` to `out` in another format; return what was written: "rows", "documents" or "store".

    Args:
        source: a pack plan, packed rows, a token store, or for "store" what `import_tokens` reads.
        out: place to write; nothing may stand there.
        format: "mds", "jsonl", "parquet", "npy", "columns" or "store".
        tokenizer: that of the ids, for "store".
        specials: what frames each document of a store in "npy"; None: BOS and EOS, as CEPE has them.
        num_workers: processes, for rows.

    Raises:
        ArgumentError: this source cannot become this format.
        DataError: the source is damaged, or something stands at `out`.
    """
    source, out = Path(source), Path(out)
    if specials is not None and (format != "npy" or not is_token_store(source)):
        raise ArgumentError("specials frame the documents of a token store that is written as npy")
    if format == "store":
        if tokenizer is None:
            raise ArgumentError("a token store names its tokenizer", fix="give the tokenizer of the ids")
        import_tokens(source, out, tokenizer)
        return "store"
    if is_token_store(source):
        if format not in DOCUMENT_FORMATS:
            raise ArgumentError(
                f"a token store is an MDS folder already, and cannot become {format}",
                allowed=DOCUMENT_FORMATS,
            )
        if format == "npy":
            write_cepe_files(source, out, specials=specials or "both")
        else:
            write_documents(TokenStore(source), out, format=format)
        return "documents"
    if folder_kind(source) not in (None, packing.KIND):
        raise ArgumentError(f"{source} holds no rows", found=folder_kind(source), fix="pack it first")
    if format not in FORMATS:
        raise ArgumentError("there is no such format", found=format, allowed=[*FORMATS, "store"])
    materialize(source, out, format=format, num_workers=num_workers)
    return "rows"


def write_documents(store: TokenStore, out: Path, *, format: str) -> None:
    """Write the documents of a store: one file for jsonl and parquet, a folder for columns.

    jsonl, parquet: input_ids, length, domain, key (16 hex characters) and, where the store has masks, mask.
    columns: tokens [tokens], offsets [documents + 1], keys, sources, weights; sources' names: `names.json`.
    """
    if out.exists():
        raise DataError(f"{out} already exists", fix="choose another place or remove it first")
    with progress(f"write {format}", total=len(store), unit="docs") as bar:
        if format == "columns":
            _write_columns(store, out)
            return
        with atomic_write(out) as file:
            if format == "jsonl":
                for record in _records(store):
                    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                    bar.advance()
            else:
                _write_parquet(store, file)


def write_cepe_files(source: Path, out: Path, *, specials: Specials) -> None:
    """Write the documents of a store as CEPE's token files, OUT/SOURCE/SOURCE.npy, each framed by `specials`.

    Raises:
        ArgumentError: the documents have loss weights, which such files do not hold, or a source's name is no name
            of a folder.
        DataError: something stands at `out`.
    """
    if out.exists():
        raise DataError(f"{out} already exists", fix="choose another place or remove it first")
    if TokenStore(source).has_mask:
        raise ArgumentError(
            f"{source} has loss weights, and CEPE's files hold none", allowed="jsonl, parquet, columns"
        )
    documents = StoreDocuments([source], specials=specials)
    wrong = [name for name in documents.domains if "/" in name or name.startswith(".") or not name]
    if wrong:
        raise ArgumentError(
            "each source becomes a folder, and this is not a valid name of one", found=repr(wrong[0])
        )
    with atomic_dir(out) as folder, progress("write npy", total=len(documents.tokens), unit="docs") as bar:

        def ids_of(members: np.ndarray) -> Iterator[np.ndarray]:
            for number in members.tolist():
                yield documents.ids(number)
                bar.advance()

        for domain, name in enumerate(documents.domains):
            members = np.flatnonzero(documents.domain == domain)
            (folder / name).mkdir()
            write_cepe(folder / name / f"{name}.npy", documents.tokens[members].tolist(), ids_of(members))


def _records(store: TokenStore) -> Iterator[dict[str, Any]]:
    for document in range(len(store)):
        ids, mask = store.tokens(document), store.mask(document)
        record = {
            "input_ids": ids.tolist(),
            "length": len(ids),
            "domain": store.source(document),
            "key": f"{int(store.lengths.key[document]):016x}",
        }
        yield record if mask is None else record | {"mask": mask.tolist()}


def _write_parquet(store: TokenStore, file: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [
        ("input_ids", pa.list_(pa.uint32())),
        ("length", pa.int64()),
        ("domain", pa.string()),
        ("key", pa.string()),
    ]
    if store.has_mask:
        fields.append(("mask", pa.list_(pa.uint8())))
    schema = pa.schema(fields)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for first in range(0, len(store), PARQUET_DOCUMENTS):
            documents = range(first, min(first + PARQUET_DOCUMENTS, len(store)))
            columns = [
                pa.array([store.tokens(d).astype(np.uint32) for d in documents], schema.field(0).type),
                pa.array([int(store.lengths.tokens[d]) for d in documents], pa.int64()),
                pa.array([store.source(d) for d in documents]),
                pa.array([f"{int(store.lengths.key[d]):016x}" for d in documents]),
            ]
            if store.has_mask:
                columns.append(pa.array([store.mask(d) for d in documents], schema.field(4).type))
            writer.write_table(pa.table(columns, schema=schema))


def _write_columns(store: TokenStore, out: Path) -> None:
    lengths = store.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths.tokens, dtype=np.int64)])
    with atomic_dir(out) as folder:
        dtype = np.dtype(store.manifest.dtype)
        tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", dtype, (int(offsets[-1]),))
        for document in range(len(store)):
            tokens[offsets[document] : offsets[document + 1]] = store.tokens(document)
        tokens.flush()
        columns = {"offsets": offsets, "keys": lengths.key, "sources": lengths.source}
        if store.has_mask:
            columns["weights"] = np.concatenate([store.mask(document) for document in range(len(store))])
        for name, column in columns.items():
            np.save(folder / f"{name}.npy", np.asarray(column), allow_pickle=False)
        write_json(folder / NPY_NAMES, list(lengths.source_names))
