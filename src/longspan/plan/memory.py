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
    schedule: str,
    model: ModelShape,
    tokens: int,
    *,
    kernel: float,
    ring_degree: int = 1,
    ulysses_degree: int = 1,
    element_bytes: int = BYTES,
) -> float:
    """Return bytes that attention holds beside the tensors of the layer, at the peak of its backward pass.

    The layer's are q, k, v, out and their gradients, as many as this rank has tokens.

    Args:
        schedule: as in a recipe.
        model: heads and head dim.
        tokens: tokens of this rank.
        kernel: what the kernel needs inside itself for all heads.
        ring_degree, ulysses_degree: as in a recipe.
        element_bytes: of an activation.
    """
    query = tokens * model.heads * model.held_dim
    if schedule == "all_gather":
        # Two heads' keys and values of the whole sequence, their gradients in the kernel's type and one fp32 sum
        # under way, and one head's share of the queries with its gradient.
        whole = 2 * tokens * ring_degree * model.held_dim
        share = query / model.kv_heads
        held = whole * (3 * element_bytes + 2 * SUM_BYTES) + 5 * share * element_bytes
        return held + kernel / model.kv_heads
    if schedule == "none":
        return kernel
    pair = 2 * tokens * model.kv_heads * model.held_dim
    traded, trade = 0.0, 0.0
    if schedule in ("ulysses", "usp") and ulysses_degree > 1:
        kv = kv_heads_of_rank(model.heads, model.kv_heads, ulysses_degree, 0)
        placed = 2 * tokens * ulysses_degree * kv * model.held_dim
        # The rank's own out and its gradient; heads of keys that stand on several ranks, with gradients.
        traded = (2 * query + 2 * (placed - pair)) * element_bytes
        pair = placed
        # What leaves and what arrives when gradients go home; the kernel is done then.
        trade = 2 * (query + pair) * element_bytes
    if ring_degree == 1:
        return traded + max(kernel, trade)
    # dq so far; the visitor and the next one; gradients in fp32 of the own block, of the one that leaves and of the
    # one that arrives. Then the kernel, or its gradients of keys in fp32 and laid together.
    held = query * SUM_BYTES + pair * (2 * element_bytes + 3 * SUM_BYTES)
    return traded + max(held + max(kernel, 2 * pair * SUM_BYTES), trade)
