"""Dense attention in tiles of queries, for what no flash kernel takes: any dtype, any head dimension.

Each tile is the reference over the keys that its queries may see, so the scores held at once are bounded whatever
the length. Slow, and linear in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from longspan.kernels.attention.bands import Bands
from longspan.kernels.attention.merging import accumulation_dtype
from longspan.kernels.attention.reference import ReferenceKernel

__all__ = ["TiledKernel", "tiled_bytes"]

TILE_BYTES = 1 << 28
"""Of one tile's scores in fp32, of which three copies are held; at least one query is taken at a time."""


def tiled_bytes(*, heads: int, kv_heads: int, head_dim: int, keys: int) -> int:
    """Return the bytes of a forward pass beside what it is given: scores of a tile, its keys and values in fp32."""
    item = torch.float32.itemsize
    # Keys and values are cast up, and laid out for the product.
    return 3 * max(TILE_BYTES, heads * keys * item) + 2 * 2 * kv_heads * head_dim * keys * item


class TiledKernel:
    """The reference, one tile of queries at a time; parts of gradients are summed in fp32 at least."""

    name = "tiled"
    upcasts = True
    spread_by_queries = False

    def __init__(self, *, softcap: float | None = None) -> None:
        self._reference = ReferenceKernel(softcap=softcap)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bands: Bands, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, H, D] in q's dtype and lse [T, H]; a query that sees nothing gets 0 and -inf."""
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=accumulation_dtype(q), device=q.device)
        for rows, keys, part in _tiles(bands, q, k):
            out[rows], lse[rows] = self._reference.forward(q[rows], k[keys], v[keys], part, scale)
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        bands: Bands,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dq, dk, dv; `out` and `lse` belong to the whole attention; k, v may be a part of it."""
        dq = torch.zeros_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=accumulation_dtype(x), device=x.device) for x in (k, v))
        for rows, keys, part in _tiles(bands, q, k):
            # The keys of a tile are cast up first, so that its part of their gradients comes unrounded.
            dq[rows], dk_part, dv_part = self._reference.backward(
                dout[rows], q[rows], k[keys].to(dk.dtype), v[keys].to(dv.dtype), out[rows], lse[rows], part, scale
            )  # fmt: skip
            dk[keys] += dk_part
            dv[keys] += dv_part
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _tiles(bands: Bands, q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, slice, Bands]]:
    """Yield rows of queries, the keys that they may see, and the bands between the two."""
    row_bytes = q.shape[1] * k.shape[0] * accumulation_dtype(q).itemsize
    num_rows = max(1, TILE_BYTES // max(1, row_bytes))
    for start in range(0, q.shape[0], num_rows):
        end = min(start + num_rows, q.shape[0])
        first = np.maximum(bands.q_start, start)
        length = np.clip(np.minimum(bands.q_start + bands.q_len, end) - first, 0, None)
        shift = first - bands.q_start
        here = length > 0
        part = Bands(
            (first - start)[here], length[here], bands.k_start[here], bands.k_len[here],
            lo=(bands.lo - shift)[here], hi=(bands.hi - shift)[here],
        )  # fmt: skip
        if len(part):
            low, high = int(part.k_start.min()), int((part.k_start + part.k_len).max())
            moved = Bands(part.q_start, part.q_len, part.k_start - low, part.k_len, lo=part.lo, hi=part.hi)
            yield slice(start, end), slice(low, high), moved
