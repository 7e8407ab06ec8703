"""Memory that others published beside what the planner says, with the settings that each source gives.

    python -m benchmarks.plan_published_memory

No row is fitted: nothing in `plan.training` was chosen by one. Of software that differs from ours three things are
followed, each by a setting: kernels that fuse norms and the MLP's product (`TrainingStep.fused`), where weights,
gradients and optimizer state are kept (`States`), and what is computed again.
"""

from __future__ import annotations

import statistics
from typing import Literal, NamedTuple

from benchmarks.published_shapes import K, M, shape

from longspan.core.mesh_config import MeshConfig
from longspan.core.schedule_table import ScheduleName
from longspan.plan.hardware import GPUS
from longspan.plan.training import WORKSPACE, TrainingMemory, training_memory
from longspan.plan.training_step import MemoryConfig, TrainingStep

States = Literal["fp32", "host", "host but bf16 weights"]
"""Weights, gradients and AdamW's state in fp32 on the GPUs, sharded; all on the host; there, but for bf16 weights."""

TRL = "TRL, github.com/huggingface/trl/pull/6845"
ACCELERATE = "github.com/huggingface/accelerate/pull/4175"
ALST = "ALST, ArcticTraining projects/sequence-parallelism"
UPIPE = "UPipe, arXiv:2602.21196"


class Row(NamedTuple):
    """Published memory of a GPU, or a longest context."""

    source: str
    model: str
    gpus: int
    gpu: str
    context: int
    schedule: ScheduleName
    checkpointing: Literal["full", "offload"]
    states: States = "fp32"
    gb: float | None = None
    """Of a GPU; None: `context` is the longest one that ran."""
    tile: int | None = None
    fused: bool = False
    note: str = ""
    """Why it is far off, or what the source does not say."""


def _alst(
    model: str,
    gpus: int,
    context: int,
    gb: float | None = None,
    *,
    gpu: str = "h100",
    tiled: bool = True,
    offload: bool = True,
    note: str = "",
) -> Row:
    """A recipe of ALST: ZeRO-3, optimizer on the host, Liger's kernels; weights too where there is one GPU."""
    return Row(
        ALST, model, gpus, gpu, context, "none" if gpus == 1 else "ulysses", "offload" if offload else "full",
        "host" if gpus == 1 else "host but bf16 weights", gb, shape(model).hidden if tiled else None, True, note,
    )  # fmt: skip


THREE_TRADES = "our trade sends q, k and v at once, theirs one after the other"
CRASH = "555K ends in a kernel's illegal access, not for want of memory"
HOST = "probably for want of host memory, of which the recipe for 32 GPUs says that it is nearly gone"
SDPA = "attention by SDPA, which copies keys for every query head"
ROWS = (
    Row(TRL, "qwen3-0.6b", 8, "h100", M, "ring", "full", gb=27.9),
    Row(ACCELERATE, "qwen3-0.6b", 8, "h100", M, "ring", "offload", gb=20.8),
    Row(TRL, "qwen3-0.6b", 8, "h100", 4 * M, "ring", "offload", gb=73.7),
    Row(TRL, "qwen3-8b", 8, "h100", M, "ring", "offload", gb=56.2),
    Row(TRL, "qwen3-30b-a3b", 8, "h100", M, "ring", "offload", "host", gb=46.0),
    Row(TRL, "qwen3-32b", 8, "h100", M, "ring", "offload", "host", gb=60.8, tile=16384),
    Row(UPIPE, "llama-3-8b", 8, "h100", 128 * K, "all_gather", "offload", gb=21.1, tile=4096, fused=True),
    Row(UPIPE, "qwen3-32b", 16, "h100", 128 * K, "all_gather", "offload", gb=39.98, tile=5120, fused=True),
    Row(UPIPE, "llama-3-8b", 8, "h100", 5_000_000, "all_gather", "offload", tile=4096, fused=True),
    Row(UPIPE, "llama-3-8b", 16, "h100", 8_000_000, "all_gather", "offload", tile=4096, fused=True),
    _alst("llama-3-8b", 1, 300_000, 134.96, gpu="h200", tiled=False, offload=False),
    _alst("llama-3-8b", 1, 650_000, 126.81, gpu="h200", tiled=False),
    _alst("llama-3-8b", 1, 1_200_000, 136.15, gpu="h200"),
    _alst("qwen3-32b", 32, 7_000_000, 71.55),
    _alst("qwen3-32b", 64, 15_000_000, 71.0, note=THREE_TRADES),
    _alst("llama-3-70b", 32, 4_000_000, 47.7),
    _alst("llama-3-70b", 64, 10_000_000, 53.83, note=THREE_TRADES),
    _alst("llama-3-8b", 1, 500_000, note=CRASH),
    _alst("llama-3-8b", 8, 1_100_000, tiled=False, offload=False),
    _alst("llama-3-8b", 8, 1_200_000, offload=False, note=SDPA),
    _alst("llama-3-8b", 8, 2_400_000, tiled=False),
    _alst("llama-3-8b", 8, 3_700_000),
    _alst("llama-3-8b", 16, 8_000_000),
    _alst("llama-3-8b", 32, 15_000_000),
    _alst("qwen3-32b", 1, 230_000, note=HOST),
    _alst("qwen3-32b", 8, 1_550_000),
    _alst("qwen3-32b", 16, 4_000_000),
    _alst("llama-3-70b", 8, 200_000, offload=False),
    _alst("llama-3-70b", 16, 1_200_000, note=HOST),
)  # fmt: skip


def _memory(row: Row, context: int) -> TrainingMemory:
    parallel = MeshConfig() if row.gpus == 1 else MeshConfig.of_schedule(row.schedule, row.gpus)
    memory = MemoryConfig(
        activation_checkpointing=row.checkpointing,
        tiled_mlp=row.tile,
        compute_dtype="bfloat16",
        offload_parameters=row.states != "fp32",
    )
    return training_memory(
        shape(row.model), TrainingStep(context, parallel=parallel, memory=memory, fused=row.fused)
    )


def predicted_bytes(row: Row, context: int | None = None) -> float:
    """Return the bytes of a GPU at the peak, the planner's allowance included."""
    weights = 2 * shape(row.model).parameters / row.gpus if row.states == "host but bf16 weights" else 0.0
    return _memory(row, context or row.context).device + WORKSPACE + weights


def predicted_longest(row: Row) -> int:
    """Return the longest context that fits, to 8K tokens a GPU."""
    gpu, unit = GPUS[row.gpu], 8 * K * row.gpus

    def fits(units: int) -> bool:
        host = _memory(row, units * unit).host_bytes
        return predicted_bytes(row, units * unit) <= gpu.memory and host <= gpu.host_for_rank(row.gpus)

    low, high = 0, 1024
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def memory_error(row: Row) -> float:
    """Return the error of a row."""
    if row.gb is None:
        return predicted_longest(row) / row.context - 1
    return predicted_bytes(row) / 1e9 / row.gb - 1


def main() -> None:
    """Print the table."""
    print(
        "| source | model | GPUs | context | settings | published | predicted | error | |\n"
        "|---|---|---|---:|---|---:|---:|---:|---|"
    )
    errors = []
    for row in ROWS:
        error = memory_error(row)
        errors.append(abs(error))
        settings = [
            f"inputs {'on the host' if row.checkpointing == 'offload' else 'kept'}",
            f"states {row.states}",
            *(["tiled MLP"] if row.tile else []),
            *(["fused"] if row.fused else []),
        ]
        if row.gb is None:
            published, found = "longest", f"{(1 + error) * row.context / 1e6:.2f}M"
        else:
            published, found = f"{row.gb} GB", f"{(1 + error) * row.gb:.1f} GB"
        print(
            f"| {row.source} | {row.model} | {row.gpus} {row.gpu} | {row.context / 1e6:.2f}M | {', '.join(settings)} "
            f"| {published} | {found} | {error:+.0%} | {row.note} |"
        )
    print(f"\nmedian error of {len(errors)} rows, none fitted: {statistics.median(errors):.0%}")


if __name__ == "__main__":
    main()
