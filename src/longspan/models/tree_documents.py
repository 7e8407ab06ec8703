"""The document table of a row in which documents branch: what answers share is computed once.

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
import torch
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import NO_LIMIT, Bands, cut_documents
from longspan.kernels.scans import Convolution, Scan
from longspan.models.documents import Documents

__all__ = ["TreeDocuments"]


class TreeDocuments(Documents):
    """Parts of documents of which some branch off others.

    Args:
        cu_seqlens: int64 [parts + 1], borders of the parts.
        branches: int64 [parts, 2]: the part that each branches off, -1 = none, and the position of its first token,
            so many tokens of the parts before it are seen.

    Raises:
        ArgumentError: a part branches off one behind it, or where that one is not.
    """

    def __init__(self, cu_seqlens: NDArray[np.int64], branches: NDArray[np.integer]) -> None:
        super().__init__(cu_seqlens)
        self.branches = np.asarray(branches, np.int64).reshape(-1, 2)
        self.branches.setflags(write=False)
        parents, first = self.branches.T
        lengths = np.diff(cu_seqlens)
        known = len(parents) == len(lengths) and bool((parents < np.arange(len(parents))).all())
        branching = parents >= 0
        if not known or (first[~branching] != 0).any() or not self._in_parents(lengths):
            raise ArgumentError(
                "the parts of a tree of documents do not fit together", found=self.branches[:8].tolist()
            )

    def _in_parents(self, lengths: NDArray[np.int64]) -> bool:
        own = self.branches[self.branches[:, 0] >= 0]
        seen = own[:, 1] - self.branches[own[:, 0], 1]
        return bool(((seen >= 0) & (seen <= lengths[own[:, 0]])).all())

    def __repr__(self) -> str:
        branching = int((self.branches[:, 0] >= 0).sum())
        return f"TreeDocuments({len(self) - branching} documents, {branching} branches, {self.num_tokens} tokens)"

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return int64 [tokens], counted on within each branch from where it leaves."""
        starts = self.cu_seqlens[:-1] - self.branches[:, 1]
        counted = np.arange(self.num_tokens) - np.repeat(starts, np.diff(self.cu_seqlens))
        return torch.from_numpy(counted).to(device)

    def bands(self, window: int | None = None, attention_chunk: int | None = None) -> Bands:
        """Return who sees whom: each part itself, and what it follows of those that it branches off."""
        longest = int((self.branches[:, 1] + np.diff(self.cu_seqlens)).max())
        window = None if window is None or window >= longest else window
        chunk = None if attention_chunk is None or attention_chunk >= longest else attention_chunk
        if (window, chunk) not in self._bands:
            self._bands[window, chunk] = self._make_bands(window, chunk)
        return self._bands[window, chunk]

    def _make_bands(self, window: int | None, chunk: int | None) -> Bands:
        # Columns: first query, queries, first key, keys, lo, hi.
        found: list[tuple[int, int, int, int, int, int]] = []
        hi = NO_LIMIT if window is None else window - 1
        for part, (parent, first) in enumerate(self.branches.tolist()):
            start, length = int(self.cu_seqlens[part]), int(np.diff(self.cu_seqlens)[part])
            # Chunks end at multiples of positions: the first of a branch may have begun before it.
            head = length if chunk is None else min(length, chunk - first % chunk)
            own = cut_documents(np.array([0, length - head]), chunk)[:-1] + head
            cuts = [0, *(own.tolist() if length > head else []), length]
            for begin, end in pairwise(cuts):
                found.append((start + begin, end - begin, start + begin, end - begin, 0, hi))
            oldest = 0 if chunk is None else first // chunk * chunk
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

    def convolve(self, call: Convolution, *, layer: int | None = None) -> torch.Tensor:
        """Refuse it: a branch would need what its parent's tokens left behind. Raises ArgumentError."""
        raise ArgumentError("documents that branch are not computed by layers with a state")

    def scan(self, scan: Scan, *, layer: int | None = None) -> torch.Tensor:
        """Refuse it, as `convolve`. Raises ArgumentError."""
        raise ArgumentError("documents that branch are not computed by layers with a state")
