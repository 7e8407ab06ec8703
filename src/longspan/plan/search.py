"""Which arrangement of GPUs and which memory settings train a model at a context length fastest.

Every schedule and every size of the sequence group is tried with every combination of memory settings; of those that
fit, the fastest is best. One sequence is a micro-batch; what is left of the GPUs is data parallel, and parameters are
sharded over all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from longspan.core.mesh_config import MeshConfig
from longspan.plan.choose import Candidate, candidates
from longspan.plan.communication import AttentionShape, bytes_sent
from longspan.plan.hardware import CPU, Gpu
from longspan.plan.longest import longest
from longspan.plan.models import ModelShape
from longspan.plan.scale import arrangement_name, arrangements, layer_seconds
from longspan.plan.training_step import Adapters, MemoryConfig, TrainingStep

__all__ = ["Arrangement", "longest_context", "search"]


class Arrangement(NamedTuple):
    """One way to run a step."""

    candidate: Candidate
    seconds: float
    """Of an optimizer step."""
    tokens: int
    """Of an optimizer step."""
    mfu: float
    """Share of the peak that the model's own FLOPs take, recomputation not counted."""
    sent: float
    """Bytes that one GPU sends in an optimizer step."""
    limit: str | None
    """What does not fit; None if the step is possible."""

    @property
    def name(self) -> str:
        """The schedule and its degrees in short."""
        return arrangement_name(self.candidate.step.parallel)

    def parallel(self) -> dict[str, Any]:
        """Return the fields of a recipe's `parallel`."""
        return self.candidate.step.parallel.model_dump(exclude={"tp"})

    def to_dict(self, gpu: Gpu, num_gpus: int) -> dict[str, Any]:
        """Return it for JSON."""
        memory = self.candidate.memory
        return {
            "schedule": self.name,
            "fits": self.limit is None,
            "lacks": self.limit,
            "seconds_per_step": self.seconds,
            "tokens_per_step": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "tokens_per_second_per_gpu": self.tokens / self.seconds / num_gpus,
            "mfu": self.mfu,
            "bytes_sent_per_gpu": self.sent,
            "parallel": self.parallel(),
            "memory": self.candidate.step.memory.chosen,
            "device_bytes": memory.device + gpu.workspace,
            "device_parts": {**memory.parts, "workspace": gpu.workspace},
            "peak_moment": memory.moment,
            "host_bytes": memory.host_bytes,
            "host_parts": memory.host,
        }


def search(
    model: ModelShape,
    gpu: Gpu,
    *,
    context: int,
    num_gpus: int,
    batch_tokens: int,
    lora: Adapters | None = None,
    kernel: str | None = None,
) -> list[Arrangement]:
    """Return the best of every schedule, possible ones first and fastest first.

    A schedule with which nothing fits is given with the settings that lack least memory, and says what limits it.
    Weights are fp32 (bf16 beside adapters), computed in bf16; on a CPU all is fp32.

    Args:
        context: tokens of a sequence, one causal document.
        batch_tokens: tokens of an optimizer step, one sequence a group of GPUs at least.
        kernel: FlashAttention's version, `efficiency.KERNELS`; None: the one made for the GPU.
    """
    sequences = max(1, batch_tokens // context)
    best: dict[str, Arrangement] = {}
    for world in (size for size in range(1, num_gpus + 1) if num_gpus % size == 0):
        groups = num_gpus // world
        if groups > sequences:
            continue
        # Equally many for each group, so steps may differ by some rows.
        rows = round(sequences / groups) * groups
        for parallel in arrangements(model, gpu, world):
            for found in _of(model, gpu, parallel, context, num_gpus, rows, lora, kernel):
                other = best.get(parallel.schedule_name)
                if other is None or _rank(found, gpu, num_gpus) < _rank(other, gpu, num_gpus):
                    best[parallel.schedule_name] = found
    return sorted(best.values(), key=lambda each: _rank(each, gpu, num_gpus))


def longest_context(model: ModelShape, gpu: Gpu, *, num_gpus: int, **settings: Any) -> int:
    """Return the longest sequence with which some arrangement fits; the settings are those of `search`.

    Raises:
        ArgumentError: see `longest.longest`.
    """

    def fits(context: int) -> bool:
        found = search(model, gpu, context=context, num_gpus=num_gpus, **settings)
        return any(each.limit is None for each in found)

    return longest(fits, found=f"{num_gpus} x {gpu.name}")


def _of(
    model: ModelShape,
    gpu: Gpu,
    parallel: MeshConfig,
    context: int,
    num_gpus: int,
    rows: int,
    lora: Adapters | None,
    kernel: str | None,
) -> list[Arrangement]:
    groups = num_gpus // parallel.cp
    micro_steps = rows / groups
    step = TrainingStep(
        context,
        parallel=parallel.model_copy(update={"dp_shard": groups}),
        dtype="float32" if lora is None or gpu.family == CPU else "bfloat16",
        memory=MemoryConfig(compute_dtype=None if gpu.family == CPU else "bfloat16"),
        lora=lora,
        cuda=gpu.family != CPU,
        accumulates=micro_steps > 1,
    )
    layers = layer_seconds(model, gpu, parallel, context=context, num_gpus=num_gpus, kernel=kernel)
    # Frozen weights get no gradient: one product less.
    saved = 0 if lora is None else context * model.linear_flops()
    flops = rows * (model.model_flops(context) - saved)
    return [
        Arrangement(
            candidate,
            candidate.seconds,
            rows * context,
            flops / (candidate.seconds * num_gpus * gpu.flops),
            micro_steps * _sent(model, candidate.step, num_gpus),
            candidate.memory.limit(gpu, num_gpus),
        )
        for candidate in candidates(model, step, gpu, layers, num_gpus=num_gpus, micro_steps=micro_steps)
    ]


def _rank(found: Arrangement, gpu: Gpu, num_gpus: int) -> tuple[bool, float, int]:
    if found.limit is None:
        return False, found.seconds / found.tokens, found.candidate.effort
    memory = found.candidate.memory
    host = gpu.host_for_rank(num_gpus)
    if host:
        beyond = memory.host_bytes / host
    else:
        beyond = float("inf") if memory.host_bytes else 0.0
    lack = max((memory.device + gpu.workspace) / gpu.memory, beyond)
    return True, lack, found.candidate.effort


def _sent(model: ModelShape, s: TrainingStep, num_gpus: int) -> float:
    """Return bytes that a GPU sends in one micro-step: attention of all layers, and FSDP's gathers and sums."""
    tokens = -(-s.tokens // s.parallel.cp)
    again = s.memory.activation_checkpointing != "none"
    attention = 0
    for kind in model.kinds:
        if not kind.heads:
            continue
        shape = AttentionShape(tokens, kind.heads, kind.kv_heads, kind.held_dim, s.compute_bytes)
        forward, backward = bytes_sent(
            s.parallel.planned_schedule,
            shape,
            ring_degree=s.parallel.cp_ring,
            ulysses_degree=s.parallel.cp_ulysses,
        )
        attention += kind.layers * (forward * (1 + again) + backward)
    chunks = 1 if s.memory.chunk_tokens is None else -(-s.tokens // s.memory.chunk_tokens)
    share = (num_gpus - 1) / num_gpus
    # Gathered forward and backward, in a first walk over chunks too; gradients are summed in fp32.
    gathers = (2 if chunks == 1 else 3 * chunks - 1) * s.compute_bytes
    sums = chunks * 4 if s.lora is None else 0
    return attention + model.parameters * share * (gathers + sums)
