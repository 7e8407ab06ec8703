"""torch's two variable-length flash operators on the CPU, as the CUDA code computes them.

`aten::_flash_attention_forward` and `_backward` have CUDA kernels only. These stand in for them where there is no
card, by the rules of the published sources (flash_api.cpp, FlashAttention-2's block masks):

    checks      16-bit types, all alike; head dimension a multiple of 8 up to 256; int32 borders that fit; 65,535
                sequences at most; contiguous last dimensions; fp32 lse in the backward
    windows     causal sets right = 0 (in the forward not for one query); a limit of at least max_k becomes -1; if
                one limit is left, the other becomes max_k; with o = k_len - q_len, query i sees keys
                i + o - left .. i + o + right
    results     lse is [heads, tokens] in fp32, +inf with out 0 where nothing is seen
    keys        with seqused_k the keys of a sequence begin at its border, and so many are its own: the border behind
                them is not read (forward only)
    undefined   rows that no sequence covers hold what was in memory before: NaN here

With `wide=True` the operators take fp32 and fp64 too and compute in them, and so does the kernel: limits of 1e-6
then hold through the same launches.

A test with the mark `both_kernels` runs twice: as on a CPU, and with these operators in place (`tests/conftest.py`), in
the ranks that it starts as well.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch

from longspan.kernels.attention import api, cuda_varlen
from longspan.parallel import launch

__all__ = ["calls", "flash_operators", "in_process_with_flash", "ranks_with_flash", "real_window"]

Result = TypeVar("Result")

HALF = (torch.bfloat16, torch.float16)
WIDE = (*HALF, torch.float32, torch.float64)

calls: list[tuple[str, int]] = []
"""Name and number of sequences of each call since the operators were installed."""

_taken: tuple[torch.dtype, ...] = HALF


def real_window(left: int, right: int, max_k: int, *, causal: bool) -> tuple[int, int]:
    """Return the limits that the operator masks with; -1 = none."""
    if causal:
        right = 0
    left = -1 if left >= max_k else left
    right = -1 if right >= max_k else right
    if left < 0 and right > 0:
        left = max_k
    elif left >= 0 and right < 0:
        right = max_k
    return left, right


@contextlib.contextmanager
def flash_operators(*, wide: bool = False) -> Iterator[None]:
    """Put the operators in place on the CPU, and make the CUDA kernel the one that is chosen there."""
    global _taken  # noqa: PLW0603
    library = torch.library.Library("aten", "IMPL")
    patch = pytest.MonkeyPatch()
    try:
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        _taken = WIDE if wide else HALF
        patch.setattr(cuda_varlen, "DTYPES", _taken)
        kernel = cuda_varlen.CudaVarlenKernel()
        patch.setattr(api, "_choose", lambda device_type: kernel)
        calls.clear()
        yield
    finally:
        patch.undo()
        library._destroy()


def in_process_with_flash(rank: int, wide: bool, function: Callable[..., Result], *args: Any) -> Result:
    """Return `function(rank, *args)` with the operators in place: for `spawn_local`."""
    with flash_operators(wide=wide):
        result = function(rank, *args)
        assert calls, "the operators were never called"
        return result


@contextlib.contextmanager
def ranks_with_flash() -> Iterator[None]:
    """Put the operators in place in every rank that `spawn_local` starts, as well as here; they must be called."""
    with pytest.MonkeyPatch.context() as patch, flash_operators(wide=True):
        patch.setattr(launch, "_local_rank", _local_rank)
        gather, ranks = launch._gather, list[Any]()
        patch.setattr(
            launch, "_gather", lambda started, *rest: ranks.append(started) or gather(started, *rest)
        )
        yield
        assert calls or ranks, "the operators were never called: this test need not run twice"


_one_rank = launch._local_rank


def _local_rank(function: Callable[..., Any], rank: int, world: int, args: Sequence[Any], *rest: Any) -> None:
    _one_rank(in_process_with_flash, rank, world, (True, function, *args), *rest)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    k_used: torch.Tensor | None = None,
) -> None:
    assert q.dtype in _taken, f"FlashAttention only supports fp16 and bf16 data type, not {q.dtype}"
    assert k.dtype == q.dtype == v.dtype, "query, key and value must have the same dtype"
    assert q.ndim == k.ndim == v.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2]
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "input tensor must have contiguous last dimension"
    assert q.shape[2] % 8 == 0 and q.shape[2] <= 256, f"head dimension {q.shape[2]}"
    assert q.shape[1] % k.shape[1] == 0, "number of key heads must divide the number of query heads"
    assert dropout == 0.0
    for borders, tensor, longest in ((cu_q, q, max_q), (cu_k, k, max_k)):
        assert borders.dtype == torch.int32 and borders.ndim == 1 and borders.is_contiguous()
        lengths = borders.diff()
        assert 0 < len(lengths) <= 65_535, f"{len(lengths)} sequences in a launch"
        if borders is cu_k and k_used is not None:
            assert k_used.dtype == torch.int32 and k_used.is_contiguous() and k_used.shape == lengths.shape
            assert (borders >= 0).all() and int((borders[:-1] + k_used).max()) <= len(tensor), (
                "illegal memory access"
            )
            lengths = k_used
        else:
            assert borders[0] == 0 and int(borders[-1]) <= len(tensor), "illegal memory access"
        assert (lengths >= 0).all() and int(lengths.max()) <= longest, "sequences longer than said"
    assert len(cu_q) == len(cu_k)


def _visible(q_len: int, k_len: int, left: int, right: int) -> torch.Tensor:
    ahead = torch.arange(k_len) - torch.arange(q_len)[:, None] - (k_len - q_len)
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def _pairs(
    cu_q: torch.Tensor, cu_k: torch.Tensor, k_used: torch.Tensor | None = None
) -> Iterator[tuple[slice, slice]]:
    q, k = cu_q.tolist(), cu_k.tolist()
    ends = k[1:] if k_used is None else (cu_k[:-1] + k_used).tolist()
    return zip(map(slice, q[:-1], q[1:]), map(slice, k[:-1], ends))


def _scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scores [H, q, k], and q, k as [H, ., D], in what the card accumulates in."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide).transpose(0, 1), k.to(wide).transpose(0, 1)
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    return (q @ k.transpose(1, 2) * scale).masked_fill_(~seen, -math.inf), q, k


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int = -1,
    window_size_right: int = -1,
    seqused_k: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, ...]:
    assert not unused and not return_debug_mask
    _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, seqused_k)
    calls.append(("forward", len(cum_seq_q) - 1))
    if max_q == 1 and query.shape[1] > key.shape[1] and window_size_left < 0 and window_size_right < 0:
        assert len(query) == len(cum_seq_q) - 1, "one query a sequence, whose heads become rows"
    left, right = real_window(window_size_left, window_size_right, max_k, causal=is_causal and max_q > 1)
    wide = torch.promote_types(query.dtype, torch.float32)
    out = torch.full_like(query, math.nan)
    lse = torch.full((query.shape[1], len(query)), math.nan, dtype=wide)
    for rows, keys in _pairs(cum_seq_q, cum_seq_k, seqused_k):
        seen = _visible(rows.stop - rows.start, keys.stop - keys.start, left, right)
        scores, _, _ = _scores(query[rows], key[keys], scale, seen)
        if not seen.numel():
            out[rows], lse[:, rows] = 0, math.inf
            continue
        top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        values = value[keys].to(wide).transpose(0, 1).repeat_interleave(query.shape[1] // key.shape[1], 0)
        # The card multiplies weights of the input's type.
        parts = weights.to(query.dtype).to(wide) @ values / total.masked_fill(total == 0, 1.0)
        out[rows] = parts.transpose(0, 1).to(query.dtype)
        lse[:, rows] = (top + total.log()).masked_fill(total == 0, math.inf)[..., 0]
    nothing = torch.zeros(2, dtype=torch.uint64)
    return out, lse, nothing, torch.zeros((), dtype=torch.uint64), torch.empty(0)


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float,
    window_size_left: int = -1,
    window_size_right: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p)
    assert grad_out.dtype == out.dtype == query.dtype, "out and dout must have the dtype of query"
    assert grad_out.shape == out.shape == query.shape
    assert grad_out.stride(-1) == out.stride(-1) == 1
    assert logsumexp.shape == (query.shape[1], len(query)) and logsumexp.is_contiguous()
    assert logsumexp.dtype == torch.float32
    calls.append(("backward", len(cum_seq_q) - 1))
    left, right = real_window(window_size_left, window_size_right, max_k, causal=is_causal)
    wide = torch.promote_types(query.dtype, torch.float32)
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    for rows, keys in _pairs(cum_seq_q, cum_seq_k):
        seen = _visible(rows.stop - rows.start, keys.stop - keys.start, left, right)
        scores, q_rows, k_rows = _scores(query[rows], key[keys], scale, seen)
        base = logsumexp[:, rows, None].to(wide)
        weights = (scores - base.masked_fill(base == -math.inf, 0.0)).exp()
        dout, outs = (x[rows].to(wide).transpose(0, 1) for x in (grad_out, out))
        values = value[keys].to(wide).transpose(0, 1).repeat_interleave(group, 0)
        delta = (dout * outs).sum(-1, keepdim=True)
        dscores = (weights * (dout @ values.transpose(1, 2) - delta)).to(query.dtype).to(wide)
        weights = weights.to(query.dtype).to(wide)
        dq[rows] = (dscores @ k_rows * scale).transpose(0, 1).to(dq.dtype)
        # Gradients of shared heads are rounded to the input's type before they are added.
        for grad, left_side, right_side in ((dk, dscores * scale, q_rows), (dv, weights, dout)):
            expanded = (left_side.transpose(1, 2) @ right_side).to(query.dtype)
            grad[keys] = expanded.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return dq, dk, dv
