"""What an audit found out about every document: columns that a mixture may choose by.

    AUDIT/head.json          the stores that were audited, languages by number, settings
    AUDIT/key.npy            the documents' keys, by which they are known again in other stores
    AUDIT/near_duplicate.npy ... one column a measure, in store order

A measure that was not taken of a document is NaN (numbers) or "" (language): it is never 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from longspan.core.columns import load_columns, save_columns
from longspan.core.errors import DataError
from longspan.core.log import get_logger
from longspan.data.store.lengths import LengthTable

KIND = "document audit"


class Measure(NamedTuple):
    """One column."""

    dtype: type
    words: str


MEASURES = {
    "exact_duplicate": Measure(np.uint8, "1 where the same tokens stand earlier in the stores"),
    "near_duplicate": Measure(np.uint8, "1 where an earlier document, which stays, is about the same"),
    "repeated": Measure(np.float32, "share of the document's runs of 10 tokens that it had before"),
    "compression": Measure(np.float32, "bytes of its ids after zstd / before: small where it repeats itself"),
    "repeated_lines": Measure(np.float32, "share of its tokens in lines that it had before"),
    "boilerplate": Measure(np.float32, "share of its tokens in lines of 10 documents or more"),
    "symbols": Measure(
        np.float32, "share of its characters that are neither letters nor space: logs, tables"
    ),
    "language": Measure(np.uint8, "what a part of its middle is written in, such as en; zxx: no language"),
    "long_range": Measure(np.float32, "nats a token that far context saves a model"),
}
"""Measures by name. The first four are always taken, language and those of lines with a tokenizer, the last with
a model."""
ALWAYS = ("exact_duplicate", "near_duplicate", "repeated", "compression")


class AuditedStore(NamedTuple):
    """One of the stores that the rows of an audit belong to, in order."""

    path: str
    documents: int
    digest: str
    """Of the documents' keys and lengths: by it the store is known again."""


@dataclass(frozen=True, eq=False)
class Measures:
    """Columns of equal length, one entry per document of the audited stores, in their order."""

    columns: dict[str, NDArray[Any]]
    stores: tuple[AuditedStore, ...]
    languages: tuple[str, ...] = ()
    """Names by the number in the column `language`; the first is "": not known."""
    settings: Mapping[str, Any] | None = None
    keys: NDArray[np.uint64] | None = None
    """Of the documents; None in audits of earlier releases."""

    def save(self, path: str | Path) -> None:
        """Write the folder, whole or not at all."""
        head = {
            "stores": [store._asdict() for store in self.stores],
            "languages": list(self.languages),
            "settings": dict(self.settings or {}),
        }
        keys = {} if self.keys is None else {"key": self.keys}
        save_columns(path, kind=KIND, head=head, columns={**self.columns, **keys})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a saved audit. Raises DataError when the folder is incomplete or of another kind."""
        dtypes = {name: measure.dtype for name, measure in MEASURES.items()}
        always = {name: dtypes.pop(name) for name in ALWAYS}
        head, columns = load_columns(path, kind=KIND, dtypes=always, optional={**dtypes, "key": np.uint64})
        keys = columns.pop("key", None)
        try:
            stores = tuple(AuditedStore(**store) for store in head["stores"])
            languages = tuple(str(name) for name in head["languages"])
            settings = dict(head["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the head of the audit {path} is damaged", found=str(error)) from None
        rows = sum(store.documents for store in stores)
        named = "language" not in columns or int(columns["language"].max(initial=0)) < len(languages)
        every = [*columns.values(), *([] if keys is None else [keys])]
        if not named or any(len(column) != rows for column in every):
            raise DataError(
                f"the audit {path} contradicts itself", found=f"{rows} documents", fix="audit again"
            )
        return cls(columns, stores, languages, settings, keys)

    def of(self, lengths: LengthTable) -> dict[str, NDArray[Any]]:
        """Return the columns for the documents of a length table, whose stores may be some of those audited.

        A store that was not audited itself is known by the keys of its documents: source and text, whatever the
        tokenizer. That is said, for shares are of the tokens that were audited.

        Raises:
            DataError: a store with documents that were not audited, or that has changed since.
        """
        starts = np.cumsum([0, *(store.documents for store in self.stores)])
        known: dict[str, list[slice]] = {}
        for store, start, stop in zip(self.stores, starts, starts[1:]):
            known.setdefault(store.digest, []).append(slice(start, stop))
        rows = np.empty(len(lengths), np.int64)
        others = np.zeros(len(lengths), bool)
        for number in range(lengths.num_stores):
            here = lengths.store == number
            found = known.get(digest_of(lengths.key[here], lengths.tokens[here]))
            if not found:
                others |= here
                continue
            # A store that was named twice: the second time its documents are duplicates.
            place = found[0] if len(found) == 1 else found.pop(0)
            rows[here] = np.arange(place.start, place.stop)
        if others.any():
            rows[others] = self._rows_of(np.asarray(lengths.key[others]))
        columns = {name: column[rows] for name, column in self.columns.items()}
        if "language" in columns:
            columns["language"] = np.array(self.languages)[columns["language"]]
        return columns

    def _rows_of(self, wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the rows of documents by their keys; of copies the first is the first. Raises DataError."""
        missing = len(wanted)
        if self.keys is not None:
            order = np.argsort(self.keys, kind="stable")
            ordered = self.keys[order]
            first = np.searchsorted(ordered, wanted, side="left")
            last = np.searchsorted(ordered, wanted, side="right") - 1
            missing = int(np.count_nonzero(last < first))
            if not missing:
                fewer = "; of some near duplicates the one that stays may not be among them"
                get_logger("data.audit").info(
                    "%s documents are known to the audit of %s by source and text alone: its shares are of the tokens "
                    "that were audited%s",
                    f"{len(wanted):,}", ", ".join(store.path for store in self.stores),
                    fewer if len(wanted) < len(self.keys) else "",
                )  # fmt: skip
                return order[np.minimum(first + _copies_before(wanted), last)]
        raise DataError(
            "the audit is not of these stores",
            found=f"{len(wanted):,} documents of other stores, of which {missing:,} were not audited",
            allowed=", ".join(f"{store.path} ({store.documents} documents)" for store in self.stores),
            fix="run `longspan data audit` on the stores that are mixed; or, of raw input, read it as they were: the "
            "same files, --text-field, --source-field and --group-by",
        )


def _copies_before(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each key how many equal ones stand before it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    before = np.empty(len(keys), np.int64)
    before[order] = np.arange(len(keys)) - np.searchsorted(ordered, ordered, side="left")
    return before


def digest_of(keys: NDArray[np.uint64], tokens: NDArray[np.uint32]) -> str:
    """Return 16 hex characters by which the documents of a store are known again, from their keys and lengths."""
    digest = hashlib.sha256(np.ascontiguousarray(keys, np.uint64).data)
    digest.update(np.ascontiguousarray(tokens, np.uint32).data)
    return digest.hexdigest()[:16]
