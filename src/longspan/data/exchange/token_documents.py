"""Tokenized documents with the tokens that frame them, whichever way they are stored: token stores, or
CEPE's `.npy` files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import sha256_bytes
from longspan.core.log import get_logger, printable
from longspan.data.exchange.cepe import read_cepe
from longspan.data.plans.framing import frame_settings
from longspan.data.readers.walking import files_below
from longspan.data.store.token_store import MANIFEST, open_stores

Specials = Literal["none", "bos", "eos", "both"]
MAX_OPEN_FILES = 128


class TokenDocuments(Protocol):
    """Documents in canonical order (path, place in the file) as columns of equal length."""

    domains: tuple[str, ...]
    domain: NDArray[np.uint16]
    """Index into `domains` of each document."""
    tokens: NDArray[np.int64]
    """Length of each document, BOS and EOS included."""
    key: NDArray[np.uint64]
    """Identity of each document; the same for the same text where that is known."""
    files: tuple[str, ...]
    """Names of the files in canonical order; empty where they are not known."""
    file: NDArray[np.uint32]
    """Index into `files` of each document; empty where files are not known."""
    dtype: np.dtype[Any]
    """Dtype that holds every id."""
    tokenizer: str | None
    """Fingerprint of the tokenizer, where it is known."""

    @property
    def fingerprint(self) -> str:
        """16 hex characters over what decides the ids."""

    def ids(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return the ids `start` to `stop` of a document, framed; reads no others."""


class StoreDocuments:
    """Documents of token stores, framed by the BOS and EOS of their tokenizer; none gets a second BOS.

    Raises:
        DataError: the stores were made with different tokenizers.
        ConfigError: the tokenizer has no such token, or some documents have it already and others not.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], *, specials: Specials = "both") -> None:
        # Canonical order must not depend on the order of the arguments.
        self._stores = open_stores(sorted(set(map(os.path.realpath, paths))))
        if (again := len(paths) - len(self._stores)) > 0:
            get_logger("data").info("%d stores are given again, and read once", again)
        tokenizer = self._stores[0].manifest.tokenizer
        for store in self._stores[1:]:
            if store.manifest.tokenizer["fingerprint"] != tokenizer["fingerprint"]:
                raise DataError(
                    f"{self._stores[0].path} and {store.path} were made with different tokenizers"
                )
        self.tokenizer: str | None = tokenizer["fingerprint"]
        framed = frame_settings(specials, self._stores, where=str(self._stores[0].path))["specials"]
        self._before = [tokenizer["bos_id"]] if framed in ("bos", "both") else []
        self._after = [tokenizer["eos_id"]] if framed in ("eos", "both") else []
        frame = (*self._before, *self._after)
        tables = [store.lengths for store in self._stores]
        names = sorted({name for table in tables for name in table.source_names})
        self.domains = tuple(names)
        renumber = [
            np.array([names.index(name) for name in table.source_names], np.uint16) for table in tables
        ]
        self.domain = np.concatenate([to[table.source] for to, table in zip(renumber, tables)])
        self.tokens = np.concatenate([table.tokens for table in tables]).astype(np.int64) + len(frame)
        self.key = np.concatenate([table.key for table in tables])
        self.files: tuple[str, ...] = ()
        self.file = np.zeros(0, np.uint32)
        self.dtype = np.dtype(self._stores[0].manifest.dtype)
        self._first = np.cumsum([0, *map(len, tables)])

    @property
    def fingerprint(self) -> str:
        """16 hex characters over the content of the stores and the framing."""
        parts = [*(store.fingerprint for store in self._stores), repr((self._before, self._after))]
        return sha256_bytes(" ".join(parts).encode())[:16]

    def ids(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return the ids `start` to `stop` of a document, framed; a view of the store where nothing frames it."""
        store = int(np.searchsorted(self._first, document, side="right")) - 1
        ids = self._stores[store].tokens(document - int(self._first[store]))
        if not (self._before or self._after):
            return ids[start:stop]
        shift, end = len(self._before), int(self.tokens[document])
        stop = end if stop is None else min(stop, end)
        inside = ids[max(start - shift, 0) : max(stop - shift, 0)]
        before = self._before[start:stop]
        after = self._after if start < stop == end else []
        return np.concatenate([np.array(before, ids.dtype), inside, np.array(after, ids.dtype)])


class CepeDocuments:
    """Documents of CEPE's token files, framed as they are; the domain is the folder of a file.

    Of `redpajama/arxiv/a.npy` given as `redpajama`, the domain is arxiv: the first folder below the one
    given, else the folder the file lies in.

    Raises:
        DataError: no token file is found, or one is damaged.
    """

    def __init__(self, inputs: Sequence[str | os.PathLike[str]]) -> None:
        found = dict(sorted(pair for each in inputs for pair in _find_npy(Path(each))))
        if not found:
            raise DataError("no .npy token files", found=", ".join(map(str, inputs)))
        self.files = tuple(found)
        self._open = lru_cache(maxsize=MAX_OPEN_FILES)(read_cepe)
        self.domains = tuple(sorted(set(found.values())))
        opened = [read_cepe(path).lengths for path in self.files]
        counts = [len(lengths) for lengths in opened]
        numbers = np.array([self.domains.index(found[path]) for path in self.files], np.uint16)
        self.domain = np.repeat(numbers, counts)
        self.tokens = np.concatenate(opened)
        self.file = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
        # The place in the domain, in the order of sorted paths, names a document: its text is not read.
        self.key = np.zeros(len(self.tokens), np.uint64)
        for domain in range(len(self.domains)):
            members = self.domain == domain
            self.key[members] = np.arange(np.count_nonzero(members))
        self.dtype = np.dtype(np.uint32)
        self.tokenizer: str | None = None
        self._start = np.concatenate([np.cumsum(lengths) - lengths for lengths in opened])

    @property
    def fingerprint(self) -> str:
        """16 hex characters over the lengths of all documents, the domains and the names of the files."""
        names = [os.path.basename(path) for path in self.files]
        head = sha256_bytes(os.fsencode("\x1f".join([*self.domains, *names])))
        columns = np.ascontiguousarray(self.tokens).tobytes() + self.domain.tobytes()
        return sha256_bytes(head.encode() + columns)[:16]

    def ids(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return the ids `start` to `stop` of a document as uint32.

        Raises:
            DataError: an id does not fit.
        """
        file = self._open(self.files[int(self.file[document])])
        first, length = int(self._start[document]), int(self.tokens[document])
        ids = file.tokens[first : first + length][start:stop]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 32:
            raise DataError(f"{file.path} holds ids that no vocabulary has, in a document of {length} tokens")
        return ids.astype(np.uint32)


def open_documents(
    inputs: Sequence[str | os.PathLike[str]], *, specials: Specials | None = None
) -> TokenDocuments:
    """Open token stores, or files and folders of CEPE's token files.

    Args:
        specials: what frames the documents of a store; None: BOS and EOS, as CEPE has them. Token files are
            framed already.

    Raises:
        DataError: the inputs are neither, or both.
        ArgumentError: `specials` for token files.
    """
    are_stores = [(Path(each) / MANIFEST).is_file() for each in inputs]
    if all(are_stores) and are_stores:
        return StoreDocuments(inputs, specials=specials or "both")
    if any(are_stores):
        raise DataError("some inputs are token stores and some are not", fix="give one kind at a time")
    documents = CepeDocuments(inputs)
    if specials not in (None, "none"):
        raise ArgumentError(
            "token files are framed already", found=f"specials {specials}", fix="leave out --specials"
        )
    return documents


def find_token_files(given: Path, suffixes: Sequence[str]) -> list[tuple[str, str]]:
    """Return (absolute path, domain) of each file with one of the suffixes: `given` itself, or those below it.

    The domain is the first folder below `given`, else the folder the file lies in.
    """
    given = given.absolute()
    if given.is_file():
        return [(str(given), printable(given.parent.name))] if given.suffix in suffixes else []
    found = []
    for path in map(Path, files_below(given)):
        below = path.relative_to(given).parts
        if path.suffix in suffixes:
            found.append((str(path), printable(below[0] if len(below) > 1 else given.name)))
    return found


def _find_npy(given: Path) -> list[tuple[str, str]]:
    if given.is_dir() or (given.is_file() and given.suffix == ".npy"):
        return find_token_files(given, (".npy",))
    raise DataError(
        f"{given.absolute()} is neither a token store nor a .npy token file, nor a folder of such",
        found="a file" if given.exists() else "nothing",
        fix="make a token store of text with `longspan data tokenize`",
    )
