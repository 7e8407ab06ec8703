"""Random streams named by what they are for.

Every random choice takes a generator derived from (run seed, purpose, index...), so adding one draw
somewhere never shifts the draws elsewhere and no result depends on execution order.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *purpose: object) -> int:
    """Return a 63-bit seed that is a pure function of the run seed and the purpose."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return (
        int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        >> 1
    )


def rng(seed: int, *purpose: object) -> np.random.Generator:
    """Return a numpy generator for one purpose: `rng(seed, "needle", length, depth, sample)`."""
    return np.random.default_rng(derive_seed(seed, *purpose))
