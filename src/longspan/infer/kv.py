"""Keys and values of a prefix tree, and attention over parts of them; who sees what is said in `infer.tree_passes`.

Strands (`infer.prefix_tree`) that are read together have their keys in one block, one strand behind the other, with
room for what they are going to say:

    block of the trunk       | h h h h h h h h |
    block of all branches    | n h h q . . | n h q . . | q . . |

A query sees the keys of its own strand up to itself, and of each ancestor those before the fork. Each is a band
(`kernels.attention.Bands`). Bands over one block in which no query stands twice make one `KernelCall`;
parts cover disjoint keys and are joined by their log-sum-exp. Keys are never copied: branches read the trunk's
where they lie, all in one call.

Shape legend: T = tokens of a pass, S = rows of a block, H = query heads, K = key/value heads, D = head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from longspan.infer.kv_types import KvDtype, held, read_back
from longspan.infer.prefix_tree import Strand
from longspan.kernels.attention import AttentionKernel, Bands, merge
from longspan.kernels.attention.merging import accumulation_dtype

__all__ = ["KernelCall", "KvBlock", "Segment", "StrandPlace", "attend_parts"]


class KvBlock:
    """Keys and values of `rows` tokens in every layer; memory is taken when a layer first writes.

    Held as they are computed, or in a smaller type (`infer.kv_types`).
    """

    def __init__(self, rows: int, kernel: AttentionKernel, kind: KvDtype | None = None) -> None:
        self.rows = rows
        self._widen, self._kind = kernel.upcasts, kind
        self._dtype = torch.float32
        self._layers: dict[int, tuple[torch.Tensor, ...]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(tensor.nbytes for kept in self._layers.values() for tensor in kept)

    def append(
        self, layer: int, rows: slice | torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> None:
        """Write keys and values of a pass to their rows."""
        # A kernel that computes in fp32 would cast all that it reads, again and again.
        self._dtype = torch.promote_types(k_TKD.dtype, torch.float32) if self._widen else k_TKD.dtype
        fresh: tuple[torch.Tensor, ...] = (k_TKD, v_TKD)
        if self._kind is not None:
            fresh = (*held(self._kind, k_TKD), *held(self._kind, v_TKD))
        if layer not in self._layers:
            dtypes = [self._dtype if self._kind is None else each.dtype for each in fresh]
            self._layers[layer] = tuple(self._empty(each, dtype) for each, dtype in zip(fresh, dtypes))
        for kept, new in zip(self._layers[layer], fresh):
            if isinstance(rows, slice):
                kept[rows] = new
            else:
                kept.index_copy_(0, rows, new.to(kept.dtype))

    def read(self, layer: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [S, K, D] of some rows, uncopied where they are held as computed."""
        parts = tuple(kept[rows] for kept in self._layers[layer])
        if self._kind is None:
            return parts[0], parts[1]
        half = len(parts) // 2
        keys, values = parts[:half], parts[half:]
        return read_back(self._kind, keys, self._dtype), read_back(self._kind, values, self._dtype)

    def move(self, rows: int, moves: Sequence[tuple[int, int, int]]) -> None:
        """Take `rows` rows instead and bring tokens along: (old row, new row, how many)."""
        self.rows = rows
        for layer, kept in self._layers.items():
            moved = tuple(self._empty(tensor, tensor.dtype) for tensor in kept)
            for old, new, count in moves:
                for source, target in zip(kept, moved):
                    target[new : new + count] = source[old : old + count]
            self._layers[layer] = moved

    def copy(self, source: int, target: int, count: int) -> None:
        """Let `count` rows from `target` on be as those from `source` on, which are others."""
        for kept in self._layers.values():
            for tensor in kept:
                tensor[target : target + count] = tensor[source : source + count]

    def clear(self, row: int, count: int) -> None:
        """Let rows be as if nothing had been written; see `_empty`."""
        for kept in self._layers.values():
            for tensor in kept:
                tensor[row : row + count] = 0

    def _empty(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return rows [S, K, D]: zeros, because a dense kernel multiplies what no query sees by 0, and 0 * NaN is NaN.

        On a CPU a head's keys lie together: a token that reads all of them then walks along memory, up to three times
        as fast as from head to head.
        """
        heads, width = like.shape[1:]
        if like.device.type == "cpu":
            return like.new_zeros((heads, self.rows, width), dtype=dtype).transpose(0, 1)
        return like.new_zeros((self.rows, heads, width), dtype=dtype)


class StrandPlace(NamedTuple):
    """Where the keys of a strand lie."""

    block: KvBlock
    row: int
    room: int
    """Rows for its own tokens and for those that it is going to say."""


class Segment(NamedTuple):
    """Tokens of a strand that are read in one pass: its tokens first .. last - 1."""

    strand: Strand
    first: int
    last: int


class KernelCall(NamedTuple):
    """One kernel call: the queries of a pass over some rows of a block."""

    block: KvBlock
    keys: slice
    bands: Bands
    """Keys are counted from the start of `keys`."""


def attend_parts(
    q_THD: torch.Tensor, parts: Sequence[KernelCall], *, layer: int, scale: float, kernel: AttentionKernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [T, H, D] and lse [T, H] over the keys of all parts: 0 and -inf where none are seen."""
    joined: tuple[torch.Tensor, torch.Tensor] | None = None
    for block, keys, bands in parts:
        k_SKD, v_SKD = block.read(layer, keys)
        found = kernel.forward(q_THD.to(k_SKD.dtype), k_SKD, v_SKD, bands, scale)
        joined = found if joined is None else merge(*joined, *found)
    if joined is None:
        out = q_THD.new_zeros(q_THD.shape, dtype=accumulation_dtype(q_THD))
        return out, out.new_full(out.shape[:2], float("-inf"))
    return joined
