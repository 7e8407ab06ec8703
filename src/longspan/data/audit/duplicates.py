"""Which documents stand in the stores twice, as they are or nearly so.

Near duplicates are found by MinHash (Broder 1997) in bands: documents whose signatures agree in a band are looked at,
first by their signatures, then by their tokens, so that what is called a duplicate is one. Memory: about 30 bytes a
document, and the shingles of some documents; the rest is on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.progress import progress
from longspan.data.audit.measuring import PERMUTATIONS, similarity

NONE = np.uint32(2**32 - 1)
FOUND_AT_LIMIT = 0.99
"""Of pairs that are just as similar as the limit, so many are looked at."""
_CHAIN = 4
_CACHED = 4096


class SignatureBands(NamedTuple):
    """`number` bands of `rows` values each: a pair of similarity s agrees in one with 1 - (1 - s^rows)^number."""

    number: int
    rows: int


def bands_for(limit: float) -> SignatureBands:
    """Return the longest bands that let too few pairs through to miss any, for pairs from `limit` on."""
    for rows in range(PERMUTATIONS, 0, -1):
        bands = SignatureBands(PERMUTATIONS // rows, rows)
        if 1 - (1 - limit**rows) ** bands.number >= FOUND_AT_LIMIT:
            return bands
    raise AssertionError(limit)


def earlier_equal(keys: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return for each document the last one before it with an equal key; NONE where there is none."""
    earlier = np.full(len(keys), NONE, np.uint32)
    order = np.argsort(keys, kind="stable").astype(np.uint32)
    same = keys[order[1:]] == keys[order[:-1]]
    earlier[order[1:][same]] = order[:-1][same]
    return earlier


def first_of(digests: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return for each document the first one with the same digest, which may be itself."""
    _, first, same = np.unique(digests, return_index=True, return_inverse=True)
    return first[same].astype(np.uint32)


def near_duplicates(
    signatures: NDArray[np.uint32],
    exact: NDArray[np.uint32],
    shingles_of: Callable[[int], NDArray[np.uint64]],
    limit: float,
    earlier: NDArray[np.uint32],
) -> NDArray[np.uint32]:
    """Return for each document the one that stays in its place, which may be itself.

    Args:
        signatures: [documents, PERMUTATIONS].
        exact: [documents], from `first_of`.
        shingles_of: reads the shingles of a document.
        limit: Jaccard similarity from which on two are the same.
        earlier: [bands, documents], room to work in.
    """
    bands = bands_for(limit)
    any_earlier = np.zeros(len(exact), bool)
    for band in range(bands.number):
        part = signatures[:, band * bands.rows : (band + 1) * bands.rows]
        key = np.zeros(len(exact), np.uint64)
        for column in range(bands.rows):
            key = key * np.uint64(0x9E3779B97F4A7C15) + part[:, column] + np.uint64(1)
        earlier[band] = earlier_equal(key)
        any_earlier |= earlier[band] != NONE
    stays = exact.copy()
    numbers = np.arange(len(exact), dtype=np.uint32)
    looked_at = np.flatnonzero(any_earlier & (exact == numbers))
    read = lru_cache(maxsize=_CACHED)(shingles_of)
    margin = limit - 4 * (limit * (1 - limit) / PERMUTATIONS) ** 0.5
    with progress("near duplicates", total=len(looked_at), unit="documents") as bar:
        for document in looked_at.tolist():
            for other in _candidates(document, earlier, stays):
                agree = np.count_nonzero(signatures[document] == signatures[other])
                if agree >= margin * PERMUTATIONS and similarity(read(document), read(other)) >= limit:
                    stays[document] = other
                    break
            bar.advance()
    # A copy of a document goes where its first goes.
    return stays[exact]


def _candidates(document: int, earlier: NDArray[np.uint32], stays: NDArray[np.uint32]) -> list[int]:
    """Return documents that stay and share a band with this one, those that share most first."""
    found: Counter[int] = Counter()
    for band in earlier:
        other = band[document]
        for _ in range(_CHAIN):
            if other == NONE:
                break
            found[int(stays[other])] += 1
            other = band[other]
    return [other for other, _ in found.most_common()]
