"""What can be said of a document by itself: digests, MinHash signatures, repetition, lines, symbols, language.

Documents are worked on in blocks, all tokens of a block at once: a pass of numpy costs about as much for a thousand
tokens as for ten. Memory: about 100 bytes a token of the block.
"""

from __future__ import annotations

import itertools
import unicodedata
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from longspan.core.optional import require
from longspan.core.shuffling import hashed
from longspan.data.store.token_store import TokenStore
from longspan.data.tokenizer import Tokenizer

PERMUTATIONS = 128
"""Values of a MinHash signature: the estimated similarity of two documents has a standard error of at most 0.044."""
REPEATED_TOKENS = 10
LINE_TOKENS = 4
"""Shorter lines, such as closing brackets, say nothing."""
LANGUAGE_TOKENS = 192
_ODD = np.uint64(0x9E3779B97F4A7C15)
_SEED = 42


class Vocabulary(NamedTuple):
    """What every token id is made of."""

    ends_line: NDArray[np.bool_]
    characters: NDArray[np.uint16]
    """Characters of the token, space not counted."""
    symbols: NDArray[np.uint16]
    """Those that are neither letters nor marks."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> Vocabulary:
        """Decode every id by itself; half a second for 50,000."""
        texts = [tokenizer.decode([number]) for number in range(size)]
        visible = ["".join(text.split()).replace("\ufffd", "") for text in texts]
        symbols = [sum(unicodedata.category(c)[0] not in "LM" for c in text) for text in visible]
        return cls(
            np.array(["\n" in text for text in texts], bool),
            np.array([min(len(text), 65535) for text in visible], np.uint16),
            np.array([min(count, 65535) for count in symbols], np.uint16),
        )


class Measuring(NamedTuple):
    """What a block is measured with."""

    shingle_tokens: int
    tokenizer: Tokenizer | None = None
    vocabulary: Vocabulary | None = None


class Block(NamedTuple):
    """Documents start .. stop of a store."""

    store: str
    start: int
    stop: int
    measuring: Measuring


class Lines(NamedTuple):
    """The different lines of documents, one after the other."""

    hashes: NDArray[np.uint64]
    tokens: NDArray[np.uint32]
    """Of all times that the document has the line."""
    counts: NDArray[np.uint32]
    """Lines of each document."""


class Measured(NamedTuple):
    """What was found of the documents of a block, one entry each."""

    digests: NDArray[np.uint64]
    signatures: NDArray[np.uint32]
    """[documents, PERMUTATIONS]."""
    repeated: NDArray[np.float32]
    compression: NDArray[np.float32]
    repeated_lines: NDArray[np.float32] | None = None
    symbols: NDArray[np.float32] | None = None
    languages: list[str] | None = None
    lines: Lines | None = None


def measure(block: Block) -> Measured:
    """Measure the documents of a block."""
    store = _open(block.store)
    documents = [store.tree_tokens(document) for document in range(block.start, block.stop)]
    borders = np.cumsum([0, *map(len, documents)])
    ids = np.concatenate(documents).astype(np.uint64)
    owner = np.repeat(np.arange(len(documents)), np.diff(borders))
    digests = np.array([xxhash.xxh3_64_intdigest(np.ascontiguousarray(d).data) for d in documents], np.uint64)
    mixed = _mix(ids)
    found = Measured(
        digests=digests,
        signatures=_signatures(mixed, borders, digests, block.measuring.shingle_tokens),
        repeated=_repeated(mixed, borders, owner),
        compression=_compression(documents),
    )
    vocabulary, tokenizer = block.measuring.vocabulary, block.measuring.tokenizer
    if vocabulary is None or tokenizer is None:
        return found
    repeated_lines, lines = _lines(ids, mixed, borders, owner, vocabulary)
    characters = np.add.reduceat(vocabulary.characters[ids].astype(np.int64), borders[:-1])
    symbols = np.add.reduceat(vocabulary.symbols[ids].astype(np.int64), borders[:-1])
    return found._replace(
        repeated_lines=repeated_lines,
        lines=lines,
        symbols=np.where(characters > 0, _share(symbols, characters), np.float32(np.nan)),
        languages=_languages(documents, tokenizer),
    )


@lru_cache(maxsize=1)
def _open(path: str) -> TokenStore:
    return TokenStore(path)


def shingles(ids: NDArray[Any], shingle_tokens: int) -> NDArray[np.uint64]:
    """Return the different runs of `shingle_tokens` tokens of a document as sorted hashes; a shorter one is one run."""
    run = min(shingle_tokens, len(ids))
    return np.unique(_runs(_mix(ids.astype(np.uint64)), run))


def similarity(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> float:
    """Return the Jaccard similarity of two sets of shingles."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread numbers over 64 bits."""
    return hashed(values, 0, "audit")


def _runs(mixed: NDArray[np.uint64], run: int) -> NDArray[np.uint64]:
    """Return a hash of every `run` values in a row [values - run + 1]: a polynomial modulo 2**64."""
    count = len(mixed) - run + 1
    hashes = mixed[:count].copy()
    for place in range(1, run):
        hashes *= _ODD
        hashes += mixed[place : place + count]
    return hashes


def _signatures(
    mixed: NDArray[np.uint64], borders: NDArray[np.int64], digests: NDArray[np.uint64], run: int
) -> NDArray[np.uint32]:
    rensa = require("rensa", extra="audit", feature="finding near duplicates")
    hashes = _runs(mixed, run) if len(mixed) >= run else mixed[:0]
    parts = [
        hashes[start : stop - run + 1] if stop - start >= run else digests[number : number + 1]
        for number, (start, stop) in enumerate(itertools.pairwise(borders))
    ]
    rows = [0, *np.cumsum([len(part) for part in parts]).tolist()]
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(parts), rows, PERMUTATIONS, _SEED
    )
    return np.array(matrix.to_rows(), np.uint32)


def _repeated(
    mixed: NDArray[np.uint64], borders: NDArray[np.int64], owner: NDArray[np.int64]
) -> NDArray[np.float32]:
    counts = np.maximum(np.diff(borders) - REPEATED_TOKENS + 1, 0)
    different = np.zeros(len(counts), np.int64)
    if counts.any():
        runs = _runs(mixed, REPEATED_TOKENS)
        # A run that ends in another document than it begins in belongs to none.
        inside = owner[: len(runs)] == owner[REPEATED_TOKENS - 1 :]
        own = owner[: len(runs)][inside]
        _, first = np.unique(runs[inside] + _mix(own.astype(np.uint64)), return_index=True)
        different = np.bincount(own[first], minlength=len(counts))
    return _share(counts - different, counts)


def _compression(documents: list[NDArray[Any]]) -> NDArray[np.float32]:
    compressor = zstandard.ZstdCompressor(level=3, write_content_size=False, write_checksum=False)
    return np.array([len(compressor.compress(d.tobytes())) / d.nbytes for d in documents], np.float32)


def _lines(
    ids: NDArray[np.uint64],
    mixed: NDArray[np.uint64],
    borders: NDArray[np.int64],
    owner: NDArray[np.int64],
    vocabulary: Vocabulary,
) -> tuple[NDArray[np.float32], Lines]:
    ends = np.flatnonzero(vocabulary.ends_line[ids]) + 1
    starts = np.union1d(borders[:-1], ends[ends < len(ids)])
    tokens = np.diff(np.append(starts, len(ids)))
    place = np.arange(len(ids)) - np.repeat(starts, tokens)
    hashes = np.add.reduceat(mixed * (_mix(place.astype(np.uint64)) | np.uint64(1)), starts)
    says = tokens >= LINE_TOKENS
    hashes, tokens, documents = hashes[says], tokens[says], owner[starts[says]]
    key = hashes + _mix(documents.astype(np.uint64))
    _, first, same = np.unique(key, return_index=True, return_inverse=True)
    again = np.ones(len(key), bool)
    again[first] = False
    repeated = np.bincount(documents[again], tokens[again], minlength=len(borders) - 1)
    by_line = np.bincount(same, tokens, minlength=len(first)).astype(np.uint32)
    order = np.argsort(documents[first], kind="stable")
    counts = np.bincount(documents[first], minlength=len(borders) - 1).astype(np.uint32)
    return _share(repeated, np.diff(borders)), Lines(hashes[first][order], by_line[order], counts)


def _languages(documents: list[NDArray[Any]], tokenizer: Tokenizer) -> list[str]:
    py3langid = require("py3langid", extra="audit", feature="telling languages apart")
    found = []
    for ids in documents:
        start = max(0, (len(ids) - LANGUAGE_TOKENS) // 2)
        text = tokenizer.decode(ids[start : start + LANGUAGE_TOKENS].tolist())
        found.append(py3langid.classify(text)[0] if any(map(str.isalpha, text)) else "zxx")
    return found


def _share(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float32]:
    """Return part / whole; of nothing, nothing is repeated."""
    return (part / np.maximum(whole, 1)).astype(np.float32)
