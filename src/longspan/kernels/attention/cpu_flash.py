"""Attention on CPU through torch's own flash kernel, one call per block it can express.

The kernel (`aten._scaled_dot_product_flash_attention_for_cpu`) knows a full rectangle, a causal rectangle
aligned top left, and a small additive mask. Every band is cut into such pieces:

    causal document             one causal call; documents of equal length share one batched call
    shifted causal band         the keys that every query sees (full) + a causal rest
    sliding window              query tiles against the keys in reach, with a mask of one tile
    rectangles of many widths   one batched call, with a mask of the keys behind each: single tokens that are generated

Pieces that share queries are joined through their log-sum-exp; in the backward pass each piece is called
with the joined output and lse, and the gradients add up. Memory is linear in tokens; no mask is larger than
a tile. A query never sees a row without a visible key here (`Bands` trims them), which the kernel would
give lse 0 instead of -inf.

bf16 and fp16 are computed in fp32: the kernel's bf16 backward is about 7 times slower than its fp32 one.

Shape legend: N = bands of a group, L = queries, M = keys, H = query heads, K = key/value heads, D = head dim.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from longspan.kernels.attention.bands import NO_LIMIT, Bands, Geometry
from longspan.kernels.attention.merging import merge

__all__ = ["CpuFlashKernel"]

BATCHED_QUERY_ROWS = 1024
"""Bands up to this many queries are gathered into one batched call; longer ones run alone, uncopied."""

MASK_ELEMENTS = 1 << 22
"""Largest mask, in elements (16 MiB in fp32)."""

CALL_KEYS = 128
"""A kernel call of its own costs about as much as reading so many keys that a mask hides."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class BandPiece(NamedTuple):
    """One kernel call of a band: query rows and keys as half-open ranges within the band."""

    rows: tuple[int, int]
    keys: tuple[int, int]
    causal: bool
    """Top-left aligned: query rows[0] + n sees keys[0] .. keys[0] + n."""
    diagonal: tuple[int, int] | None
    """Limits (lo, hi) of (row - rows[0]) - (key - keys[0]) for a tile with a mask; None = no mask."""


class CpuFlashKernel:
    """torch's flash attention for CPU over a table of bands; fp32 and fp64, lower precisions through fp32."""

    name = "cpu_flash"
    upcasts = True
    spread_by_queries = False

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bands: Bands, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, H, D] in q's dtype and lse [T, H] in fp32 or fp64; unseeing rows get 0, -inf."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
        calls, num_rows = _forward_calls(bands, num_keys=len(k))
        if calls and num_rows == len(q):
            parts = [self._forward_call(q_, k_, v_, call, scale) for call in calls]
            outs = [out_nhld.transpose(1, 2).flatten(0, 1) for out_nhld, _ in parts]
            lses = [lse_nhl.transpose(1, 2).flatten(0, 1) for _, lse_nhl in parts]
            out, lse = (each[0] if len(calls) == 1 else torch.cat(each) for each in (outs, lses))
            return out.to(q.dtype), lse
        out = torch.zeros(q.shape, dtype=dtype, device=q.device)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=dtype, device=q.device)
        for call in calls:
            out_nhld, lse_nhl = self._forward_call(q_, k_, v_, call, scale)
            if not bands.queries_overlap and _step(call.q_starts, call.geometry.q_len):
                _segments(out, call.q_starts, call.geometry.q_len).copy_(out_nhld)
                _segments(lse[..., None], call.q_starts, call.geometry.q_len)[..., 0].copy_(lse_nhl)
                continue
            for index, start in enumerate(call.q_starts):
                rows = slice(start, start + call.geometry.q_len)
                part = out_nhld[index].transpose(0, 1), lse_nhl[index].transpose(0, 1)
                if bands.queries_overlap:
                    part = merge(out[rows], lse[rows], *part)
                out[rows], lse[rows] = part
        return out.to(q.dtype), lse

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
        dtype = torch.promote_types(q.dtype, torch.float32)
        dout_, q_, k_, v_, out_ = (tensor.to(dtype) for tensor in (dout, q, k, v, out))
        # lse +inf makes every probability of a row exactly 0, so rows that see nothing get zero gradients.
        lse_ = lse.to(dtype)
        lse_ = lse_.masked_fill(lse_ == float("-inf"), float("inf"))
        calls = _calls(bands)
        if (
            _covers(calls, num_rows=q.shape[0])
            and _covers(calls, num_rows=k.shape[0], keys=True)
            and len(_pieces(calls[0].geometry)) == 1
        ):
            (_, grads), *_ = self._backward_call(dout_, q_, k_, v_, out_, lse_, calls[0], scale)
            dq, dk, dv = (grad.transpose(1, 2).reshape(x.shape) for grad, x in zip(grads, (q, k, v)))
            return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        for call in calls:
            for piece, (dq_part, dk_part, dv_part) in self._backward_call(
                dout_, q_, k_, v_, out_, lse_, call, scale
            ):
                _add_segments(dq, dq_part, call.q_starts, piece.rows[0])
                _add_segments(dk, dk_part, call.k_starts, piece.keys[0])
                _add_segments(dv, dv_part, call.k_starts, piece.keys[0])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _backward_call(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: BandCall,
        scale: float,
    ) -> Iterator[tuple[BandPiece, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
        (q_len, k_len, _, _), q_starts, k_starts, _ = call
        q_nhld, dout_nhld, out_nhld = (_segments(x, q_starts, q_len) for x in (q, dout, out))
        lse_nhl = _segments(lse[..., None], q_starts, q_len)[..., 0]
        k_nkmd, v_nkmd = (_segments(x, k_starts, k_len) for x in (k, v))
        for piece in _pieces(call.geometry):
            rows, keys = slice(*piece.rows), slice(*piece.keys)
            yield (
                piece,
                _backward(
                    dout_nhld[:, :, rows],
                    q_nhld[:, :, rows],
                    k_nkmd[:, :, keys],
                    v_nkmd[:, :, keys],
                    out_nhld[:, :, rows],
                    lse_nhl[:, :, rows],
                    0.0,
                    piece.causal,
                    attn_mask=_mask(piece, q.dtype),
                    scale=scale,
                ),
            )

    def _forward_call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: BandCall, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_nhld = _segments(q, call.q_starts, call.geometry.q_len)
        k_nkmd = _segments(k, call.k_starts, call.geometry.k_len)
        v_nkmd = _segments(v, call.k_starts, call.geometry.k_len)
        if call.geometry.lo <= -NO_LIMIT and call.geometry.hi >= NO_LIMIT:
            mask = None if call.mask is None else call.mask.to(q.dtype)
            return _forward(q_nhld, k_nkmd, v_nkmd, 0.0, False, attn_mask=mask, scale=scale)
        parts = []
        for piece in _pieces(call.geometry):
            rows, keys = slice(*piece.rows), slice(*piece.keys)
            part = _forward(
                q_nhld[:, :, rows],
                k_nkmd[:, :, keys],
                v_nkmd[:, :, keys],
                0.0,
                piece.causal,
                attn_mask=_mask(piece, q_nhld.dtype),
                scale=scale,
            )
            parts.append((rows, *part))
        if len(parts) == 1:
            return parts[0][1], parts[0][2]
        out, lse = torch.zeros_like(q_nhld), q_nhld.new_full(q_nhld.shape[:3], float("-inf"))
        for rows, out_part, lse_part in parts:
            out[:, :, rows], lse[:, :, rows] = merge(out[:, :, rows], lse[:, :, rows], out_part, lse_part)
        return out, lse


class BandCall(NamedTuple):
    """Bands of one geometry that run together."""

    geometry: Geometry
    q_starts: tuple[int, ...]
    k_starts: tuple[int, ...]
    mask: torch.Tensor | None = None
    """[N, 1, L, M], of rectangles that have keys of different number: -inf where a band has none."""


class _Forward(NamedTuple):
    """The calls of a forward pass."""

    calls: list[BandCall]
    num_rows: int
    """Rows that they cover one behind the other, so that their results need only be joined; 0: in another order."""


_prepared: weakref.WeakKeyDictionary[Bands, dict[int, _Forward]] = weakref.WeakKeyDictionary()
"""Calls of tables that are in use, by the number of keys: every layer of a pass has the same."""


def _forward_calls(bands: Bands, *, num_keys: int) -> _Forward:
    """Return the calls of a forward pass, in which rectangles of different width run together.

    A mask reads keys behind those of a band, so the gradients, which would be added up there, do without.
    """
    prepared = _prepared.setdefault(bands, {})
    if num_keys not in prepared:
        calls = list(_ragged(bands, num_keys)) if _are_ragged(bands) else _calls(bands)
        prepared[num_keys] = _Forward(calls, _rows_in_order(calls))
    return prepared[num_keys]


def _rows_in_order(calls: list[BandCall]) -> int:
    """Return how many query rows calls cover from the first on without a gap; 0 where they do not."""
    row = 0
    for call in calls:
        length = call.geometry.q_len
        if call.q_starts[0] != row or _step(call.q_starts, length) != length:
            return 0
        row += len(call.q_starts) * length
    return row


def _are_ragged(bands: Bands) -> bool:
    """Tell rectangles of as many queries each, of which no query stands in two, over keys of different number."""
    return bool(
        len(bands) > 1
        and (bands.lo <= -NO_LIMIT).all()
        and (bands.hi >= NO_LIMIT).all()
        and (bands.q_len == bands.q_len[0]).all()
        and not (bands.k_len == bands.k_len[0]).all()
        and not bands.queries_overlap
    )


def _ragged(bands: Bands, num_keys: int) -> Iterator[BandCall]:
    """Yield rectangles together whose keys begin at the same row, or at an even distance, where a mask hides little.

    At a distance each stays before the next, so that no query reads keys of a neighbour, which may be no numbers.
    """
    q_len, starts, lengths = int(bands.q_len[0]), bands.k_start.tolist(), bands.k_len.tolist()
    first = 0
    while first < len(starts):
        stop, widest, real = first + 1, lengths[first], lengths[first]
        step = starts[stop] - starts[first] if stop < len(starts) else 0
        while stop < len(starts) and starts[stop] - starts[stop - 1] == step:
            count, wider, total = stop + 1 - first, max(widest, lengths[stop]), real + lengths[stop]
            reaches = step and (wider > step or starts[stop] + wider > num_keys)
            if reaches or count * wider > min(1.5 * total + CALL_KEYS * count, MASK_ELEMENTS / q_len):
                break
            stop, widest, real = stop + 1, wider, total
        some = slice(first, stop)
        yield _together(tuple(bands.q_start[some].tolist()), q_len, tuple(starts[some]), lengths[some])
        first = stop


def _together(
    q_starts: tuple[int, ...], q_len: int, k_starts: tuple[int, ...], lengths: list[int]
) -> BandCall:
    """Return one call of some rectangles: where all have the same keys, of one that has the queries of all."""
    widest, mask = max(lengths), None
    if min(lengths) < widest:
        hidden = torch.arange(widest) >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        mask = mask[:, None, None].expand(-1, 1, q_len, -1)
    if len(lengths) > 1 and k_starts[0] == k_starts[-1] and _step(q_starts, q_len) == q_len:
        if mask is not None:
            mask = mask.reshape(1, 1, -1, widest)
        q_starts, q_len, k_starts = q_starts[:1], q_len * len(lengths), k_starts[:1]
    return BandCall(Geometry(q_len, widest, -NO_LIMIT, NO_LIMIT), q_starts, k_starts, mask)


def _calls(bands: Bands) -> list[BandCall]:
    calls = []
    for geometry, q_starts, k_starts in bands.groups():
        # Overlapping queries are merged one band at a time; a batch of them would overwrite itself.
        together = geometry.q_len <= BATCHED_QUERY_ROWS and not bands.queries_overlap
        size = len(q_starts) if together or _step(tuple(q_starts.tolist()), geometry.q_len) else 1
        for first in range(0, len(q_starts), size):
            part = slice(first, first + size)
            calls.append(BandCall(geometry, tuple(q_starts[part].tolist()), tuple(k_starts[part].tolist())))
    return calls


def _covers(calls: list[BandCall], *, num_rows: int, keys: bool = False) -> bool:
    """True when the query (or key) segments of one call are the whole tensor in order: nothing has to be gathered."""
    if len(calls) != 1:
        return False
    call = calls[0]
    length, starts = (call.geometry.k_len, call.k_starts) if keys else (call.geometry.q_len, call.q_starts)
    return len(starts) * length == num_rows and _step(starts, length) == length


@lru_cache(maxsize=4096)
def _step(starts: tuple[int, ...], length: int) -> int:
    """Return the even distance of segments that lie one after another without overlap, 0 if there is none."""
    if len(starts) == 1:
        return length
    step = starts[1] - starts[0]
    even = step >= length and all(b - a == step for a, b in itertools.pairwise(starts))
    return step if even else 0


def _segments(x: torch.Tensor, starts: tuple[int, ...], length: int) -> torch.Tensor:
    """Return rows of x [T, H, D] as [N, H, length, D]: a view where the segments are evenly spaced."""
    if step := _step(starts, length):
        (_, num_heads, width), (row, head, dim) = x.shape, x.stride()
        size, stride = (len(starts), num_heads, length, width), (step * row, head, row, dim)
        return x.as_strided(size, stride, x.storage_offset() + starts[0] * row)
    return torch.stack([x[start : start + length] for start in starts]).transpose(1, 2)


def _add_segments(total: torch.Tensor, part: torch.Tensor, starts: tuple[int, ...], offset: int) -> None:
    """Add part [N, H, L, D] to rows starts + offset of total [T, H, D]."""
    length = part.shape[2]
    first = tuple(start + offset for start in starts)
    if _step(first, length):
        _segments(total, first, length).add_(part)
        return
    for index, start in enumerate(first):
        total[start : start + length] += part[index].transpose(0, 1)


@lru_cache(maxsize=4096)
def _pieces(geometry: Geometry) -> tuple[BandPiece, ...]:
    q_len, k_len, lo, hi = geometry
    if hi < NO_LIMIT:
        return _tiles(geometry)
    if lo <= -NO_LIMIT:
        return (BandPiece((0, q_len), (0, k_len), False, None),)
    # Trimmed bands have lo <= 0 here: row 0 sees keys 0 .. -lo. The first -lo keys are seen by every row;
    # what follows is causal from the top left, and rows below the triangle see all of it.
    seen_by_all = -lo
    causal = BandPiece((0, q_len), (seen_by_all, k_len), True, None)
    return (causal,) if seen_by_all == 0 else (BandPiece((0, q_len), (0, seen_by_all), False, None), causal)


def _tiles(geometry: Geometry) -> tuple[BandPiece, ...]:
    q_len, k_len, lo, hi = geometry
    width = min(hi - max(lo, -k_len) + 1, k_len)
    rows = max(32, min(512, max(64, width), MASK_ELEMENTS // width))
    tiles = []
    for start in range(0, q_len, rows):
        stop = min(start + rows, q_len)
        first = max(0, start - hi)
        last = min(k_len - 1, stop - 1 - lo)
        shift = start - first
        limits = (max(lo - shift, -NO_LIMIT), hi - shift)
        free = limits[0] <= -(last - first) and limits[1] >= stop - start - 1
        tiles.append(BandPiece((start, stop), (first, last + 1), False, None if free else limits))
    return tuple(tiles)


def _mask(piece: BandPiece, dtype: torch.dtype) -> torch.Tensor | None:
    if piece.diagonal is None:
        return None
    return _tile_mask(piece.rows[1] - piece.rows[0], piece.keys[1] - piece.keys[0], *piece.diagonal, dtype)


@lru_cache(maxsize=8)
def _tile_mask(num_rows: int, num_keys: int, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
    # Interior tiles of a window share one mask: their limits count from the tile's own corner.
    difference = torch.arange(num_rows)[:, None] - torch.arange(num_keys)[None, :]
    hidden = (difference < lo) | (difference > hi)
    return torch.zeros(num_rows, num_keys, dtype=dtype).masked_fill_(hidden, float("-inf"))
