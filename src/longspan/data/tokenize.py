"""Raw text to a token store, in parallel, with the same bytes whatever the number of workers.

This process cuts files into batches of raw records and writes the store; workers decode, encode and hash.
Results are taken in the order of the batches, a few of which are under way at once, so memory stays flat.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError, DataError, RunError
from longspan.core.files import disk_errors
from longspan.core.log import get_logger
from longspan.core.progress import progress
from longspan.core.units import format_count
from longspan.data.readers import (
    Document,
    Fields,
    InputFile,
    RawRecord,
    ReadReport,
    finish_reading,
    list_inputs,
    parse_record,
    read_records,
)
from longspan.data.readers.files import COMPRESSION, open_raw
from longspan.data.store.token_store import (
    MANIFEST,
    SHARD_BYTES,
    TokenStore,
    TokenStoreWriter,
    read_manifest,
    token_dtype,
)
from longspan.data.tokenizer import Backend, Tokenizer, load_tokenizer

BATCH_BYTES = 1 << 20
BATCH_RECORDS = 2048
SAMPLE_BLOCKS = 16
SAMPLE_BLOCK_BYTES = 1 << 16


def tokenize_corpus(
    inputs: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    *,
    text_field: str = "text",
    source_field: str | None = None,
    num_workers: int = 1,
    strict: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> TokenStore:
    """Encode every document of `inputs` into a token store at `out`, in canonical order (path, record
    number).

    A complete store at `out` made from the same files with the same settings is opened as it is; what a
    killed run left beside `out` is removed. With more than one worker, processes are spawned: a script that
    calls this needs an `if __name__ == "__main__":` guard.

    Args:
        inputs: files, folders, glob patterns or remote addresses; see `readers`.
        text_field: field of a JSON line that holds the text; dots reach into objects.
        source_field: field that names the source; None: the file's place names it.
        num_workers: processes that encode; 1 encodes in this process. Does not change the result.
        strict: stop at the first broken record instead of skipping and counting it.
        shard_bytes: size of the store's files; below 4 GiB.

    Raises:
        DataError: the inputs hold no document, a field is missing, or `out` holds something else.
        RunError: the disk is full or a worker died; nothing is left at `out`.
    """
    if num_workers < 1 or not 1 <= shard_bytes < 1 << 32:
        raise ArgumentError(
            "bad setting for tokenizing",
            found=f"num_workers={num_workers}, shard_bytes={shard_bytes}",
            allowed="num_workers >= 1, shard_bytes in 1..4294967295",
        )
    out, fields = Path(out), Fields(text_field, source_field)
    # Files are read ahead of the documents in them: counted apart, their places come last for any number of workers.
    report, files_report = ReadReport(), ReadReport()
    files = list_inputs(inputs, report=files_report)
    config = {
        "text_field": text_field,
        "source_field": source_field,
        "strict": strict,
        "shard_bytes": shard_bytes,
        "tokenizer": tokenizer.fingerprint,
        "inputs": [_identity(file) for file in files],
    }
    if _is_done(out, config):
        get_logger("data.tokenize").info("%s is complete and made from the same inputs: kept as it is", out)
        return TokenStore(out)
    # What a compressed file unpacks to is not known beforehand.
    plain = not any(file.path.endswith(tuple(COMPRESSION)) for file in files)
    total = sum(file.size for file in files) if plain else None
    with (
        progress("tokenize", total=total, unit="bytes") as bar,
        TokenStoreWriter(out, config=config, tokenizer=tokenizer, shard_bytes=shard_bytes) as writer,
    ):
        num_tokens = 0
        records = read_records(files, report=files_report)
        for batch in _encode_all(records, tokenizer, fields, strict, num_workers):
            report.add(batch.report)
            _write(batch, writer)
            num_tokens += len(batch.ids)
            bar.note(f"{format_count(num_tokens)} tokens")
            bar.advance(batch.num_bytes)
        report.add(files_report)
        finish_reading(files, report)
        writer.counts = report.to_dict()
    return TokenStore(out)


def document_key(source: str, text: bytes) -> int:
    """Return the 64-bit identity of a document: BLAKE2b of source, a zero byte and the UTF-8 text."""
    digest = hashlib.blake2b(source.encode() + b"\0", digest_size=8)
    digest.update(text)
    return int.from_bytes(digest.digest(), "little")


def token_weights(
    spans: Iterable[tuple[int, int, int]],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    *,
    num_characters: int,
) -> NDArray[np.uint8]:
    """Return the loss weight of each token [tokens]: that of the first of its characters in a span, else 1.

    Where spans overlap, the later one holds. Text "a is Paris", span (5, 10, 4): " Paris" starts at 4, before
    the span, and weighs 4.
    """
    weight = np.ones(num_characters + 1, np.uint8)
    covered = np.zeros(num_characters + 1, bool)
    for start, end, value in spans:
        weight[start:end] = value
        covered[start:end] = True
    characters = np.flatnonzero(covered)
    first = np.append(characters, num_characters)[np.searchsorted(characters, starts)]
    # A token that stands for no character of its own (a trimmed space) counts as the character it stands at.
    return np.where(first < np.maximum(ends, starts + 1), weight[first], 1).astype(np.uint8)


class _Batch(NamedTuple):
    """Encoded documents of consecutive records; a worker's answer."""

    ids: NDArray[Any]
    """All documents' ids, one after another, in the dtype of the store."""
    counts: list[int]
    keys: list[int]
    sources: list[str]
    masks: list[NDArray[np.uint8] | None]
    report: ReadReport
    num_bytes: int


def _encode_all(
    records: Iterable[RawRecord], tokenizer: Tokenizer, fields: Fields, strict: bool, num_workers: int
) -> Iterator[_Batch]:
    """Yield the encoded batches in the order of the records."""
    if num_workers == 1:
        for records_of_batch in _batches(records):
            yield _encode(records_of_batch, tokenizer, fields, strict)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    waiting: deque[Future[_Batch]] = deque()
    try:
        for records_of_batch in _batches(records):
            job = (records_of_batch, str(tokenizer.path), tokenizer.backend, fields, strict)
            waiting.append(pool.submit(_encode_in_worker, *job))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a tokenizer process died",
            found=str(error),
            fix="look for an out-of-memory kill; a script needs an `if __name__ == '__main__':` guard",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(records: Iterable[RawRecord]) -> Iterator[list[RawRecord]]:
    batch: list[RawRecord] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.data)
        if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_in_worker(
    records: list[RawRecord], path: str, backend: Backend, fields: Fields, strict: bool
) -> _Batch:
    return _encode(records, _worker_tokenizer(path, backend), fields, strict)


@lru_cache(maxsize=1)
def _worker_tokenizer(path: str, backend: Backend) -> Tokenizer:
    return load_tokenizer(path, backend=backend)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone, even killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _encode(records: Sequence[RawRecord], tokenizer: Tokenizer, fields: Fields, strict: bool) -> _Batch:
    report = ReadReport()
    dtype = token_dtype(tokenizer.vocab_size)
    parts: list[NDArray[Any]] = []
    keys: list[int] = []
    sources: list[str] = []
    masks: list[NDArray[np.uint8] | None] = []
    for record in records:
        document = parse_record(record, fields, strict=strict, report=report)
        if document is None:
            continue
        ids, mask = _encode_document(document, tokenizer)
        if not len(ids):
            report.documents -= 1
            report.skip("empty_documents", f"{document.path}:{document.position}", "no token")
            continue
        parts.append(ids.astype(dtype))
        keys.append(document_key(document.source, document.text.encode()))
        sources.append(document.source)
        masks.append(mask)
    ids_of_all = np.concatenate(parts) if parts else np.zeros(0, dtype)
    num_bytes = sum(len(record.data) for record in records)
    return _Batch(ids_of_all, [len(part) for part in parts], keys, sources, masks, report, num_bytes)


def _encode_document(
    document: Document, tokenizer: Tokenizer
) -> tuple[NDArray[np.uint32], NDArray[np.uint8] | None]:
    if document.weights is None:
        return tokenizer.encode(document.text), None
    ids, starts, ends = tokenizer.encode_with_offsets(document.text)
    return ids, token_weights(document.weights, starts, ends, num_characters=len(document.text))


def _write(batch: _Batch, writer: TokenStoreWriter) -> None:
    stop = 0
    for count, key, source, mask in zip(batch.counts, batch.keys, batch.sources, batch.masks):
        start, stop = stop, stop + count
        writer.add(batch.ids[start:stop], source=source, key=key, mask=mask)


def _is_done(out: Path, config: dict[str, Any]) -> bool:
    """Whether `out` holds the store of this very config; an empty folder gives way.

    Raises:
        DataError: something else is there.
    """
    if not out.exists():
        return False
    if out.is_dir() and not any(out.iterdir()):
        with disk_errors(out):
            out.rmdir()
        return False
    if not (out / MANIFEST).is_file():
        raise DataError(
            f"{out} already exists and is not a complete token store", fix="remove it or choose another --out"
        )
    found = read_manifest(out).config
    if found != config:
        names = [name for name in config if found.get(name) != config[name]]
        raise DataError(
            f"{out} is a token store made otherwise",
            found=f"other {', '.join(names) or 'settings'}",
            fix="choose another --out, or remove the store to make it again",
        )
    return True


def _identity(file: InputFile) -> dict[str, Any]:
    """Return what tells this input from another: name, source, size, and a hash of 16 blocks spread over it.

    Files of up to 1 MiB are hashed whole; of a larger one 1 MiB is read, so that a finished corpus of any
    size is recognised in seconds. The folder does not count: a corpus may move.
    """
    digest = hashlib.sha256()
    try:
        with open_raw(file.path) as stream:
            last = max(file.size - SAMPLE_BLOCK_BYTES, 0)
            for block in range(SAMPLE_BLOCKS):
                stream.seek(last * block // (SAMPLE_BLOCKS - 1))
                digest.update(stream.read(SAMPLE_BLOCK_BYTES))
    except OSError as error:
        raise DataError(f"cannot read {file.path}", found=error.strerror or str(error)) from None
    return {
        "name": Path(file.path).name,
        "source": file.source,
        "bytes": file.size,
        "sampled_sha256": digest.hexdigest(),
    }
