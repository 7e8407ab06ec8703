"""Attention on CUDA through torch's variable-length flash kernels, for bf16 and fp16.

The private operators under `torch.nn.attention.varlen` take lo and hi as a window around the bottom-right
diagonal: with o = k_len - q_len, query i sees keys i + o - left .. i + o + right. So a band becomes
left = hi + o, right = -lo - o (-1 = no limit), and bands with equal (left, right) share one call: any
number of packed documents is a single launch. `Bands` trims its segments, which makes both non-negative.

Other dtypes and head dimensions go to the dense reference, and the log says so once.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from longspan.core.log import log_once
from longspan.kernels.attention.bands import NO_LIMIT, Bands
from longspan.kernels.attention.merging import merge
from longspan.kernels.attention.reference import ReferenceKernel

__all__ = ["CudaVarlenKernel", "launches"]

MAX_HEAD_DIM = 256


class Launch(NamedTuple):
    """Bands that share one kernel launch. Rows are None where they are the whole tensor in order."""

    q_rows: torch.Tensor | None
    k_rows: torch.Tensor | None
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    left: int
    right: int


def launches(bands: Bands, *, num_queries: int, num_keys: int, device: torch.device) -> list[Launch]:
    """Sort bands into kernel launches by their window around the bottom-right diagonal."""
    offset = bands.k_len - bands.q_len
    left = np.where(bands.hi >= NO_LIMIT, -1, bands.hi + offset)
    right = np.where(bands.lo <= -NO_LIMIT, -1, -bands.lo - offset)
    found: dict[tuple[int, ...], list[int]] = {}
    for index, key in enumerate(zip(left.tolist(), right.tolist())):
        # Bands that share queries are joined afterwards, so each gets a launch of its own.
        found.setdefault((*key, index) if bands.queries_overlap else key, []).append(index)
    result = []
    for (window_left, window_right, *_), indices in found.items():
        q_len, k_len = bands.q_len[indices], bands.k_len[indices]
        result.append(
            Launch(
                q_rows=_rows(bands.q_start[indices], q_len, num_queries, device),
                k_rows=_rows(bands.k_start[indices], k_len, num_keys, device),
                cu_q=_borders(q_len, device),
                cu_k=_borders(k_len, device),
                max_q=int(q_len.max()),
                max_k=int(k_len.max()),
                left=window_left,
                right=window_right,
            )
        )
    return result


class CudaVarlenKernel:
    """torch's variable-length flash attention over a table of bands."""

    name = "cuda_varlen"
    upcasts = False

    def __init__(self) -> None:
        self._reference = ReferenceKernel()
        self._launches: WeakKeyDictionary[Bands, list[Launch]] = WeakKeyDictionary()

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bands: Bands, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, H, D] in q's dtype and lse [T, H] in fp32; unseeing queries get 0 and -inf."""
        if self._falls_back(q):
            return self._reference.forward(q, k, v, bands, scale)
        todo = self._plan(q, k, bands)
        out = torch.zeros(q.shape, dtype=torch.float32 if bands.queries_overlap else q.dtype, device=q.device)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
        for launch in todo:
            out_part, lse_part = _launch_forward(launch, q, k, v, scale)
            if launch.q_rows is None and len(todo) == 1:
                return out_part, lse_part
            rows = slice(None) if launch.q_rows is None else launch.q_rows
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
            return self._reference.backward(dout, q, k, v, out, lse, bands, scale)
        todo = self._plan(q, k, bands)
        if len(todo) == 1 and todo[0].q_rows is None and todo[0].k_rows is None:
            return _launch_backward(todo[0], dout, q, k, v, out, lse, scale)
        dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
        for launch in todo:
            grads = _launch_backward(launch, dout, q, k, v, out, lse, scale)
            for total, grad, rows in zip((dq, dk, dv), grads, (launch.q_rows, launch.k_rows, launch.k_rows)):
                if rows is None:
                    total += grad
                else:
                    total.index_add_(0, rows, grad.float())
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _falls_back(self, q: torch.Tensor) -> bool:
        head_dim = q.shape[-1]
        if q.dtype not in (torch.bfloat16, torch.float16):
            reason = f"{q.dtype} inputs; the flash kernels take bfloat16 and float16"
        elif head_dim % 8 or head_dim > MAX_HEAD_DIM:
            reason = f"head dimension {head_dim}; the flash kernels take multiples of 8 up to {MAX_HEAD_DIM}"
        else:
            return False
        log_once("kernels.attention", f"attention: reference (dense, quadratic memory) because of {reason}")
        return True

    def _plan(self, q: torch.Tensor, k: torch.Tensor, bands: Bands) -> list[Launch]:
        plan = self._launches.get(bands)
        if plan is None or (plan and plan[0].cu_q.device != q.device):
            plan = launches(bands, num_queries=q.shape[0], num_keys=k.shape[0], device=q.device)
            self._launches[bands] = plan
        return plan


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


def _take(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return x if rows is None else x.index_select(0, rows)


def _rows(start: np.ndarray, length: np.ndarray, total: int, device: torch.device) -> torch.Tensor | None:
    before = np.cumsum(length) - length
    rows = np.arange(int(length.sum()), dtype=np.int64) + np.repeat(start - before, length)
    if len(rows) == total and (rows == np.arange(total)).all():
        return None
    return torch.from_numpy(rows).to(device)


def _borders(length: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(length)]).astype(np.int32)).to(device)
