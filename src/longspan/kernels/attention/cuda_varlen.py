"""Attention on CUDA through torch's variable-length flash kernels, for bf16 and fp16.

The private operators under `torch.nn.attention.varlen` take lo and hi as a window around the bottom-right
diagonal: with o = k_len - q_len, query i sees keys i + o - left .. i + o + right. So a band becomes
left = hi + o, right = -lo - o (-1 = no limit). `Bands` trims its segments, which makes both non-negative.
Bands share one call where one (left, right) is right for all: a document that is shorter than the window of the
others, or that has a single token, sees the same with their limits. So any packed documents are a single launch.
In the forward pass each sequence of a launch says where its keys begin (`cu_seqlens_k`, read for nothing else then) and
how many it has (`seqused_k`): bands may read the same keys, or leave some out, and none are copied. The backward
operator does not know that, so what is not in order is gathered there.

The operators do not take a window as it is given. A limit of at least max_k becomes none, and if one side is then
limited and the other not, the other becomes max_k. With more queries than keys this shows keys that a limit hides,
or hides keys that nothing does. Every limit that bounds something is below max(q_len, k_len) - 1, and one that
is not bounds nothing: with max_k at least max_q both rules are harmless. They read max_k for nothing else but the
size of a grid, whose blocks beyond the keys end at once.

Other dtypes and head dimensions go to dense attention in tiles, and the log says so once.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from longspan.core.log import log_once
from longspan.kernels.attention.bands import NO_LIMIT, Bands
from longspan.kernels.attention.merging import merge
from longspan.kernels.attention.tiled import TiledKernel
from longspan.kernels.transfers import to_device

__all__ = ["CudaVarlenKernel", "launches", "why_tiled"]

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_SEQUENCES = 65_535
"""Of a launch: the second dimension of a CUDA grid."""


Rows = torch.Tensor | slice
"""Of queries or keys: a slice where they follow each other, of which views are taken; else they are gathered."""
ALL = slice(None)


class Launch(NamedTuple):
    """Bands that share one kernel launch. Rows are ALL where they are the whole tensor in order."""

    q_rows: Rows
    k_rows: Rows
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    left: int
    right: int
    k_used: torch.Tensor | None = None
    """Keys of each sequence where they do not follow each other: those of sequence n begin at row cu_k[n]."""


def launches(
    bands: Bands, *, num_queries: int, num_keys: int, device: torch.device, gathered: bool = False
) -> list[Launch]:
    """Sort bands into as few kernel launches as their windows around the bottom-right diagonal allow.

    `gathered`: keys that do not follow each other are gathered, as the backward operator needs them.
    """
    result = []
    for window, found in _by_window(bands):
        for first in range(0, len(found), MAX_SEQUENCES):
            indices = found[first : first + MAX_SEQUENCES]
            q_len, k_len = bands.q_len[indices], bands.k_len[indices]
            max_q, max_k = int(q_len.max()), int(k_len.max())
            if window.left >= 0 or window.right > 0:
                # See the head of this module: a limit is lost, or a missing one set, beyond max_k.
                max_k = max(max_k, max_q)
            k_start, k_used = bands.k_start[indices], None
            k_rows = _span(k_start, k_len, num_keys)
            if k_rows is None and not gathered:
                k_rows, k_used = ALL, _int32(k_len, device)
            result.append(
                Launch(
                    q_rows=_rows(bands.q_start[indices], q_len, num_queries, device),
                    k_rows=_rows(k_start, k_len, num_keys, device) if k_rows is None else k_rows,
                    cu_q=_borders(q_len, device),
                    cu_k=_borders(k_len, device)
                    if k_used is None
                    else _int32(np.append(k_start, num_keys), device),
                    k_used=k_used,
                    max_q=max_q,
                    max_k=max_k,
                    left=window.left,
                    right=window.right,
                )
            )
    return result


class _Window(NamedTuple):
    """Limits of some bands; where one is -1 (none), a limit of at least `reach` bounds nothing either."""

    left: int
    right: int
    left_reach: int
    right_reach: int

    def join(self, other: _Window) -> _Window | None:
        """Return a window that is right for the bands of both; None if there is none."""
        joined = []
        for mine, reach, its, its_reach in (
            (self.left, self.left_reach, other.left, other.left_reach),
            (self.right, self.right_reach, other.right, other.right_reach),
        ):
            if not (mine == its or (mine < 0 and its >= reach) or (its < 0 and mine >= its_reach)):
                return None
            joined.append((max(mine, its), max(reach, its_reach)))
        (left, left_reach), (right, right_reach) = joined
        return _Window(left, right, left_reach, right_reach)


def _by_window(bands: Bands) -> list[tuple[_Window, np.ndarray]]:
    """Return which bands can share a launch, with their window; bands that share queries never do."""
    offset = bands.k_len - bands.q_len
    left = np.where(bands.hi >= NO_LIMIT, -1, bands.hi + offset)
    right = np.where(bands.lo <= -NO_LIMIT, -1, -bands.lo - offset)
    if bands.queries_overlap:
        return [
            (_Window(int(left[i]), int(right[i]), 0, 0), np.array([i], dtype=np.int64))
            for i in range(len(bands))
        ]
    limits, which = np.unique(np.stack([left, right], axis=1), axis=0, return_inverse=True)
    which = which.reshape(-1)
    # The last query sees back to key 0 with left = k_len - 1, the first one on to the last key with right = q_len - 1.
    reaches = np.zeros_like(limits)
    np.maximum.at(reaches, which, np.stack([bands.k_len - 1, bands.q_len - 1], axis=1))
    result: list[tuple[_Window, list[int]]] = []
    # Those with two limits come first: they join no other, the others join them where they can.
    for key in np.argsort((limits < 0).sum(axis=1), kind="stable").tolist():
        window = _Window(*limits[key].tolist(), *reaches[key].tolist())
        for place, (kept, keys) in enumerate(result):
            joined = kept.join(window)
            if joined is not None:
                result[place] = joined, [*keys, key]
                break
        else:
            result.append((window, [key]))
    return [(window, np.flatnonzero(np.isin(which, keys))) for window, keys in result]


def why_tiled(dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why the flash kernels do not take tensors; None if they do."""
    if dtype not in DTYPES:
        return f"{dtype} inputs; the flash kernels take bfloat16 and float16"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"head dimension {head_dim}; the flash kernels take multiples of 8 up to {MAX_HEAD_DIM}"
    return None


class _Place(NamedTuple):
    """What launches depend on beside their bands: which rows are the whole tensor depends on its length."""

    num_queries: int
    num_keys: int
    device: torch.device
    gathered: bool


class CudaVarlenKernel:
    """torch's variable-length flash attention over a table of bands."""

    name = "cuda_varlen"
    upcasts = False
    spread_by_queries = True

    def __init__(self) -> None:
        self._fallback = TiledKernel()
        self._launches: WeakKeyDictionary[Bands, dict[_Place, list[Launch]]] = WeakKeyDictionary()

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bands: Bands, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, H, D] in q's dtype and lse [T, H] in fp32; unseeing queries get 0 and -inf."""
        if self._falls_back(q):
            return self._fallback.forward(q, k, v, bands, scale)
        todo = self._plan(q, k, bands)
        if todo and todo[0].q_rows == ALL:
            out, lse = _launch_forward(todo.pop(0), q, k, v, scale)
        else:
            # Rows that nobody writes see nothing.
            out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
        if bands.queries_overlap:
            out = out.float()
        for launch in todo:
            out_part, lse_part = _launch_forward(launch, q, k, v, scale)
            rows = launch.q_rows
            if bands.queries_overlap:
                out[rows], lse[rows] = merge(out[rows], lse[rows], out_part, lse_part)
            else:
                out[rows], lse[rows] = out_part, lse_part
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
        if self._falls_back(q):
            return self._fallback.backward(dout, q, k, v, out, lse, bands, scale)
        todo = self._plan(q, k, bands, gathered=True)
        if len(todo) == 1 and isinstance(todo[0].q_rows, slice) and isinstance(todo[0].k_rows, slice):
            # Nothing to add up: fp32 sums would only be rounded again.
            grads = _launch_backward(todo[0], dout, q, k, v, out, lse, scale)
            places = (todo[0].q_rows, todo[0].k_rows, todo[0].k_rows)
            dq, dk, dv = (_put(grad, rows, x) for grad, rows, x in zip(grads, places, (q, k, v)))
            return dq, dk, dv
        dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
        for launch in todo:
            grads = _launch_backward(launch, dout, q, k, v, out, lse, scale)
            for total, grad, rows in zip((dq, dk, dv), grads, (launch.q_rows, launch.k_rows, launch.k_rows)):
                if isinstance(rows, slice):
                    total[rows] += grad
                else:
                    total.index_add_(0, rows, grad.float())
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _falls_back(self, q: torch.Tensor) -> bool:
        reason = why_tiled(q.dtype, q.shape[-1])
        if reason is None:
            return False
        log_once("kernels.attention", f"attention: tiled (dense, slow) because of {reason}")
        return True

    def _plan(
        self, q: torch.Tensor, k: torch.Tensor, bands: Bands, *, gathered: bool = False
    ) -> list[Launch]:
        plans = self._launches.setdefault(bands, {})
        place = _Place(q.shape[0], k.shape[0], q.device, gathered)
        if place not in plans:
            other = plans.get(place._replace(gathered=not gathered), [])
            same = other and all(
                isinstance(launch.k_rows, slice) and launch.k_used is None for launch in other
            )
            plans[place] = other if same else launches(bands, **place._asdict())
        return list(plans[place])


def _launch_forward(
    launch: Launch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        _take(q, launch.q_rows),
        _take(k, launch.k_rows),
        _take(v, launch.k_rows),
        launch.cu_q,
        launch.cu_k,
        launch.max_q,
        launch.max_k,
        0.0,
        (launch.left, launch.right) == (-1, 0),
        False,
        scale=scale,
        window_size_left=launch.left,
        window_size_right=launch.right,
        seqused_k=launch.k_used,
    )
    return out, lse.T  # The kernel lays lse out as [H, T].


def _launch_backward(
    launch: Launch,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Without dropout the random state is not read; torch passes zeros as well.
    unused_rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        _take(dout, launch.q_rows).contiguous(),
        _take(q, launch.q_rows),
        _take(k, launch.k_rows),
        _take(v, launch.k_rows),
        _take(out, launch.q_rows).contiguous(),
        _take(lse, launch.q_rows).float().T.contiguous(),
        launch.cu_q,
        launch.cu_k,
        launch.max_q,
        launch.max_k,
        0.0,
        (launch.left, launch.right) == (-1, 0),
        unused_rng,
        torch.empty(0, device=q.device),
        scale=scale,
        window_size_left=launch.left,
        window_size_right=launch.right,
    )


def _take(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _put(part: torch.Tensor, rows: slice, like: torch.Tensor) -> torch.Tensor:
    """Return the rows among zeros for all others."""
    if rows == ALL:
        return part
    whole = torch.zeros_like(like)
    whole[rows] = part
    return whole


def _span(start: np.ndarray, length: np.ndarray, total: int) -> slice | None:
    """Return the rows of bands that follow each other; None if they do not."""
    end = start + length
    if (end[:-1] != start[1:]).any():
        return None
    whole = start[0] == 0 and end[-1] == total
    return ALL if whole else slice(int(start[0]), int(end[-1]))


def _rows(start: np.ndarray, length: np.ndarray, total: int, device: torch.device) -> Rows:
    span = _span(start, length, total)
    if span is not None:
        return span
    before = np.cumsum(length) - length
    rows = np.arange(int(length.sum()), dtype=np.int64) + np.repeat(start - before, length)
    return to_device(torch.from_numpy(rows), device)


def _borders(length: np.ndarray, device: torch.device) -> torch.Tensor:
    return _int32(np.concatenate([[0], np.cumsum(length)]), device)


def _int32(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(numbers.astype(np.int32)), device)
