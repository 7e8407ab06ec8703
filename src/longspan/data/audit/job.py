"""An audit of token stores: every document measured, duplicates among all of them, one folder of columns.

What is needed on the way (712 bytes a document, 8 bytes a line) waits in a folder beside the result, so memory does
not grow with the text: about 60 bytes a document, and 64 MiB of counters for lines.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import DataError
from longspan.core.files import behind_link
from longspan.core.log import get_logger
from longspan.core.progress import progress
from longspan.data.audit.audit_config import AuditConfig
from longspan.data.audit.duplicates import bands_for, first_of, near_duplicates
from longspan.data.audit.measuring import (
    PERMUTATIONS,
    Block,
    Lines,
    Measured,
    Measuring,
    Vocabulary,
    measure,
    shingles,
)
from longspan.data.jobs import Executor
from longspan.data.store.measures import MEASURES, AuditedStore, Measures, digest_of
from longspan.data.store.token_store import TokenStore
from longspan.data.tokenizer import Tokenizer

BLOCK_TOKENS = 1 << 20
LINE_COUNTERS = 1 << 26
"""Beyond some 100 million different lines, lines begin to share counters and boilerplate is overestimated."""


def audit(
    stores: Sequence[TokenStore],
    out: str | Path,
    config: AuditConfig,
    *,
    tokenizer: Tokenizer | None,
    executor: Executor,
    name: str | None = None,
) -> Measures:
    """Measure every document of some stores, and write what was found to the folder `out`.

    Without the tokenizer that made the stores, lines, symbols and languages are left out. `name`: of the raw input that
    a store was made of.

    Raises:
        DataError: a store cannot be read, or something else stands at `out`.
        MissingDependencyError: the packages of the extra `audit` are not installed.
    """
    out = behind_link(out)
    vocabulary = None if tokenizer is None else Vocabulary.of(tokenizer, stores[0].vocab_size)
    measuring = Measuring(config.shingle_tokens, tokenizer, vocabulary)
    blocks = [block for store in stores for block in _blocks(store, measuring)]
    documents = sum(len(store) for store in stores)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        room = _Room(Path(aside), documents, bands_for(config.similarity).number)
        tokens = np.concatenate([store.lengths.tokens for store in stores])
        found = _AuditColumns(room, tokens, with_text=tokenizer is not None)
        with progress("audit", total=sum(store.num_tokens for store in stores), unit="tokens") as bar:
            for measured in executor.run(measure, blocks):
                bar.advance(found.add(measured))
        exact = first_of(found.digests)
        read = functools.partial(_shingles, stores, config.shingle_tokens)
        stays = near_duplicates(room.signatures, exact, read, config.similarity, room.earlier)
        numbers = np.arange(documents, dtype=np.uint32)
        columns: dict[str, NDArray[Any]] = {
            "exact_duplicate": (exact != numbers).astype(np.uint8),
            "near_duplicate": (stays != numbers).astype(np.uint8),
            **found.columns(config.boilerplate_documents),
        }
    measures = Measures(
        {name: columns[name] for name in MEASURES if name in columns},
        tuple(
            AuditedStore(
                name or os.path.abspath(store.path),
                len(store),
                digest_of(store.lengths.key, store.lengths.tokens),
            )
            for store in stores
        ),
        found.languages,
        config.to_dict(),
        np.concatenate([store.lengths.key for store in stores]),
    )
    measures.save(out)
    if tokenizer is None:
        get_logger("data.audit").warning(
            "lines, symbols and languages are not measured: name the tokenizer of the stores (--tokenizer)"
        )
    return measures


class _Room(NamedTuple):
    """Arrays on disk."""

    folder: Path
    documents: int
    bands: int

    @property
    def signatures(self) -> NDArray[np.uint32]:
        return self._array("signatures", (self.documents, PERMUTATIONS))

    @property
    def earlier(self) -> NDArray[np.uint32]:
        return self._array("earlier", (self.bands, self.documents))

    def _array(self, name: str, shape: tuple[int, ...]) -> NDArray[np.uint32]:
        path = self.folder / name
        return np.memmap(path, np.uint32, "r+" if path.exists() else "w+", shape=shape)


class _AuditColumns:
    """What blocks have brought so far."""

    def __init__(self, room: _Room, tokens: NDArray[np.uint32], *, with_text: bool) -> None:
        documents = len(tokens)
        self.languages: tuple[str, ...] = ("",)
        self.digests = np.empty(documents, np.uint64)
        self._signatures, self._done = room.signatures, 0
        names = ["repeated", "compression"] + (["repeated_lines", "symbols"] if with_text else [])
        self._numbers = {name: np.empty(documents, np.float32) for name in names}
        self._language = np.zeros(documents, np.uint8) if with_text else None
        self._tokens = tokens
        self._lines = _LineCounts(room.folder / "lines") if with_text else None

    def add(self, measured: Measured) -> int:
        """Take the next block; returns its tokens."""
        here = slice(self._done, self._done + len(measured.digests))
        self._done = here.stop
        self.digests[here] = measured.digests
        self._signatures[here] = measured.signatures
        for name, column in self._numbers.items():
            column[here] = getattr(measured, name)
        if self._language is not None and self._lines is not None:
            assert measured.languages is not None and measured.lines is not None
            self.languages = tuple(dict.fromkeys([*self.languages, *measured.languages]))
            self._language[here] = [self.languages.index(name) for name in measured.languages]
            self._lines.add(measured.lines)
        return int(self._tokens[here].sum(dtype=np.int64))

    def columns(self, boilerplate_documents: int) -> dict[str, NDArray[Any]]:
        """Return the columns of what documents are by themselves, and of lines that many have."""
        columns: dict[str, NDArray[Any]] = dict(self._numbers)
        if self._language is not None and self._lines is not None:
            columns["language"] = self._language
            columns["boilerplate"] = self._lines.shares(self._tokens, boilerplate_documents)
        return columns


class _LineCounts:
    """How many documents have a line, by hashed counters; lines wait in a file until all are counted."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._counters = np.zeros(LINE_COUNTERS, np.uint8)
        self._blocks: list[tuple[int, NDArray[np.uint32]]] = []

    def add(self, lines: Lines) -> None:
        places, documents = np.unique(self._places(lines.hashes), return_counts=True)
        self._counters[places] = np.minimum(self._counters[places] + documents, 255)
        self._file.write(lines.hashes.tobytes())
        self._file.write(lines.tokens.tobytes())
        self._blocks.append((len(lines.hashes), lines.counts))

    def shares(self, tokens: NDArray[np.uint32], least: int) -> NDArray[np.float32]:
        """Return the share of each document's tokens that stand in lines of `least` documents or more."""
        shares = np.zeros(len(tokens), np.float32)
        self._file.seek(0)
        start = 0
        for lines, counts in self._blocks:
            hashes = np.frombuffer(self._file.read(8 * lines), np.uint64)
            of_line = np.frombuffer(self._file.read(4 * lines), np.uint32)
            common = self._counters[self._places(hashes)] >= least
            here = slice(start, start + len(counts))
            owner = np.repeat(np.arange(len(counts)), counts)
            total = np.bincount(owner[common], of_line[common], minlength=len(counts))
            shares[here] = total / tokens[here]
            start = here.stop
        self._file.close()
        return shares

    @staticmethod
    def _places(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (hashes % np.uint64(LINE_COUNTERS)).astype(np.int64)


def _blocks(store: TokenStore, measuring: Measuring) -> Iterator[Block]:
    """Cut a store where BLOCK_TOKENS are full; a longer document is a block of its own."""
    ends = np.cumsum(store.lengths.tokens, dtype=np.int64)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
        yield Block(str(store.path), start, stop, measuring)
        start = stop


def _shingles(stores: Sequence[TokenStore], run: int, document: int) -> NDArray[np.uint64]:
    for store in stores:
        if document < len(store):
            return shingles(store.tree_tokens(document), run)
        document -= len(store)
    raise DataError("there is no such document", found=document)
