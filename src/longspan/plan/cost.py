"""Seconds of a training step with the settings that save memory: what each of them costs in time.

Beside the pass itself (`plan.scale`), per layer and micro-step:

    checkpointing   the forward pass once more
    tiled MLP       the MLP's forward pass once more, unless the block is computed again anyway
    offload         the block's input to the host and back: waited for as far as it takes longer than the block
    parameters on the host   the shard to the device twice and its gradient back, likewise; the update at the speed
                    of the host's memory
    chunks          a forward pass of all but the last chunk once more, parameters gathered for each chunk; a cache
                    on the host comes to the device once for each chunk behind it
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.plan.hardware import Gpu
from longspan.plan.memory import SUM_BYTES
from longspan.plan.models import ModelShape
from longspan.plan.scale import LINK_EFFICIENCY, LayerSeconds, half_rows
from longspan.plan.training_step import TrainingStep

__all__ = ["step_seconds"]

UPDATE_BYTES = 28
"""Read and written for one parameter by AdamW in fp32: weight, both moments and, once, the gradient."""
HOST_BANDWIDTH = 200e9
"""Bytes a second of a node's host memory, which its GPUs share; a guess on the low side."""


def step_seconds(
    model: ModelShape,
    gpu: Gpu,
    s: TrainingStep,
    layers: Sequence[LayerSeconds],
    *,
    num_gpus: int,
    micro_steps: float,
) -> float:
    """Return seconds of one optimizer step.

    Args:
        layers: of a micro-step, one for each kind of layers, from `scale.layer_seconds`.
        num_gpus: all GPUs.
        micro_steps: passes of a rank in a step.
    """
    # A frozen head has no gradient.
    micro_step = (3 if s.lora is None or s.lora.embeddings else 2) * layers[0].head
    for kind, layer in zip(model.kinds, layers, strict=True):
        micro_step += kind.layers * _layer(kind, gpu, s, layer)
    trained = model.parameters / s.parallel.shards if s.lora is None else 0.0
    bandwidth = gpu.bandwidth
    if s.memory.offload_parameters:
        bandwidth = HOST_BANDWIDTH / min(num_gpus, gpu.per_node)
    return micro_steps * micro_step + trained * UPDATE_BYTES / bandwidth


def _layer(kind: ModelShape, gpu: Gpu, s: TrainingStep, layer: LayerSeconds) -> float:
    """Return seconds of one layer in one micro-step: forward, backward, and what either waits for."""
    tokens = -(-s.tokens // s.parallel.cp)
    link = gpu.host_link * LINK_EFFICIENCY
    chunks = 1 if s.memory.chunk_tokens is None else max(1, -(-s.tokens // s.memory.chunk_tokens))
    linear, attend, attend_back = layer.linear, layer.forward, layer.backward
    if chunks > 1 and s.memory.chunk_tokens is not None:
        slower = (1 + half_rows(gpu) / s.memory.chunk_tokens) / (1 + half_rows(gpu) / tokens)
        # Each part is added to the sum so far, which is read and written in fp32.
        merges = (chunks - 1) / 2 * tokens * kind.heads * kind.held_dim * 3 * SUM_BYTES / gpu.bandwidth
        linear, attend, attend_back = linear * slower, attend * slower + merges, attend_back * slower + merges
    forward = linear + attend
    again = 0.0
    if s.memory.activation_checkpointing != "none":
        again = forward
    elif s.memory.tiled_mlp is not None:
        again = linear * min(1.0, 3 * kind.hidden * kind.intermediate / kind.layer_active)
    # With frozen weights the matrices have one product in the backward pass, not two.
    products = 2 if s.lora is None else 1
    backward = again + products * linear + attend_back
    to_host = tokens * kind.hidden * s.compute_bytes
    to_host *= s.memory.activation_checkpointing == "offload"
    shard = kind.layer_parameters / s.parallel.shards * s.parameter_bytes * s.memory.offload_parameters
    cache = 2 * tokens * kind.kv_heads * kind.held_dim * (s.memory.offload_chunk_cache and chunks > 1)
    # Chunk i reads i chunks before it: (chunks - 1) / 2 of the whole cache on average, forward and backward.
    walked = cache * (chunks - 1) / 2
    of_forward = max(
        forward, layer.gather * chunks, (to_host + shard * chunks + walked * s.compute_bytes) / link
    )
    returned = to_host + 2 * shard * chunks + walked * (s.compute_bytes + 2 * SUM_BYTES)
    of_backward = max(backward, layer.gather * chunks + layer.scatter * chunks, returned / link)
    first_walk = of_forward * (chunks - 1) / chunks
    return of_forward + first_walk + of_backward
