"""Bytes of device memory at the peak of a training step: the backward pass of one layer, everything else offloaded.

The recipe that is counted is the one long contexts need: parameters, gradients and optimizer sharded over all ranks
(FSDP), optimizer states and the one saved tensor per layer in host memory, the rest of a layer recomputed, MLP in
tiles, loss in chunks. What is left on the device is one layer's attention and its neighbourhood. In units of
T * hidden * b bytes (u; b = 2), with c = K / H:

    residual stream, its gradient, normalised input, recomputed input          4
    q, k, v, out, dout, dq, dk, dv                                             4 + 4c
    the kernel's own fp32 dq                                                   2

and what a schedule adds: partial sums in fp32, blocks under way, tensors before and after a trade of heads.
"""

from __future__ import annotations

from typing import NamedTuple

from longspan.plan.communication import kv_heads_of_rank
from longspan.plan.hardware import Gpu
from longspan.plan.models import ModelShape

__all__ = ["Memory", "attention_buffers", "step_memory"]

BYTES = 2
"""Of an element of an activation, a parameter or a gradient: bf16."""
SUM_BYTES = 4
"""Of an element of a sum: fp32."""
WORKSPACE = 4e9
"""CUDA context, communication buffers, tiles of MLP and loss, fragmentation."""


class Memory(NamedTuple):
    """Bytes of one rank."""

    parameters: float
    """Shards of parameters and gradients, two gathered layers with the gradient of one, workspace."""
    activations: float
    """One layer's tensors of every schedule."""
    buffers: float
    """What the schedule adds."""
    host: float
    """In host memory: optimizer states and saved layer inputs."""

    @property
    def device(self) -> float:
        """Bytes on the device."""
        return self.parameters + self.activations + self.buffers

    def limit(self, gpu: Gpu, num_gpus: int) -> str | None:
        """Return what does not fit on `num_gpus` of them, None if all does."""
        if self.device > gpu.memory:
            return "device memory"
        return "host memory" if self.host > gpu.host_for_rank(num_gpus) else None


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
    query = tokens * model.heads * model.head_dim
    if schedule == "all_gather":
        # Two heads' keys and values of the whole sequence, their gradients in the kernel's type and one fp32 sum
        # under way, and one head's share of the queries with its gradient.
        whole = 2 * tokens * ring_degree * model.head_dim
        share = query / model.kv_heads
        return whole * (3 * BYTES + 2 * SUM_BYTES) + 5 * share * BYTES
    if schedule == "none":
        return query * SUM_BYTES
    pair = 2 * tokens * model.kv_heads * model.head_dim
    traded = 0.0
    if schedule in ("ulysses", "usp") and ulysses_degree > 1:
        kv = kv_heads_of_rank(model.heads, model.kv_heads, ulysses_degree, 0)
        pair = 2 * tokens * ulysses_degree * kv * model.head_dim
        # q, k, v, out, dout of the place beside the tokens' own, and one trade's send and receive buffers.
        traded = (3 * query + pair) * BYTES + 2 * (query + pair) * BYTES
    sums = query * SUM_BYTES
    if ring_degree == 1:
        return traded + sums
    # Visitor and next visitor; the gradient of the own block, the visiting, the arriving and the newest one.
    return traded + sums + pair * (3 * BYTES + 4 * SUM_BYTES)


def step_memory(
    model: ModelShape,
    *,
    schedule: str,
    tokens: int,
    num_gpus: int,
    ring_degree: int = 1,
    ulysses_degree: int = 1,
) -> Memory:
    """Return the memory of one rank that holds `tokens` tokens of a sequence; see the module for what is counted.

    Args:
        model: its shape.
        schedule: as in a recipe.
        tokens: tokens of this rank.
        num_gpus: ranks that the parameters are sharded over.
        ring_degree, ulysses_degree: as in a recipe.
    """
    shard = model.parameters / num_gpus
    gathered = model.layer_parameters * 3 if num_gpus > 1 else 0
    unit = tokens * model.hidden * BYTES
    query = tokens * model.heads * model.head_dim
    share = model.kv_heads / model.heads
    layer = 4 * unit + query * (BYTES * (4 + 4 * share) + SUM_BYTES)
    # Adam: master copy and two moments in fp32.
    host = shard * 3 * SUM_BYTES + model.layers * unit
    buffers = attention_buffers(
        schedule, model, tokens, ring_degree=ring_degree, ulysses_degree=ulysses_degree
    )
    return Memory((2 * shard + gathered) * BYTES + WORKSPACE, layer, buffers, host)
