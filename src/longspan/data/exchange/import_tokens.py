"""Token documents and packed rows of other tools, and documents that we wrote, back into a token store.

    our documents        .jsonl, .parquet, or a folder of .npy columns: taken over with their keys
    CEPE                 .npy files [n] [lengths] [tokens]
    MDS                  columns input_ids or tokens; linked where a store can hold them as they are
    datatrove            .ds files with .ds.index
    Megatron             .bin files with .idx
    packed rows          MDS with `indices`, jsonl, parquet and arrow chunks with `source`, our npy rows

A store holds no BOS and no EOS: a document of other tools that begins with the BOS of its tokenizer, or ends with
its EOS, loses it, and the manifest says how many did. Rows give one document for each span: what a row's end cut
stays cut, for rows do not say which pieces belong together, and padding is left out.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.columns import NPY_ERRORS
from longspan.core.errors import DataError
from longspan.core.files import read_json
from longspan.core.progress import progress
from longspan.data.exchange.cepe import read_cepe
from longspan.data.exchange.token_documents import find_token_files
from longspan.data.exchange.token_files import TokenFile, read_datatrove, read_megatron
from longspan.data.exchange.whole_stores import NO_SOURCE, import_mds, token_key
from longspan.data.packed.packed_rows import SUFFIXES, PackedRows
from longspan.data.packed.recut import RowDocuments
from longspan.data.store import MDSDirectory, TokenStore, TokenStoreWriter
from longspan.data.store.mds import INDEX
from longspan.data.store.token_store import MANIFEST, TokenizerIdentity

NPY_NAMES = "names.json"
IDS_COLUMNS = ("input_ids", "tokens")
COPIED_ENCODINGS = tuple(
    f"ndarray:{dtype}" for dtype in ("uint16", "int16", "uint32", "int32", "uint64", "int64")
)
COPIED_ENCODINGS += ("ndarray", "bytes")
BYTES_DTYPE = np.dtype("<i8")
"""What LLM Foundry and others put into a column of bytes."""


class TokenDocument(NamedTuple):
    """One document on its way into a store."""

    ids: NDArray[Any]
    source: str
    key: int | None = None
    """None: a hash of source and ids."""
    mask: NDArray[np.uint8] | None = None


def import_tokens(source: str | Path, out: str | Path, tokenizer: TokenizerIdentity) -> TokenStore:
    """Make a token store of token data in any of the module's forms; an MDS folder of ids is linked, not copied.

    Raises:
        DataError: the source is none of them, or damaged; an id is not in the vocabulary; or something stands
            at `out`.
    """
    source, out = Path(source), Path(out)
    if (source / INDEX).is_file() and not _has_rows(source) and _column_to_copy(source) is None:
        return import_mds(source, out, tokenizer)
    documents, ours = _open(source)
    taken: Counter[str] = Counter()
    with (
        TokenStoreWriter(out, config={"imported": source.name}, tokenizer=tokenizer) as writer,
        progress("import", total=None, unit="docs") as bar,
    ):
        for document in documents():
            bar.advance()
            ids, mask = document.ids, document.mask
            if not ours:
                ids, mask = _unframed(ids, mask, tokenizer, taken)
            if not len(ids):
                taken["empty_documents"] += 1
                continue
            key = token_key(document.source, ids) if document.key is None else document.key
            writer.add(ids, source=document.source, key=key, mask=mask)
        writer.counts = {name: taken[name] for name in ("bos_removed", "eos_removed", "empty_documents")}
    return TokenStore(out)


def _has_rows(folder: Path) -> bool:
    return any(column.name == "indices" for info in MDSDirectory(folder).shards for column in info.columns)


def _column_to_copy(folder: Path) -> str | None:
    """Return the column of ids that a store cannot link: `tokens` of other tools, or ids of 64 bits."""
    encodings = {
        column.name: column.encoding for info in MDSDirectory(folder).shards for column in info.columns
    }
    for name in IDS_COLUMNS:
        encoding = encodings.get(name)
        if encoding is not None:
            is_linked = name == "input_ids" and encoding.removeprefix("ndarray:").lstrip("u") in (
                "int16",
                "int32",
            )
            return name if encoding in COPIED_ENCODINGS and not is_linked else None
    return None


def _mds(source: Path, name: str) -> Iterator[TokenDocument]:
    for number, sample in enumerate(MDSDirectory(source)):
        ids, mask = sample.get(name), sample.get("mask")
        if isinstance(ids, bytes) and len(ids) % BYTES_DTYPE.itemsize == 0:
            ids = np.frombuffer(ids, BYTES_DTYPE)
        if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
            raise DataError(
                f"document {number} of {source} has no ids in {name!r}",
                found="nothing" if ids is None else f"{type(ids).__name__} of {len(ids)}",
                allowed=COPIED_ENCODINGS,
            )
        whole = isinstance(mask, np.ndarray) and mask.dtype == np.uint8
        domain = str(sample.get("domain", NO_SOURCE))
        yield TokenDocument(ids.reshape(-1), domain, mask=mask if whole else None)


def _open(source: Path) -> tuple[Callable[[], Iterator[TokenDocument]], bool]:
    """Return how to read the documents of a source, and whether we wrote them."""
    if (source / NPY_NAMES).is_file():
        return lambda: _columns(source), True
    if source.is_file() and source.suffix in (".jsonl", ".parquet") and _is_document(source):
        return lambda: _records(source), True
    column = _column_to_copy(source) if (source / INDEX).is_file() and not _has_rows(source) else None
    if column is not None:
        return lambda: _mds(source, column), False
    if (source / INDEX).is_file() or (source / MANIFEST).is_file():
        return lambda: _rows(PackedRows(source)), False
    if source.is_file() and source.suffix in (".jsonl", ".parquet"):
        return lambda: _rows(PackedRows(source)), False
    readers: dict[str, Callable[[str], TokenFile]] = {
        ".npy": _cepe,
        ".ds": read_datatrove,
        ".idx": read_megatron,
    }
    given = source.with_suffix(".idx") if source.suffix == ".bin" else source
    files = find_token_files(given, (*readers, *SUFFIXES)) if given.exists() else []
    found = {Path(path).suffix for path, _ in files}
    some = [suffix for suffix in readers if suffix in found]
    if len(some) == 1:
        chosen = [each for each in files if Path(each[0]).suffix == some[0]]
        return lambda: _files(chosen, readers[some[0]]), False
    if given.is_dir() and not some and found:
        return lambda: _rows(PackedRows(given)), False
    raise DataError(
        f"{source} cannot become a token store",
        found=f"files {', '.join(some)}" if some else None,
        allowed="an MDS folder with input_ids or tokens; documents as .jsonl or .parquet with input_ids, domain, key; "
        "packed rows; or files of one kind: .npy (CEPE), .ds (datatrove), .idx and .bin (Megatron)",
    )


def _unframed(
    ids: NDArray[Any], mask: NDArray[np.uint8] | None, tokenizer: TokenizerIdentity, taken: Counter[str]
) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
    """Return a document without the tokens that frame it."""
    start, stop = 0, len(ids)
    if start < stop and tokenizer.bos_id is not None and int(ids[0]) == tokenizer.bos_id:
        start += 1
        taken["bos_removed"] += 1
    if start < stop and tokenizer.eos_id is not None and int(ids[stop - 1]) == tokenizer.eos_id:
        stop -= 1
        taken["eos_removed"] += 1
    return ids[start:stop], None if mask is None else mask[start:stop]


def _cepe(path: str) -> TokenFile:
    file = read_cepe(path)
    bounds = np.concatenate([[0], np.cumsum(file.lengths)])
    return TokenFile(path, file.tokens, bounds[:-1], bounds[1:])


def _files(found: list[tuple[str, str]], read: Callable[[str], TokenFile]) -> Iterator[TokenDocument]:
    for path, source in sorted(found):
        file = read(path)
        for start, stop in zip(file.starts.tolist(), file.ends.tolist()):
            mask = None if file.trained is None else np.array(file.trained[start:stop], np.uint8)
            yield TokenDocument(file.tokens[start:stop], source, mask=mask)


def _rows(rows: PackedRows) -> Iterator[TokenDocument]:
    documents = RowDocuments(rows)
    names = documents.lengths.source_names
    for number, source in enumerate(documents.lengths.source.tolist()):
        yield TokenDocument(documents.tokens(number), names[source], mask=documents.mask(number))


def _columns(folder: Path) -> Iterator[TokenDocument]:
    """Read what `convert.write_documents` writes as npy."""

    def load(name: str, kinds: str) -> NDArray[Any]:
        try:
            column = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except NPY_ERRORS as error:
            raise DataError(f"{folder / name}.npy cannot be read", found=str(error)) from None
        if column.ndim != 1 or column.dtype.kind not in kinds:
            raise DataError(
                f"{folder / name}.npy is not such a column", found=f"{column.dtype} {list(column.shape)}"
            )
        return column

    names = read_json(folder / NPY_NAMES)
    tokens, offsets = load("tokens", "u"), load("offsets", "iu")
    keys, sources = load("keys", "u"), load("sources", "u")
    weights = load("weights", "u") if (folder / "weights.npy").is_file() else None
    if (
        not isinstance(names, list)
        or not len(offsets) == len(keys) + 1 == len(sources) + 1
        or (int(offsets[0]), int(offsets[-1])) != (0, len(tokens))
        or bool(np.any(offsets[1:] < offsets[:-1]))
        or (len(sources) and int(sources.max()) >= len(names))
        or (weights is not None and (len(weights) != len(tokens) or weights.dtype != np.uint8))
    ):
        raise DataError(f"the columns of {folder} do not fit one another", fix="write the documents again")
    for number, source in enumerate(sources.tolist()):
        place = slice(int(offsets[number]), int(offsets[number + 1]))
        mask = None if weights is None else np.asarray(weights[place])
        yield TokenDocument(tokens[place], str(names[source]), int(keys[number]), mask)


def _is_document(path: Path) -> bool:
    """Whether the first record of a file is a document that we wrote, not a packed row."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pa.OSFile(os.fsencode(path)) as file:
                return "key" in pq.read_schema(file).names
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is a damaged parquet file", found=str(error)) from None
    with open(path, "rb") as file:
        try:
            first = json.loads(file.readline() or b"null")
        except ValueError as error:
            raise DataError(f"{path}:1 is not JSON", found=str(error)) from None
    return isinstance(first, dict) and "key" in first


def _records(source: Path) -> Iterator[TokenDocument]:
    """Read what `convert.write_documents` writes as jsonl or parquet."""
    for number, record in enumerate(_raw_records(source)):
        try:
            mask = record.get("mask")
            yield TokenDocument(
                np.asarray(record["input_ids"], np.int64),
                str(record["domain"]),
                int(record["key"], 16),
                None if mask is None else np.asarray(mask, np.uint8),
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"document {number} of {source} cannot be read", found=f"{type(error).__name__}: {error}"
            ) from None


def _raw_records(source: Path) -> Iterator[dict[str, Any]]:
    if source.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pa.OSFile(os.fsencode(source)) as file:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{source} is a damaged parquet file", found=str(error)) from None
        return
    with open(source, "rb") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                yield json.loads(text)
            except ValueError as error:
                raise DataError(f"{source}:{line} is not JSON", found=str(error)) from None
