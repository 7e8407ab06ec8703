"""Joining attention over disjoint sets of keys through the log-sum-exp of the scores; sinks, which are one key more."""

from __future__ import annotations

import torch

__all__ = ["accumulation_dtype", "merge", "merge_pieces", "sink_gradient", "with_sinks"]


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the type in which parts of `tensor` are summed: its own, fp32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join two partial attentions over disjoint keys into the attention over both.

    Args:
        out_a, out_b: partial outputs [..., head_dim].
        lse_a, lse_b: log-sum-exp of their scores [...], -inf where nothing was seen.

    Returns:
        out and lse in max(fp32, input dtype). No overflow at any score size; where neither part saw a key,
        out is 0 and lse is -inf.
    """
    dtype = torch.promote_types(torch.promote_types(out_a.dtype, out_b.dtype), torch.float32)
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    # Weights are taken from the differences to the larger lse, not from the joined lse: at lse 5e4 fp32 has
    # steps of 0.004, and rounding the sum would scale the output by as much. Where nothing was seen at all
    # both are -inf, and -inf minus -inf is NaN: subtract 0 there, so that both weights are exp(-inf) = 0.
    top = torch.maximum(lse_a, lse_b)
    base = top.masked_fill(top == float("-inf"), 0.0)
    weight_a, weight_b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    total = weight_a + weight_b
    lse = base + torch.log(total)
    share = total.clamp_min(1.0)  # at least exp(0) where anything was seen
    return out_a.to(dtype) * (weight_a / share)[..., None] + out_b.to(dtype) * (weight_b / share)[
        ..., None
    ], lse


def merge_pieces(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Join partial attentions out [pieces, ..., head_dim] and lse [pieces, ...] as `merge` does two."""
    top = lse.amax(0)
    base = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(lse - base)
    total = weights.sum(0)
    share = weights / total.clamp_min(1.0)
    return (out.to(lse.dtype) * share[..., None]).sum(0), base + torch.log(total)


def with_sinks(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let each head give a part of its attention to a key without a value, whose score is `sinks` [H].

    `out` [T, H, D] and `lse` [T, H] are those over all keys, so this comes last, once a query. With what it returns in
    place of both, the backward pass of a kernel gives the gradients of queries, keys and values as they are.
    """
    if sinks is None:
        return out, lse
    sinks = sinks.to(lse.dtype)
    share = torch.sigmoid(lse - sinks)
    return (out * share[..., None]).to(out.dtype), torch.logaddexp(lse, sinks)


def sink_gradient(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the gradient of `sinks` [H], given `out` and `lse` with them: what they take of a score's softmax."""
    if sinks is None:
        return None
    taken = torch.exp(sinks.to(lse.dtype) - lse)
    return -((dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1) * taken).sum(0).to(sinks.dtype)
