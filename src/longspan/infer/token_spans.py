"""Attention of single tokens, each over all of some keys that lie together: what decoding asks for.

What one token sees is a rectangle, and the queries of heads that read the same key head can stand as rows of their
own, [T * G, K, D]: for most kernels G rows of one head cost less than G heads of one row, and tokens that see the same
keys read them once.

A kernel that spreads its work over (sequence, head, block of queries) would leave a GPU empty then: one sequence and 8
key heads are 8 blocks, each of which walks over all keys. FlashAttention-2 cuts the keys itself, but only where every
sequence has one query and several query heads read a key head. So the rows of such a kernel stay as they are where each
token has keys of its own, and elsewhere the keys are cut here, in pieces of one launch that are joined afterwards.

Shape legend: T = tokens, S = rows of keys, H = query heads, K = key/value heads, G = H / K, D = head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.kernels.attention import NO_LIMIT, AttentionKernel, Bands
from longspan.kernels.attention.merging import merge_pieces

__all__ = ["TokenSpans"]

BLOCKS = 128
"""Pieces times key heads that occupy a GPU: about one for each of its multiprocessors."""
PIECE_KEYS = 1024
"""Shorter pieces cost more to join than they save."""


class _Layout(NamedTuple):
    bands: Bands
    folded: bool
    """Rows are those of the heads that read a key head."""
    pieces: int


class TokenSpans:
    """Keys k_start .. k_start + k_len - 1 for each of some tokens; a length of 0 is a token that sees none.

    Args:
        k_start, k_len: [T]; one token at least sees something.
    """

    def __init__(self, k_start: NDArray[np.int64], k_len: NDArray[np.int64]) -> None:
        seeing = k_len > 0
        first = int(k_start[seeing].min())
        self.keys = slice(first, int(k_start[seeing].max() + k_len.max()))
        """Rows that hold what the tokens see, and as many behind the last beginning as behind any: a kernel may read
        rows of one length. Where there are fewer, so many."""
        self.num_pairs = int(k_len.sum())
        self._k_start, self._k_len = np.where(seeing, k_start - first, 0), k_len
        self._layouts: dict[tuple[int, int, bool], _Layout] = {}

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, kernel: AttentionKernel
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, H, D] and lse [T, H] of q [T, H, D] over the rows `keys` of all keys [S, K, D]."""
        num_tokens, num_heads, head_dim = q.shape
        kv_heads = k.shape[1]
        groups = num_heads // kv_heads
        key = groups, kv_heads, kernel.spread_by_queries
        if key not in self._layouts:
            self._layouts[key] = self._layout(*key)
        bands, folded, pieces = self._layouts[key]
        if not folded:
            return kernel.forward(q, k, v, bands, scale)
        # [T, H, D] -> [T, K, G, D] -> [T, G, K, D] -> [T * G, K, D]
        rows = q.view(num_tokens, kv_heads, groups, head_dim).transpose(1, 2).reshape(-1, kv_heads, head_dim)
        out, lse = kernel.forward(rows.repeat(pieces, 1, 1) if pieces > 1 else rows, k, v, bands, scale)
        if pieces > 1:
            out, lse = merge_pieces(out.unflatten(0, (pieces, -1)), lse.unflatten(0, (pieces, -1)))
        out = out.view(num_tokens, groups, kv_heads, head_dim).transpose(1, 2).reshape(q.shape)
        return out, lse.view(num_tokens, groups, kv_heads).transpose(1, 2).reshape(q.shape[:2])

    def _layout(self, groups: int, kv_heads: int, spread_by_queries: bool) -> _Layout:
        # Neighbours that see the same keys are one rectangle.
        changes = (np.diff(self._k_start) != 0) | (np.diff(self._k_len) != 0)
        first = np.flatnonzero(np.concatenate([[True], changes]))
        count = np.diff(np.append(first, len(self._k_start)))
        k_start, k_len = self._k_start[first], self._k_len[first]
        if spread_by_queries and groups > 1 and (count == 1).all():
            return _Layout(Bands(first, count, k_start, k_len, lo=-NO_LIMIT), folded=False, pieces=1)
        pieces = 1
        if spread_by_queries:
            wanted = -(-BLOCKS // (len(first) * kv_heads))
            pieces = max(1, min(wanted, int(k_len.max()) // PIECE_KEYS))
        cuts = np.arange(pieces + 1)[:, None] * k_len // pieces
        rows = len(self._k_start) * groups
        q_start = np.arange(pieces)[:, None] * rows + first * groups
        columns = (
            q_start,
            np.broadcast_to(count * groups, q_start.shape),
            k_start + cuts[:-1],
            np.diff(cuts, axis=0),
        )
        q_start, q_len, k_start, k_len = (column.reshape(-1) for column in columns)
        return _Layout(Bands(q_start, q_len, k_start, k_len, lo=-NO_LIMIT), folded=True, pieces=pieces)
