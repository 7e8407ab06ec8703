"""Memory and time of a model that answers: weights, keys and values, reading a prompt, one token after another.

weights   2 bytes each, spread over the GPUs (tensor parallelism)
cache     keys and values of the context, in bf16; a layer with a window keeps its window; states in fp32
prefill   FLOPs of a forward pass over the prompt / (peak * share), the logits of the last token alone
decode    bytes of the weights that a token needs and of the cache / (bandwidth * DECODE_SHARE): each is read once
"""

from __future__ import annotations

from typing import NamedTuple

from longspan.plan.efficiency import gpu_shares
from longspan.plan.hardware import Gpu
from longspan.plan.memory import BYTES, SUM_BYTES
from longspan.plan.models import FLOPS_OF_STATE, ModelShape

__all__ = ["Answering", "answering"]

DECODE_SHARE = 0.6
"""Share of the paper bandwidth of memory that reading weights and cache reaches: a guess."""
PREFILL_CHUNK = 8192
"""Tokens of a prompt whose activations are alive at once."""


class Answering(NamedTuple):
    """Estimates for one prompt, on all GPUs together."""

    parts: dict[str, float]
    """Bytes of one GPU by part."""
    prefill_seconds: float
    tokens_per_second: float
    """While it answers, at the end of the context."""
    fits: bool

    @property
    def device(self) -> float:
        """Bytes of one GPU."""
        return sum(self.parts.values())


def answering(
    model: ModelShape, gpu: Gpu, *, context: int, num_gpus: int, kernel: str | None = None
) -> Answering:
    """Return memory and time of one sequence of `context` tokens on `num_gpus` that share the model."""
    shares = gpu_shares(gpu, kernel)
    peak = gpu.flops * num_gpus
    linear = sum(kind.layers * (2 * kind.layer_active + FLOPS_OF_STATE * kind.state) for kind in model.kinds)
    prefill = context * linear / (peak * shares.linear) + model.attention_flops(context) / (
        peak * shares.forward
    )
    cache = sum(_kept(kind, context) for kind in model.kinds)
    widest = max(max(kind.intermediate, kind.heads * kind.held_dim) for kind in model.kinds)
    parts = {
        "weights": model.parameters * BYTES / num_gpus,
        "keys and values": cache / num_gpus,
        "activations": min(context, PREFILL_CHUNK) * (4 * model.hidden + 3 * widest / num_gpus) * BYTES,
        "context, buffers, fragmentation (allowance)": gpu.workspace,
    }
    read = model.active_parameters * BYTES + cache
    rate = gpu.bandwidth * num_gpus * DECODE_SHARE / read
    return Answering(parts, prefill, rate, sum(parts.values()) <= gpu.memory)


def _kept(kind: ModelShape, context: int) -> float:
    """Return bytes that layers of a kind keep of a context."""
    seen = min(context, kind.window or context, kind.chunk or context)
    elements = kind.kv_heads * (kind.head_dim + (kind.value_dim or kind.head_dim))
    return kind.layers * (seen * elements * BYTES + kind.state * SUM_BYTES)
