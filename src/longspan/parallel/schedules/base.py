"""What every schedule is: a forward and a backward over this rank's tokens, and one autograd function for all.

A schedule says how queries, keys and values travel; what happens to one block is the kernel's. Partial outputs
are joined, and gradients summed, in fp32 or better, whatever the type of the tensors: rounding them to bf16 at
every step of a ring is an error that grows with the ring.

Shape legend: T = tokens of this rank, H = query heads, K = key/value heads, D = head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import (
    AttentionForm,
    AttentionKernel,
    Bands,
    check_shapes,
    choose_kernel,
    merge,
    sink_gradient,
    with_sinks,
)
from longspan.kernels.attention.merging import accumulation_dtype
from longspan.parallel.channel import Channel
from longspan.parallel.layout import Layout
from longspan.parallel.shards import SequenceShards

__all__ = ["AttentionCall", "CpSchedule", "Partial", "block_backward", "block_forward", "sequence_attention"]

Forward = tuple[torch.Tensor, tuple[torch.Tensor, ...]]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""dq, dk, dv."""
AllGradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""dq, dk, dv, and that of the sinks where there are some: what this rank's queries, or heads, add to it."""


class AttentionCall(NamedTuple):
    """Everything of one attention call but its tensors; the same on all ranks."""

    shards: SequenceShards
    window: int | None
    scale: float
    kernel: AttentionKernel
    sinks: torch.Tensor | None = None
    """[H], of all heads that `forward` is given; see `kernels.attention.AttentionForm`."""

    def finish(self, partial: Partial, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out in q's type and lse, over all keys and the sinks."""
        out, lse = with_sinks(partial.out, partial.lse, self.sinks)
        return out.to(q.dtype), lse

    def all_gradients(
        self, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, grads: Gradients
    ) -> AllGradients:
        """Return dq, dk, dv and the gradient of the sinks; `out` and `lse` are those of `finish`."""
        return *grads, sink_gradient(dout, out, lse, self.sinks)


class CpSchedule(Protocol):
    """A context-parallel schedule: how the keys and values of a sequence reach the queries that see them.

    Attributes:
        name: as in a recipe.
        layouts: layouts it works with, its own choice first.
        rank, world: this process in the group of ranks that share the sequence.
        channels: what it communicates through; `Channel.sent` counts bytes.
    """

    name: str
    layouts: tuple[Layout, ...]
    rank: int
    world: int
    channels: tuple[Channel, ...]

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Refuse head counts that cannot be spread.

        Raises:
            ArgumentError: naming num_heads, num_kv_heads and the degree.
        """
        ...

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall) -> Forward:
        """Return out [T, H, D], in q's type, of this rank's queries over the whole sequence, and what backward needs.

        q is [T, H, D], k and v are [T, K, D]: this rank's tokens, contiguous.
        """
        ...

    def backward(
        self, dout: torch.Tensor, saved: tuple[torch.Tensor, ...], call: AttentionCall
    ) -> AllGradients:
        """Return dq, dk, dv of this rank's tokens, in the types of q, k, v, and what they add to that of the sinks."""
        ...


def sequence_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shards: SequenceShards,
    schedule: CpSchedule,
    form: AttentionForm | None = None,
    *,
    kernel: AttentionKernel | None = None,
) -> torch.Tensor:
    """Return this rank's rows of the attention over the whole sequence, differentiable in q, k, v and sinks.

    All ranks of the schedule's group call it with their own tokens.

    Args:
        q: [T, H, D], the tokens `shards.indices(schedule.rank)`.
        k, v: [T, K, D], H a multiple of K.
        shards: the sequence: layout, documents, ranks.
        schedule: how keys travel.
        form: windows, sinks and the like; None = plain causal attention. The gradient of sinks is what this rank
            adds to it: to be summed over the ranks, as that of every parameter.
        kernel: what computes a block; None = the device's.

    Raises:
        ArgumentError: tensors, shards and schedule that do not fit each other, or heads that cannot be spread.
    """
    check_shapes(q, k, v)
    if q.shape[0] != shards.num_local or k.shape[0] != shards.num_local:
        raise ArgumentError(
            "the tensors do not hold this rank's tokens",
            found=f"{q.shape[0]} queries and {k.shape[0]} keys",
            allowed=f"{shards.num_local} of {shards}",
        )
    if not q.dtype == k.dtype == v.dtype:
        # A rank receives keys and values into one buffer: of two types it would be too short.
        raise ArgumentError(
            "queries, keys and values differ in type", found=f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    check_layout(schedule, shards)
    schedule.check_heads(q.shape[1], k.shape[1])
    form = form or AttentionForm()
    kernel = kernel or choose_kernel(q.device, softcap=form.softcap)
    call = AttentionCall(shards.cut(form.attention_chunk), form.window, form.factor(q), kernel)
    return _SequenceAttention.apply(q, k, v, form.sinks, schedule, call)


def check_layout(schedule: CpSchedule, shards: SequenceShards) -> None:
    """Refuse shards that the schedule does not work with.

    Raises:
        ArgumentError: another world size or layout.
    """
    if shards.world != schedule.world:
        raise ArgumentError(
            "the sequence is not spread over the ranks of the schedule",
            found=f"{shards.world} shards",
            allowed=f"{schedule.world} ranks",
        )
    if shards.layout not in schedule.layouts:
        raise ArgumentError(
            f"the schedule {schedule.name} does not work with this layout",
            found=shards.layout,
            allowed=", ".join(schedule.layouts),
        )


class _SequenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        schedule: CpSchedule,
        call: AttentionCall,
    ) -> torch.Tensor:
        out, saved = schedule.forward(
            q.contiguous(), k.contiguous(), v.contiguous(), call._replace(sinks=sinks)
        )
        ctx.save_for_backward(sinks, *saved)
        ctx.schedule, ctx.call = schedule, call
        return out

    @staticmethod
    @once_differentiable  # a second derivative would miss what came from other ranks
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sinks, *saved = ctx.saved_tensors
        call = ctx.call._replace(sinks=sinks)
        grads = ctx.schedule.backward(grad_outputs[0].contiguous(), tuple(saved), call)
        return (*grads, None, None)


def block_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bands: Bands, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of one block, `out` unrounded where the kernel computes in fp32 anyway."""
    if call.kernel.upcasts:
        dtype = accumulation_dtype(q)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return call.kernel.forward(q, k, v, bands, call.scale)


def block_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bands: Bands,
    call: AttentionCall,
) -> Gradients:
    """Return (dq, dk, dv) of one block, given the whole attention's out and lse; unrounded as in `block_forward`."""
    if call.kernel.upcasts:
        dtype = accumulation_dtype(q)
        dout, q, k, v, out = (tensor.to(dtype) for tensor in (dout, q, k, v, out))
    return call.kernel.backward(dout, q, k, v, out, lse, bands, call.scale)


class Partial:
    """Attention of fixed queries over keys that come in parts; starts with no key seen.

    `out` [T, H, D] and `lse` [T, H] are in max(fp32, q's type).
    """

    def __init__(self, q: torch.Tensor) -> None:
        dtype = accumulation_dtype(q)
        self._empty = True
        self.out = q.new_zeros(q.shape, dtype=dtype)
        self.lse = q.new_full(q.shape[:2], float("-inf"), dtype=dtype)

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Join the attention over further keys."""
        if self._empty:
            self.out, self.lse, self._empty = out.to(self.out.dtype), lse.to(self.lse.dtype), False
        else:
            self.out, self.lse = merge(self.out, self.lse, out, lse)
