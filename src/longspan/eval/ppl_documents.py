"""Documents whose perplexity is measured: texts that are tokenised here, or token ids that stand on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import DataError
from longspan.core.files import sha256_bytes
from longspan.data.exchange.token_documents import StoreDocuments, TokenDocuments, open_documents
from longspan.data.store import MDSDirectory
from longspan.data.store.mds import INDEX
from longspan.data.store.token_store import MANIFEST
from longspan.data.tokenizer import Tokenizer
from longspan.eval.held_out import HeldOutDocument, describe_documents

ROWS = "indices"
"""Column of packed rows, which are not documents."""


LOOKED_AT = 64
"""Documents of a domain whose first token is looked at."""


class PplDocument(NamedTuple):
    """A document in tokens."""

    id: str
    source: str
    num_tokens: int
    ids: Callable[[], NDArray[Any]]
    """Reads its ids [num_tokens]."""


def ppl_documents(
    documents: Sequence[HeldOutDocument] | TokenDocuments, tokenizer: Tokenizer, *, bos: int | None = None
) -> list[PplDocument]:
    """Return the documents in tokens, in their order; texts are tokenised, ids on disk are not read yet.

    Ids that begin with `bos`, which windows begin with, are those behind it: conversations whose template writes it.

    Raises:
        DataError: the ids were made with another tokenizer.
    """
    if isinstance(documents, Sequence):
        tokens = tokenizer.encode_batch([document.text for document in documents])
        return [
            PplDocument(document.id, document.source, len(ids), partial(np.asarray, ids))
            for document, ids in zip(documents, tokens)
        ]
    if documents.tokenizer not in (None, tokenizer.fingerprint):
        raise DataError(
            "the documents were tokenised with another tokenizer than the model's",
            found=f"fingerprint {documents.tokenizer}",
            allowed=f"{tokenizer.fingerprint}, of {tokenizer.path}",
            fix="tokenize the texts with the model's tokenizer, or name theirs with --tokenizer",
        )
    begun = _begun(documents, bos)
    return [
        PplDocument(
            f"{int(documents.key[index]):016x}-{index}",
            documents.domains[int(documents.domain[index])],
            int(documents.tokens[index]) - int(begun[index]),
            partial(documents.ids, index, int(begun[index])),
        )
        for index in range(len(documents.tokens))
    ]


def _begun(documents: TokenDocuments, bos: int | None) -> NDArray[np.bool_]:
    """Return which documents begin with `bos`; of a domain all are looked at only where one of a few does."""
    begun = np.zeros(len(documents.tokens), bool)
    for domain in np.unique(documents.domain) if bos is not None else ():
        members = np.flatnonzero(documents.domain == domain)
        few = members[np.unique(np.linspace(0, len(members) - 1, LOOKED_AT).astype(np.int64))]
        if any(_begins_with(documents, int(index), bos) for index in few):
            begun[members] = [_begins_with(documents, int(index), bos) for index in members]
    return begun


def _begins_with(documents: TokenDocuments, index: int, token: int | None) -> bool:
    return documents.ids(index, 0, 1).tolist() == [token]


def describe(documents: Sequence[HeldOutDocument] | TokenDocuments) -> dict[str, Any]:
    """Return what the header of the records says of the documents."""
    if isinstance(documents, Sequence):
        return describe_documents(documents)
    return {"count": len(documents.tokens), "tokens_fingerprint": documents.fingerprint}


def is_tokenised(path: Path) -> bool:
    """Return whether a path is a token store, an MDS folder of token ids, or token files of CEPE."""
    if (path / MANIFEST).is_file() or path.suffix == ".npy":
        return True
    return (path / INDEX).is_file() and "input_ids" in _columns(MDSDirectory(path))


def open_tokenised(paths: Sequence[Path]) -> TokenDocuments:
    """Open tokenised sets of one kind.

    Raises:
        DataError: packed rows, several kinds at a time, or damaged files.
    """
    if all((path / MANIFEST).is_file() for path in paths):
        return StoreDocuments(paths, specials="none")
    if any((path / INDEX).is_file() for path in paths):
        return MdsDocuments(paths)
    return open_documents(paths)


class MdsDocuments:
    """Documents of MDS folders that other tools wrote: columns input_ids and, where there is one, domain.

    Lengths are not listed there, so each document is read once.

    Raises:
        DataError: a folder of packed rows, or without ids.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._folders = [MDSDirectory(path) for path in paths]
        for path, folder in zip(paths, self._folders):
            columns = _columns(folder)
            if "input_ids" not in columns or ROWS in columns:
                raise DataError(
                    f"{path} does not hold documents in token ids",
                    found=", ".join(sorted(columns)),
                    allowed="a column input_ids, and one document a sample",
                    fix="make a store of it with `longspan data convert --to store`",
                )
        samples = [
            (str(sample.get("domain", path.name)), np.asarray(sample["input_ids"]))
            for path, folder in zip(paths, self._folders)
            for sample in folder
        ]
        self.domains = tuple(sorted({domain for domain, _ in samples}))
        self.domain = np.array([self.domains.index(domain) for domain, _ in samples], np.uint16)
        self.tokens = np.array([len(ids) for _, ids in samples], np.int64)
        digests = [sha256_bytes(np.ascontiguousarray(ids, "<i8").tobytes())[:16] for _, ids in samples]
        self.key = np.array([int(digest, 16) for digest in digests], np.uint64)
        self.files: tuple[str, ...] = ()
        self.file = np.zeros(0, np.uint32)
        self.dtype = np.dtype(np.uint32)
        self.tokenizer: str | None = None
        self.fingerprint = sha256_bytes(" ".join(digests).encode())[:16]
        self._first = np.cumsum([0, *map(len, self._folders)])

    def ids(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return the ids `start` to `stop` of a document as uint32."""
        folder = int(np.searchsorted(self._first, document, side="right")) - 1
        sample = self._folders[folder][document - int(self._first[folder])]
        return np.asarray(sample["input_ids"])[start:stop].astype(np.uint32)


def _columns(folder: MDSDirectory) -> set[str]:
    return {column.name for info in folder.shards for column in info.columns}
