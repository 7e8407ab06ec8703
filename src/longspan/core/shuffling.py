"""Random orders that are functions of a seed, too long to be written down.

`permuted(n, places, ...)` gives any entries of a permutation of n without making the others: the first 1000
of 10 billion cost the memory of 1000.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longspan.core.seeds import derive_seed

ROUNDS = 4
BLOCK = 2**20


def hashed(values: NDArray[np.uint64], seed: int, *purpose: object) -> NDArray[np.uint64]:
    """Return a hash of each value: the finaliser of SplitMix64 (Steele et al. 2014), salted by the purpose.

    Works block by block, so memory is that of the result.
    """
    salt = np.uint64(derive_seed(seed, *purpose))
    hashes = np.empty(values.shape, np.uint64)
    for start in range(0, len(values), BLOCK):
        part = slice(start, start + BLOCK)
        x = values[part].astype(np.uint64) ^ salt
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        hashes[part] = x
    return hashes


def permuted(count: int, places: NDArray[np.integer], seed: int, *purpose: object) -> NDArray[np.int64]:
    """Return the entries at `places` of a permutation of 0 ... count - 1.

    A Feistel network of four rounds permutes the next power of four; what falls outside `count` walks on along
    its cycle until it is inside (Black and Rogaway 2002), 4 steps at most on average.
    """
    half = np.uint64(max((count - 1).bit_length() + 1, 2) // 2)
    low = np.uint64((1 << int(half)) - 1)
    values = np.array(places, np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        x = values[outside]
        left, right = x >> half, x & low
        for number in range(ROUNDS):
            left, right = right, left ^ (hashed(right, seed, *purpose, number) & low)
        values[outside] = left << half | right
        outside = outside[values[outside] >= np.uint64(count)]
    return values.astype(np.int64)
