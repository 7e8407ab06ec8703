"""Joining attention over disjoint sets of keys through the log-sum-exp of the scores."""

from __future__ import annotations

import torch

__all__ = ["merge"]


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
