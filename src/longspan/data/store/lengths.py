"""The length table: one row per document of a token store, without its tokens.

Everything that decides which documents are trained on, and where they stand, reads this table alone:
44 bytes a document, so 100 million documents are 4 GB on disk, memory-mapped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from longspan.core.columns import load_columns, save_columns
from longspan.core.errors import DataError

KIND = "length-table"
MAX_DOCUMENTS = 2**32 - 2  # the last uint32 value stands for padding
SHARE_THRESHOLDS = (1024, 4096, 32768, 131072)
QUANTILES = {"p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}

_DTYPES: dict[str, type] = {
    "store": np.uint16,
    "source": np.uint16,
    "key": np.uint64,
    "shard": np.uint32,
    "offset": np.uint64,
    "mask_offset": np.uint64,
    "tokens": np.uint32,
    "position": np.uint32,
}
_OPTIONAL: dict[str, type] = {"characters": np.uint32}


@dataclass(frozen=True, eq=False)
class LengthTable:
    """Columns of equal length, one entry per document, in store order.

    Raises DataError when a column has another dtype or length, or a source id without a name.
    """

    source: np.ndarray
    """uint16 index into `source_names`."""
    source_names: tuple[str, ...]
    key: np.ndarray
    """uint64 identity of the document; every order and coin derives from it."""
    shard: np.ndarray
    """uint32 shard file inside the store."""
    offset: np.ndarray
    """uint64 byte offset of the token values in the raw shard file."""
    mask_offset: np.ndarray
    """uint64 byte offset of the mask values, 0 = the document has no mask."""
    tokens: np.ndarray
    """uint32 length of the document in tokens."""
    position: np.ndarray
    """uint32 index of the document inside its store."""
    store: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))
    """uint16 index of the store; may be left out when there is only one."""
    characters: np.ndarray | None = None
    """uint32 characters of the text, 0 where it is not known. None: of no document known."""

    def __post_init__(self) -> None:
        rows = len(self.tokens)
        if len(self.store) == 0 and rows:
            object.__setattr__(self, "store", np.zeros(rows, np.uint16))
        object.__setattr__(self, "source_names", tuple(self.source_names))
        if rows > MAX_DOCUMENTS:
            raise DataError("too many documents for one length table", found=rows, allowed=MAX_DOCUMENTS)
        for name, dtype in {**_DTYPES, **_OPTIONAL}.items():
            column = getattr(self, name)
            if column is None and name in _OPTIONAL:
                continue
            if column.dtype != dtype or column.shape != (rows,):
                raise DataError(
                    f"the column {name} of a length table does not fit",
                    found=f"{column.dtype} {list(column.shape)}",
                    allowed=f"{np.dtype(dtype)} [{rows}]",
                )
        if rows and int(self.source.max()) >= len(self.source_names):
            raise DataError(
                "a source id of a length table has no name",
                found=int(self.source.max()),
                allowed=f"0 to {len(self.source_names) - 1}",
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_stores(self) -> int:
        """Return the number of stores that the rows come from."""
        return int(self.store.max()) + 1 if len(self) else 1

    @cached_property
    def total_tokens(self) -> int:
        """Return the tokens of all documents together."""
        return int(self.tokens.sum(dtype=np.uint64))

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex characters over what plans depend on: stores, sources, keys and lengths.

        Shards and offsets stay out, so the same documents in other shard sizes keep their plans. About 1 s
        for 100 million documents.
        """
        digest = hashlib.sha256("\x1f".join(self.source_names).encode())
        for column in (self.store, self.source, self.key, self.tokens):
            for part in _blocks(column):
                digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the table as a folder of columns, whole or not at all."""
        names = [*_DTYPES, *(name for name in _OPTIONAL if getattr(self, name) is not None)]
        columns = {name: getattr(self, name) for name in names}
        save_columns(path, kind=KIND, head={"source_names": list(self.source_names)}, columns=columns)

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = True) -> Self:
        """Read a saved table. Raises DataError when it is incomplete or does not match its head."""
        head, columns = load_columns(path, kind=KIND, dtypes=_DTYPES, optional=_OPTIONAL, mmap=mmap)
        names = head.get("source_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path} does not name its sources", found=names)
        return cls(source_names=tuple(names), **columns)

    @classmethod
    def concatenate(cls, tables: Sequence[LengthTable]) -> LengthTable:
        """Join tables in the given order; sources merge by name, stores are numbered in order.

        One table is returned as it is; several are copied into memory.
        """
        if len(tables) == 1:
            return tables[0]
        names = tuple(dict.fromkeys(name for table in tables for name in table.source_names))
        if len(names) > 2**16:
            raise DataError("too many sources", found=len(names), allowed=f"at most {2**16}")
        number = {name: index for index, name in enumerate(names)}
        sources, stores, first_store = [], [], 0
        for table in tables:
            renumber = np.array([number[name] for name in table.source_names] or [0], np.uint16)
            sources.append(renumber[table.source])
            stores.append(table.store + np.uint16(first_store))
            first_store += table.num_stores
        plain = [name for name in _DTYPES if name not in ("source", "store")]
        counts = [table.characters for table in tables]
        characters = None
        if any(count is not None for count in counts):
            known = [
                np.zeros(len(table), np.uint32) if count is None else count
                for table, count in zip(tables, counts)
            ]
            characters = _join(known, np.uint32)
        return cls(
            source=_join(sources, np.uint16),
            store=_join(stores, np.uint16),
            source_names=names,
            characters=characters,
            **{name: _join([getattr(table, name) for table in tables], _DTYPES[name]) for name in plain},
        )

    def summary(self, name: str, title: str, *, documents: np.ndarray | None = None) -> dict[str, Any]:
        """Return the length summary per source, ready for JSON; `documents` narrows it to those of a plan.

        A document that a plan repeats counts each time. Sources without documents are left out. Quantiles
        are over documents; shares and histogram are over tokens: `share_above["4096"]` is the share of the
        source's tokens that stand in documents longer than 4096. Histogram bins are `[edge, next edge)`.
        """
        source = self.source if documents is None else self.source[documents]
        tokens = self.tokens if documents is None else self.tokens[documents]
        longest = int(tokens.max()) if len(tokens) else 0
        num_bins = max(longest.bit_length(), 1)
        # A stable sort of uint16 is a radix sort: one pass instead of one mask per source.
        order = np.argsort(source, kind="stable")
        bounds = np.cumsum(np.bincount(source, minlength=len(self.source_names)))
        sources = {}
        for index, lengths in enumerate(np.split(tokens[order], bounds[:-1])):
            if len(lengths):
                sources[self.source_names[index]] = _summarise(lengths, num_bins)
        return {"name": name, "title": title, "sources": sources}


def summary_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Flatten a length summary into table rows, one per source and a last one named "total".

    Keys: source, documents, tokens, token_share, p25 ... max, above_1024 ... above_131072 (shares of tokens).
    Quantiles of the total, max aside, are None: they do not follow from those of the sources.
    """
    sources = summary["sources"]
    total = sum(entry["tokens"] for entry in sources.values())
    rows: list[dict[str, Any]] = []
    for name, entry in sources.items():
        row = {"source": name, "documents": entry["documents"], "tokens": entry["tokens"]}
        row["token_share"] = entry["tokens"] / total if total else 0.0
        row |= entry["quantiles"]
        row |= {f"above_{limit}": share for limit, share in entry["share_above"].items()}
        rows.append(row)
    last: dict[str, Any] = {
        "source": "total",
        "documents": sum(row["documents"] for row in rows),
        "tokens": total,
    }
    last["token_share"] = 1.0 if total else 0.0
    last |= dict.fromkeys(QUANTILES)
    last["max"] = max((row["max"] for row in rows), default=0)
    for limit in SHARE_THRESHOLDS:
        above = sum(row[f"above_{limit}"] * row["tokens"] for row in rows)
        last[f"above_{limit}"] = above / total if total else 0.0
    return [*rows, last]


def _summarise(tokens: np.ndarray, num_bins: int) -> dict[str, Any]:
    total = int(tokens.sum(dtype=np.uint64))
    above = {limit: int(tokens[tokens > limit].sum(dtype=np.uint64)) for limit in SHARE_THRESHOLDS}
    # The mantissa is in [0.5, 1): a length in [2**b, 2**(b+1)) has exponent b + 1. Empty ones weigh 0.
    bins = np.maximum(np.frexp(tokens)[1] - 1, 0)
    in_bin = np.bincount(bins, weights=tokens, minlength=num_bins)
    quantiles = np.quantile(tokens, list(QUANTILES.values()), method="inverted_cdf")
    return {
        "documents": len(tokens),
        "tokens": total,
        "quantiles": {name: int(value) for name, value in zip(QUANTILES, quantiles)},
        "share_above": {str(limit): part / total if total else 0.0 for limit, part in above.items()},
        "histogram": {"edges": [2**b for b in range(num_bins + 1)], "tokens": [int(n) for n in in_bin]},
    }


def _blocks(column: np.ndarray, rows: int = 2**22) -> Iterator[np.ndarray]:
    for start in range(0, len(column), rows):
        yield column[start : start + rows]


def _join(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])
