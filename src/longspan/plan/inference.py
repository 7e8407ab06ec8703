"""Memory and time of a model that answers: weights, keys and values, reading a prompt, one token after another.

weights   2 bytes each, spread over the GPUs (tensor parallelism)
cache     keys and values of the context; a layer with a window keeps its window; states in fp32. Heads of keys are
          spread over the GPUs as far as there are enough, a latent stands on every GPU
sums      of what the GPUs found, two a layer (Megatron-LM, arXiv:1909.08053, section 3), waited for
prefill   FLOPs of a forward pass over the prompt / (peak * share) + sums, the logits of the last token alone
decode    bytes of the weights that a token needs and of the cache / (bandwidth * DECODE_SHARE), each read once, + sums

Latent attention keeps what servers keep, which answer from the latent (vLLM, SGLang); transformers keeps every head.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from longspan.core.errors import ArgumentError
from longspan.core.units import format_bytes, format_count
from longspan.plan.efficiency import gpu_shares
from longspan.plan.hardware import Gpu
from longspan.plan.longest import longest
from longspan.plan.memory import BYTES, SUM_BYTES
from longspan.plan.models import FLOPS_OF_STATE, ModelShape
from longspan.plan.scale import sum_seconds

__all__ = ["Answering", "KvName", "answering", "explain_answering", "longest_answer"]

DECODE_SHARE = 0.6
"""Share of the paper bandwidth of memory that reading weights and cache reaches: a guess."""
PREFILL_CHUNK = 8192
"""Tokens of a prompt whose activations are alive at once."""
KvName = Literal["bfloat16", "fp8", "q8_0", "q4_0"]
KV_BYTES: dict[KvName, float] = {"bfloat16": 2.0, "fp8": 1.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Of an element of the cache. llama.cpp's types hold 32 numbers and a scale of 16 bits (ggml-common.h)."""


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
    model: ModelShape,
    gpu: Gpu,
    *,
    context: int,
    num_gpus: int,
    kernel: str | None = None,
    kv: KvName = "bfloat16",
) -> Answering:
    """Return memory and time of one sequence of `context` tokens on `num_gpus` that share the model.

    Raises:
        ArgumentError: the GPUs cannot share the heads evenly.
    """
    heads = {kind.heads for kind in model.kinds} - {0}
    if any(each % num_gpus for each in heads):
        raise ArgumentError(
            "GPUs that share a model have equally many of its heads each",
            found=f"{' and '.join(map(str, sorted(heads)))} heads on {num_gpus} GPUs",
            allowed=f"numbers that divide {math.gcd(*heads)}",
        )
    shares = gpu_shares(gpu, kernel)
    peak = gpu.flops * num_gpus
    linear = sum(kind.layers * (2 * kind.layer_active + FLOPS_OF_STATE * kind.state) for kind in model.kinds)
    prefill = context * linear / (peak * shares.linear) + model.attention_flops(context) / (
        peak * shares.forward
    )
    cache = sum(_kept(kind, context, num_gpus, kv) for kind in model.kinds)
    widest = max(max(kind.intermediate, kind.heads * kind.held_dim) for kind in model.kinds)
    parts = {
        "weights": model.parameters * BYTES / num_gpus,
        "keys and values": cache,
        "activations": min(context, PREFILL_CHUNK) * (4 * model.hidden + 3 * widest / num_gpus) * BYTES,
        "context, buffers, fragmentation (allowance)": gpu.workspace,
    }
    read = model.active_parameters * BYTES / num_gpus + cache
    sums = 2 * model.layers
    chunks = -(-context // PREFILL_CHUNK)
    of_prompt = sum_seconds(gpu, num_gpus, context / chunks * model.hidden * BYTES) * chunks
    of_token = sum_seconds(gpu, num_gpus, model.hidden * BYTES)
    return Answering(
        parts,
        prefill + sums * of_prompt,
        1 / (read / (gpu.bandwidth * DECODE_SHARE) + sums * of_token),
        sum(parts.values()) <= gpu.memory,
    )


def longest_answer(
    model: ModelShape, gpu: Gpu, *, num_gpus: int, kernel: str | None = None, kv: KvName = "bfloat16"
) -> int:
    """Return the longest sequence that fits; see `answering` and `longest.longest` for arguments and errors."""

    def fits(context: int) -> bool:
        return answering(model, gpu, context=context, num_gpus=num_gpus, kernel=kernel, kv=kv).fits

    return longest(fits, found=f"{num_gpus} x {gpu.name}")


def explain_answering(
    model: ModelShape, gpu: Gpu, *, context: int, num_gpus: int, kernel: str | None, kv: KvName
) -> list[str]:
    """Return the estimate of `answering`, a line for each formula."""
    shares = gpu_shares(gpu, kernel)
    kept = sum(kind.layers * kind.cache_elements for kind in model.kinds)
    return [
        f"weights: {model.parameters:,} * {BYTES} bytes / {num_gpus}; a token reads {model.active_parameters:,}",
        f"cache: {kept:,} elements a token * {KV_BYTES[kv]:.4g} bytes, windows as far as they reach; of each GPU by "
        "heads of keys, a latent whole",
        f"prompt: {format_count(float(model.linear_flops()))} FLOPs a token of matrices at {shares.linear:.3g}, "
        f"{format_count(float(model.attention_flops(context)))} of attention at {shares.forward:.3g} of "
        f"{format_count(gpu.flops)} FLOP/s a GPU (plan/efficiency.py)",
        f"answer: weights and cache read once a token at {DECODE_SHARE:.0%} of {format_bytes(gpu.bandwidth)}/s a GPU, "
        "a guess",
        f"sums over GPUs: {2 * model.layers} of {model.hidden} * {BYTES} bytes a token, waited for",
    ]


def _kept(kind: ModelShape, context: int, num_gpus: int, kv: KvName) -> float:
    """Return bytes that one GPU keeps of a context, for all layers of a kind."""
    seen = min(context, kind.window or context, kind.chunk or context)
    ways = 1 if kind.latent else min(num_gpus, max(1, kind.kv_heads))
    keys = seen * kind.cache_elements * KV_BYTES[kv] / ways
    return kind.layers * (keys + kind.state * SUM_BYTES / num_gpus)
