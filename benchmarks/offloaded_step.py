"""Time and memory of a step of every schedule, nearly everything offloaded: for the tables of benchmarks/parallel.md.

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

from longspan.core.mesh_config import MeshConfig
from longspan.plan import scale
from longspan.plan.hardware import Gpu
from longspan.plan.memory import BYTES, SUM_BYTES, attention_buffers
from longspan.plan.models import ModelShape
from longspan.plan.scale import arrangements, kind_seconds

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


class Step(NamedTuple):
    """One optimizer step."""

    parallel: MeshConfig
    seconds: float
    mfu: float
    """Share of the peak that the model's own FLOPs take, recomputation not counted."""
    tokens_per_second: float
    """Per GPU."""
    exposed: float
    """Share of the time in which communication is waited for."""
    memory: Memory
    limit: str | None
    """What does not fit; None if the step is possible."""


def simulate(
    model: ModelShape,
    gpu: Gpu,
    parallel: MeshConfig,
    *,
    context: int,
    num_gpus: int,
    sequences: int,
    recompute: bool = True,
    kernel: str | None = None,
) -> Step:
    """Return the time and memory of one optimizer step.

    Args:
        model: its shape.
        gpu: the hardware.
        parallel: schedule and degrees; the sequence group divides `num_gpus`.
        context: tokens of a sequence, one causal document.
        num_gpus: all GPUs; parameters are sharded over all of them.
        sequences: sequences of the whole step.
        recompute: layers are recomputed in the backward pass; without, nothing but scores is.
    """
    world = parallel.cp
    tokens = -(-context // world)
    linear, forward, backward, gather, scatter, of_head, free_of = kind_seconds(
        model, gpu, parallel, context=context, num_gpus=num_gpus, kernel=kernel
    )
    pass_forward = max(linear + forward, gather)
    again = linear + forward if recompute else 0.0
    pass_backward = max(again + 2 * linear + backward, gather + scatter)
    head = of_head * (4 if recompute else 3)
    micro_step = model.layers * (pass_forward + pass_backward) + head
    micro_steps = sequences * world / num_gpus
    # Gradients go to the host, updated parameters come back; the update itself runs there.
    update = model.parameters / num_gpus * 2 * BYTES / (gpu.host_link * scale.LINK_EFFICIENCY)
    seconds = micro_steps * micro_step + update
    free = model.layers * (3 * linear + sum(free_of)) + head
    free += model.layers * (linear + free_of[0]) if recompute else 0.0
    flops = sequences * model.model_flops(context)
    memory = step_memory(
        model,
        schedule=parallel.schedule_name,
        tokens=tokens,
        num_gpus=num_gpus,
        ring_degree=parallel.cp_ring,
        ulysses_degree=parallel.cp_ulysses,
    )
    return Step(
        parallel,
        seconds,
        flops / (seconds * num_gpus * gpu.flops),
        sequences * context / seconds / num_gpus,
        1 - micro_steps * free / seconds,
        memory,
        memory.limit(gpu, num_gpus),
    )


def best_steps(
    model: ModelShape, gpu: Gpu, *, context: int, num_gpus: int, batch_tokens: int
) -> dict[str, Step]:
    """Return the fastest possible step of every schedule, over all sizes of the sequence group.

    A step is `batch_tokens` tokens, one sequence at least. A schedule for which nothing fits is given with the
    arrangement that lacks least memory, and says what limits it; one that has no arrangement is left out.
    """
    sequences = max(1, batch_tokens // context)
    best: dict[str, Step] = {}
    world = max(1, num_gpus // sequences)
    while world <= num_gpus:
        for parallel in arrangements(model, gpu, world):
            step = simulate(model, gpu, parallel, context=context, num_gpus=num_gpus, sequences=sequences)
            other = best.get(parallel.schedule_name)
            if other is None or _preference(step, gpu, num_gpus) < _preference(other, gpu, num_gpus):
                best[parallel.schedule_name] = step
        world *= 2
    return best


def _preference(step: Step, gpu: Gpu, num_gpus: int) -> tuple[bool, float]:
    if step.limit is None:
        return False, step.seconds
    return True, max(step.memory.device / gpu.memory, step.memory.host / gpu.host_for_rank(num_gpus))


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
    # The kernel's fp32 dq stands in `layer`.
    buffers = attention_buffers(
        schedule, model, tokens, kernel=0.0, ring_degree=ring_degree, ulysses_degree=ulysses_degree
    )
    return Memory((2 * shard + gathered) * BYTES + WORKSPACE, layer, buffers, host)
