"""Parts of documents of which some branch off others: what answers share is computed once.

A trace of three answers, the thoughts of which a template drops once they are answered, is one trunk and two branches:

    trunk     p p p a a q q q b b r r r T c c         positions 0 1 2 3 ... 15
    branch    p T a a                                 2 3 4 5: sees p p of the trunk, then itself
    branch    q T b b                                 7 8 9 10: sees p p p a a q q

A branch begins with a copy of the last token that it shares, so that every label is the next token of its own part, as
in any document. What a token sees, and at which position, is what it would see in a row of its answer's own.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError
from longspan.kernels.attention.bands import NO_LIMIT, Bands, cut_documents

__all__ = ["DocumentTree"]


class DocumentTree:
    """Where the parts of a row begin and end, and what each branches off.

    Args:
        cu_seqlens: int64 [parts + 1], borders of the parts.
        branches: int64 [parts, 2]: the part that each branches off, -1 = none, and the position of its first token,
            so many tokens of the parts before it are seen.

    Raises:
        ArgumentError: a part branches off one behind it, or where that one is not.
    """

    def __init__(self, cu_seqlens: NDArray[np.int64], branches: NDArray[np.integer]) -> None:
        self.cu_seqlens = cu_seqlens
        self.branches = np.asarray(branches, np.int64).reshape(-1, 2)
        self.branches.setflags(write=False)
        parents, first = self.branches.T
        self._lengths = np.diff(cu_seqlens)
        known = len(parents) == len(self._lengths) and bool((parents < np.arange(len(parents))).all())
        if not known or (first[parents < 0] != 0).any() or not self._in_parents():
            raise ArgumentError(
                "the parts of a tree of documents do not fit together", found=self.branches[:8].tolist()
            )

    def _in_parents(self) -> bool:
        own = self.branches[self.branches[:, 0] >= 0]
        seen = own[:, 1] - self.branches[own[:, 0], 1]
        return bool(((seen >= 0) & (seen <= self._lengths[own[:, 0]])).all())

    @property
    def ends(self) -> NDArray[np.int64]:
        """Tokens from the root to the end of each part, [parts]: the length of its sample as far as it goes."""
        return self.branches[:, 1] + self._lengths

    @property
    def num_branches(self) -> int:
        """Parts that branch off another."""
        return int((self.branches[:, 0] >= 0).sum())

    def padded(self, num_tokens: int) -> DocumentTree:
        """Return the tree of a row of so many tokens: what is past its last part is a part of its own."""
        if self.cu_seqlens[-1] >= num_tokens:
            return self
        return DocumentTree(
            np.append(self.cu_seqlens, num_tokens), np.append(self.branches, [[-1, 0]], axis=0)
        )

    def positions(self) -> NDArray[np.int64]:
        """Return the position of each token, counted on within each branch from where it leaves: int64 [tokens]."""
        starts = self.cu_seqlens[:-1] - self.branches[:, 1]
        return np.arange(int(self.cu_seqlens[-1])) - np.repeat(starts, self._lengths)

    def bands(self, window: int | None = None, attention_chunk: int | None = None) -> Bands:
        """Return who sees whom: each part itself, and what it follows of those that it branches off.

        `window` and `attention_chunk` are tokens of a sample, as in a row of its own; None = none.
        """
        # Columns: first query, queries, first key, keys, lo, hi.
        found: list[tuple[int, int, int, int, int, int]] = []
        hi = NO_LIMIT if window is None else window - 1
        for part, (parent, first) in enumerate(self.branches.tolist()):
            start, length = int(self.cu_seqlens[part]), int(self._lengths[part])
            # Chunks end at multiples of positions: the first of a branch may have begun before it.
            head = (
                length if attention_chunk is None else min(length, attention_chunk - first % attention_chunk)
            )
            own = cut_documents(np.array([0, length - head]), attention_chunk)[:-1] + head
            cuts = [0, *(own.tolist() if length > head else []), length]
            for begin, end in pairwise(cuts):
                found.append((start + begin, end - begin, start + begin, end - begin, 0, hi))
            oldest = 0 if attention_chunk is None else first // attention_chunk * attention_chunk
            end = first
            while parent >= 0 and end > oldest:
                base = int(self.branches[parent, 1])
                low = max(base, oldest)
                if low < end:
                    key = int(self.cu_seqlens[parent]) + low - base
                    # Query i stands at first + i, key j at low + j.
                    limit = NO_LIMIT if window is None else window - 1 - first + low
                    found.append((start, head, key, end - low, -NO_LIMIT, limit))
                end, parent = min(end, base), int(self.branches[parent, 0])
        q_start, q_len, k_start, k_len, lo, limits = map(np.array, zip(*found))
        return Bands(q_start, q_len, k_start, k_len, lo=lo, hi=limits)
