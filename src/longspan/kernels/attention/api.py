"""One attention call for every device: bands in, output out, gradients through the same kernel.

A kernel turns one table of bands into (out, lse); anything that splits keys over time or machines calls
kernels directly and joins the parts with `merge`. `attention` is the differentiable whole.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch

from longspan.core.errors import ArgumentError
from longspan.core.log import log_once
from longspan.kernels.attention.bands import Bands
from longspan.kernels.attention.cpu_flash import CpuFlashKernel
from longspan.kernels.attention.cuda_varlen import CudaVarlenKernel
from longspan.kernels.attention.flash_versions import use_flash
from longspan.kernels.attention.merging import merge, sink_gradient, with_sinks
from longspan.kernels.attention.reference import ReferenceKernel
from longspan.kernels.attention.tiled import TiledKernel

__all__ = ["AttentionForm", "AttentionKernel", "attention", "check_shapes", "choose_kernel", "merge"]


class AttentionKernel(Protocol):
    """What happens to one table of bands.

    q is [T, H, D], k and v are [S, K, D] with H a multiple of K (grouped-query attention: heads
    h*H/K .. (h+1)*H/K - 1 read key/value head h). out is [T, H, D] in q's dtype, lse is [T, H] in fp32 or
    better. A query that no band covers gets out 0 and lse -inf. In the backward pass `out` and `lse` are
    those of the whole attention, of which k and v may be a part: partial gradients add up.
    """

    name: str
    upcasts: bool
    """Computes fp16 and bf16 in fp32: who joins partial results casts up first and keeps them unrounded."""
    spread_by_queries: bool
    """Its work is spread over sequences, heads and blocks of queries: few queries over many keys are few blocks."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bands: Bands, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out, lse)."""
        ...

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
        """Return (dq, dk, dv)."""
        ...


class AttentionForm(NamedTuple):
    """What a layer asks of attention beside its tensors: who sees whom in a document, and what becomes of scores."""

    scale: float | None = None
    """Factor on the scores; None = 1/sqrt(head dimension)."""
    window: int | None = None
    """A query sees that many keys, itself included; None = all before it."""
    attention_chunk: int | None = None
    """A document is cut at multiples of so many tokens, and no query sees beyond its cut; None = it is whole."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap)."""
    sinks: torch.Tensor | None = None
    """[H], scores of a key without a value that every query sees."""

    def factor(self, q: torch.Tensor) -> float:
        """Return the factor on the scores of queries [T, H, D]."""
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale


def choose_kernel(device: torch.device | str, *, softcap: float | None = None) -> AttentionKernel:
    """Return the fastest usable kernel for a device; the log says once which one and why."""
    return _choose(torch.device(device).type) if softcap is None else _capping(softcap)


@lru_cache(maxsize=8)
def _capping(softcap: float) -> AttentionKernel:
    log_once("kernels.attention", "attention: tiled (dense, slow) because no flash kernel caps scores")
    return TiledKernel(softcap=softcap)


@lru_cache(maxsize=8)
def _choose(device_type: str) -> AttentionKernel:
    kernel: AttentionKernel
    if device_type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        kernel, reason = CpuFlashKernel(), "torch's flash attention for CPU is available"
    elif device_type == "cuda" and hasattr(torch.ops.aten, "_flash_attention_forward"):
        kernel, reason = CudaVarlenKernel(), f"variable-length flash attention is available ({use_flash()})"
    else:
        kernel = ReferenceKernel()
        reason = f"torch {torch.__version__} has no flash attention for {device_type}; memory is quadratic"
    log_once("kernels.attention", f"attention: {kernel.name} on {device_type} because {reason}")
    return kernel


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bands: Bands,
    *,
    scale: float | None = None,
    kernel: AttentionKernel | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(q k^T * scale) v over the visible pairs, differentiable in q, k and v.

    Args:
        q: [T, H, D].
        k, v: [S, K, D], H a multiple of K.
        bands: who sees whom.
        scale: factor on the scores; None = 1/sqrt(D).
        kernel: the kernel to use; None = `choose_kernel(q.device)`.
        sinks: [H], see `AttentionForm`; differentiable too.

    Raises:
        ArgumentError: shapes that do not fit each other or the bands.
    """
    check_shapes(q, k, v)
    bands.check(num_queries=q.shape[0], num_keys=k.shape[0])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, sinks, bands, scale, kernel or choose_kernel(q.device))


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse tensors that are not q [T, H, D] and k, v [S, K, D] with H a multiple of K.

    Raises:
        ArgumentError: naming the shapes.
    """
    if (
        q.ndim != 3
        or k.shape != v.shape
        or k.ndim != 3
        or q.shape[2] != k.shape[2]
        or q.shape[1] % k.shape[1]
    ):
        raise ArgumentError(
            "attention takes q [T, H, D] and k, v [S, K, D] with H a multiple of K",
            found=f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}",
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        bands: Bands,
        scale: float,
        kernel: AttentionKernel,
    ) -> torch.Tensor:
        out, lse = with_sinks(*kernel.forward(q, k, v, bands, scale), sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.bands, ctx.scale, ctx.kernel = bands, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, out, lse, sinks = ctx.saved_tensors
        grads = ctx.kernel.backward(grad_outputs[0], *tensors, out, lse, ctx.bands, ctx.scale)
        return (*grads, sink_gradient(grad_outputs[0], out, lse, sinks), None, None, None)
