"""What the planner says beside what others published: seconds a step, tokens a second, memory, longest context.

    python -m benchmarks.plan_published

Nothing of ours is measured here. A row is fitted where `plan.efficiency` took a share from it; all others are held
out. Settings are those that a source gives; `note` says what it does not.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

from benchmarks.offloaded_step import simulate

from longspan.core.mesh_config import MeshConfig
from longspan.models.shape import shape_of_fields
from longspan.plan.hardware import GPUS
from longspan.plan.models import MODELS, ModelShape, published_configs
from longspan.plan.training import WORKSPACE, training_memory
from longspan.plan.training_step import MemoryConfig, TrainingStep

K, M = 2**10, 2**20
TRL = "TRL, github.com/huggingface/trl/pull/6845"
EASY = "EasyContext README"


class Speed(NamedTuple):
    """A published speed."""

    source: str
    model: str
    gpus: int
    gpu: str
    context: int
    schedule: str
    kernel: str
    value: float
    unit: str
    fitted: bool = False
    recompute: bool = True
    note: str = ""
    """Why it is far off, or what the source does not say."""


SPEEDS = (
    Speed("UPipe, arXiv:2602.21196", "llama-3-8b", 8, "h100", 128 * K, "ulysses", "fa3", 2280, "tokens/s/GPU", True),
    Speed(EASY, "llama-2-7b", 8, "a100", 64 * K, "none", "fa2", 10240, "tokens/s", True),
    Speed(EASY, "llama-2-7b", 8, "a100", 64 * K, "ring", "fa2", 7816, "tokens/s"),
    Speed(EASY, "llama-2-7b", 8, "a100", 128 * K, "ring", "fa2", 4266, "tokens/s", note="half as fast as its own 64K"),
    Speed(EASY, "llama-2-7b", 8, "a100", 512 * K, "ring", "fa2", 2133, "tokens/s"),
    Speed(EASY, "llama-2-7b", 8, "a100", 700 * K, "ring", "fa2", 1603, "tokens/s"),
    Speed(TRL, "qwen3-0.6b", 8, "h100", M, "ring", "fa3", 137, "s"),
    Speed(TRL, "qwen3-8b", 8, "h100", M, "ring", "fa3", 364, "s", note="380 s in its release notes"),
    Speed(TRL, "qwen3-8b", 16, "h100", 2 * M, "ring", "fa3", 696, "s"),
    Speed(TRL, "qwen3-8b", 32, "h100", 4 * M, "ring", "fa3", 1346, "s"),
    Speed(TRL, "qwen3-30b-a3b", 8, "h100", M, "ring", "fa3", 483, "s", note="experts at the share of matrices"),
    Speed(TRL, "qwen3-32b", 8, "h100", M, "ring", "fa3", 1295, "s"),
    Speed(TRL, "qwen3-0.6b", 8, "h100", 4 * M, "ring", "fa3", 2135, "s"),
    Speed("torchtitan 2024-12", "llama-3-8b", 8, "h100", 32 * K, "ring", "fa2", 3890, "tokens/s/GPU"),
    Speed("torchtitan 2024-12", "llama-3-8b", 8, "h100", 64 * K, "ring", "fa2", 2540, "tokens/s/GPU"),
    Speed("torchtitan 2024-12", "llama-3-8b", 8, "h100", 128 * K, "ring", "fa2", 1071, "tokens/s/GPU",
          note="its first all-gather context parallelism; MFU falls to 14%"),
    Speed("torchtitan 2024-12", "llama-3-8b", 8, "h100", 256 * K, "ring", "fa2", 548, "tokens/s/GPU", note="the same"),
    Speed("MEMO, arXiv:2407.12117", "llama-2-7b", 8, "a800", M, "ulysses", "fa2", 0.523, "MFU", recompute=False,
          note="saves tokens' activations, recomputes few"),
    Speed("FPDT, arXiv:2408.16978", "llama-3-8b", 4, "a100", 2 * M, "ulysses", "fa2", 0.55, "MFU",
          note="with recomputed attention 83% of the peak: counted otherwise"),
    Speed("ProLong, arXiv:2410.02660", "llama-3-8b", 8, "h100", 64 * K, "none", "fa2", 2525, "tokens/s/GPU",
          note="20B tokens in 2.2K GPU hours; documents shorter than rows"),
    Speed("ProLong, arXiv:2410.02660", "llama-3-8b", 8, "h100", 512 * K, "ulysses", "fa2", 455, "tokens/s/GPU",
          note="20B tokens in 12.2K GPU hours; documents shorter than rows"),
    Speed("ms-swift example, LoRA", "qwq-32b", 8, "a100", 512 * K, "ulysses", "fa2", 150, "s",
          note="less than attention takes at 100% of the peak: rows are not all 512K"),
)  # fmt: skip


class Peak(NamedTuple):
    """Published memory of a GPU, GB."""

    source: str
    model: str
    gpus: int
    context: int
    value: float


PEAKS = (
    Peak(TRL, "qwen3-0.6b", 8, M, 27.9),
    Peak(TRL, "qwen3-8b", 8, M, 56.2),
    Peak(TRL, "qwen3-30b-a3b", 8, M, 46.0),
    Peak(TRL, "qwen3-32b", 8, M, 60.8),
    Peak(TRL, "qwen3-0.6b", 8, 4 * M, 73.7),
)


class Longest(NamedTuple):
    """A longest context somebody published."""

    who: str
    gpu: str
    num_gpus: int
    schedule: str
    context: float


LONGEST = [
    Longest("ALST recipe", "h200", 1, "none", 1.2e6),
    Longest("ALST", "h100", 1, "none", 0.5e6),
    Longest("ALST", "h100", 8, "ulysses", 3.7e6),
    Longest("ALST", "h100", 16, "ulysses", 8e6),
    Longest("ALST", "h100", 32, "ulysses", 15e6),
    Longest("UPipe (heads in chunks)", "h100", 8, "all_gather", 5e6),
    Longest("UPipe (heads in chunks)", "h100", 16, "all_gather", 8e6),
]


def longest_context(gpu: str, num_gpus: int, schedule: str, *, model: str = "llama-3-8b") -> tuple[int, str]:
    """Return the longest context that fits, to 32K tokens, and what limits it."""
    low, high = 0, 2**13
    degrees = MeshConfig() if num_gpus == 1 else MeshConfig.of_schedule(schedule, num_gpus)

    def limit(units: int) -> str | None:
        return simulate(
            MODELS[model], GPUS[gpu], degrees, context=units * 2**15, num_gpus=num_gpus, sequences=1
        ).limit

    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if limit(middle) else (middle, high)
    return low * 2**15, limit(high) or ""


def shape(name: str) -> ModelShape:
    """Return the shape of a model by its name."""
    return MODELS.get(name) or shape_of_fields(published_configs()[name], name)


def predicted_speed(row: Speed) -> float:
    """Return what the planner says, in the row's unit."""
    parallel = MeshConfig() if row.schedule == "none" else MeshConfig.of_schedule(row.schedule, row.gpus)
    step = simulate(
        shape(row.model), GPUS[row.gpu], parallel, context=row.context, num_gpus=row.gpus,
        sequences=row.gpus // parallel.cp, recompute=row.recompute, kernel=row.kernel,
    )  # fmt: skip
    rate = step.tokens_per_second
    return {"s": step.seconds, "MFU": step.mfu, "tokens/s/GPU": rate, "tokens/s": rate * row.gpus}[row.unit]


def predicted_peak(row: Peak) -> float:
    """Return GB of a GPU: weights and AdamW in bf16, sharded; blocks computed again from inputs on the host."""
    step = TrainingStep(
        row.context,
        parallel=MeshConfig(cp_ring=row.gpus, schedule="ring"),
        dtype="bfloat16",
        memory=MemoryConfig(activation_checkpointing="offload"),
    )
    return (training_memory(shape(row.model), step).device + WORKSPACE) / 1e9


def time_error(row: Speed, predicted: float) -> float:
    """Return the error of seconds: rates are their inverse."""
    return predicted / row.value - 1 if row.unit == "s" else row.value / predicted - 1


def main() -> None:
    """Print the tables."""
    print("| source | model | GPUs | context | kernel | published | predicted | error of time | |")
    print("|---|---|---|---:|---|---:|---:|---:|---|")
    errors = []
    for row in SPEEDS:
        predicted = predicted_speed(row)
        error = time_error(row, predicted)
        if not row.fitted:
            errors.append(abs(error))
        form = ".3f" if row.unit == "MFU" else ",.0f"
        print(
            f"| {row.source} | {row.model} | {row.gpus} {row.gpu} | {row.context // K}K | {row.kernel} "
            f"| {row.value:{form}} {row.unit} | {predicted:{form}} | {error:+.0%} "
            f"| {'fitted' if row.fitted else row.note} |",
            flush=True,
        )
    print(f"\nmedian error of {len(errors)} held-out rows: {statistics.median(errors):.0%}\n")
    print(
        "| source | model | GPUs | what | published | predicted | error |\n|---|---|---|---|---:|---:|---:|"
    )
    errors = []
    for peak in PEAKS:
        gb = predicted_peak(peak)
        errors.append(abs(gb / peak.value - 1))
        print(
            f"| {peak.source} | {peak.model} | {peak.gpus} h100 | GB at {peak.context // K}K | {peak.value} "
            f"| {gb:.1f} | {gb / peak.value - 1:+.0%} |",
            flush=True,
        )
    for longest in LONGEST:
        found, _ = longest_context(longest.gpu, longest.num_gpus, longest.schedule)
        errors.append(abs(found / longest.context - 1))
        print(
            f"| {longest.who} | llama-3-8b | {longest.num_gpus} {longest.gpu} | longest context "
            f"| {longest.context / 1e6:.1f}M | {found / 1e6:.1f}M | {found / longest.context - 1:+.0%} |"
        )
    print(f"\nmedian error of {len(errors)} rows of memory, none fitted: {statistics.median(errors):.0%}")


if __name__ == "__main__":
    main()
