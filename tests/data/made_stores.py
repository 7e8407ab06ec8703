"""Length tables and token stores made by hand, for tests of plans and loaders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from longspan.data.store.lengths import LengthTable


def make_table(documents: Sequence[tuple[str, int]], keys: Sequence[int] | None = None) -> LengthTable:
    """Return a table of (source, tokens) documents; keys are 0, 1, 2 ... unless given."""
    names = tuple(dict.fromkeys(source for source, _ in documents))
    count = len(documents)
    return LengthTable(
        source=np.array([names.index(source) for source, _ in documents], np.uint16),
        source_names=names,
        key=np.array(range(count) if keys is None else keys, np.uint64),
        shard=np.zeros(count, np.uint32),
        offset=np.zeros(count, np.uint64),
        mask_offset=np.zeros(count, np.uint64),
        tokens=np.array([tokens for _, tokens in documents], np.uint32),
        position=np.arange(count, dtype=np.uint32),
    )


class MadeStore:
    """A token store in memory. Document d of n tokens holds the ids 100 d, 100 d + 1, ... unless given."""

    def __init__(
        self,
        documents: Sequence[tuple[str, int]],
        *,
        ids: Sequence[Sequence[int]] | None = None,
        masks: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.lengths = make_table(documents)
        values = ids or [range(100 * d, 100 * d + tokens) for d, (_, tokens) in enumerate(documents)]
        self._ids = [np.array(list(row), np.uint16) for row in values]
        self._masks = None if masks is None else [np.array(row, np.uint8) for row in masks]
        self.fingerprint = hashlib.sha256(b"".join(row.tobytes() for row in self._ids)).hexdigest()

    def tokens(self, index: int, /) -> np.ndarray:
        return self._ids[index]

    def mask(self, index: int, /) -> np.ndarray | None:
        return None if self._masks is None else self._masks[index]
