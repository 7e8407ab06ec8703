"""Bytes of device memory that a context-parallel schedule adds at the peak of a training step.

Partial sums in fp32, blocks under way, tensors before and after a trade of heads.
"""

from __future__ import annotations

from longspan.plan.communication import kv_heads_of_rank
from longspan.plan.models import ModelShape

__all__ = ["BYTES", "SUM_BYTES", "attention_buffers"]

BYTES = 2
"""Of an element of an activation, a parameter or a gradient: bf16."""
SUM_BYTES = 4
"""Of an element of a sum: fp32."""


def attention_buffers(
    schedule: str, model: ModelShape, tokens: int, *, ring_degree: int = 1, ulysses_degree: int = 1
) -> float:
    """Return bytes that a schedule holds beside the tensors of the layer, at the peak of its backward pass.

    Args:
        schedule: as in a recipe.
        model: heads and head dim.
        tokens: tokens of this rank.
        ring_degree, ulysses_degree: as in a recipe.
    """
    query = tokens * model.heads * model.held_dim
    if schedule == "all_gather":
        # Two heads' keys and values of the whole sequence, their gradients in the kernel's type and one fp32 sum
        # under way, and one head's share of the queries with its gradient.
        whole = 2 * tokens * ring_degree * model.held_dim
        share = query / model.kv_heads
        return whole * (3 * BYTES + 2 * SUM_BYTES) + 5 * share * BYTES
    if schedule == "none":
        return query * SUM_BYTES
    pair = 2 * tokens * model.kv_heads * model.held_dim
    traded = 0.0
    if schedule in ("ulysses", "usp") and ulysses_degree > 1:
        kv = kv_heads_of_rank(model.heads, model.kv_heads, ulysses_degree, 0)
        pair = 2 * tokens * ulysses_degree * kv * model.held_dim
        # q, k, v, out, dout of the place beside the tokens' own, and one trade's send and receive buffers.
        traded = (3 * query + pair) * BYTES + 2 * (query + pair) * BYTES
    sums = query * SUM_BYTES
    if ring_degree == 1:
        return traded + sums
    # Visitor and next visitor; the gradient of the own block, the visiting, the arriving and the newest one.
    return traded + sums + pair * (3 * BYTES + 4 * SUM_BYTES)
