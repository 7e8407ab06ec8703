"""What the planner says of time beside what others published: seconds a step, tokens a second, share of the peak.

    python -m benchmarks.plan_published

Memory: `benchmarks/plan_published_memory.py`. Nothing of ours is measured here. A row is fitted where
`plan.efficiency`, or FP8 below, took a share from it; all others are held out. Settings are those that a source gives;
`note` says what it does not.

Nothing of ours trains in FP8 or shares single matrices (tensor parallelism), so `longspan plan` has neither; rows that
do are predicted here, with what they change beside the planner's own formulas:

    FP8     matrices FP8 times as fast, attention as before
    tensor  a rank has a share of heads, widths and words; two gathers and two scatters of the hidden states a layer and
            pass are waited for (arXiv:2205.05198, section 4.2)
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

from benchmarks.offloaded_step import simulate
from benchmarks.published_shapes import K, M, shape

from longspan.core.mesh_config import MeshConfig
from longspan.plan.cost import step_seconds
from longspan.plan.hardware import GPUS
from longspan.plan.memory import BYTES
from longspan.plan.models import ModelShape
from longspan.plan.scale import LINK_EFFICIENCY, kind_seconds, layer_seconds
from longspan.plan.training_step import Adapters, MemoryConfig, TrainingStep

TRL = "TRL, github.com/huggingface/trl/pull/6845"
EASY = "EasyContext README"
QWEN = "QwenLM/Qwen README, LoRA rank 64"
NEMO = "NeMo 24.03 and 25.04, long sequence performance"
TITAN = "torchtitan 2024-12"
ASYNC = "torchtitan 2025-06, tensor parallel"
FP8 = 1.62
"""Speed of matrices in FP8 beside bf16: what one pair of rows says that differ in it alone (ASYNC, Llama-3-70B: 597.3
and 809.8 tokens/s/GPU, all blocks computed again)."""
LONGLLM = Adapters(32, targets=("q", "k", "v", "o"), quantized=True, embeddings=True)


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
    lora: Adapters | None = None
    rows: int = 1
    """Of a step on each GPU, one after the other; with tensor parallelism at once."""
    cp: int | None = None
    """GPUs that share a sequence; None: all of them, or one without a schedule."""
    tp: int = 1
    fp8: bool = False
    note: str = ""
    """Why it is far off, or what the source does not say."""


FULL = "TFLOPS/GPU"
"""Attention counted as if every token saw all others: the page of the same release gives both, such as 16,934 tokens/s
and 780 TFLOPS of Llama-2-7B at 4,096 tokens, 12,273 and 711 of Llama-3-8B at 8,192."""
TDP = "its GPUs draw 500 W"
CUDNN = "attention by cuDNN, whose share on Blackwell is not known here"
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
    Speed(TITAN, "llama-3-8b", 8, "h100", 32 * K, "none", "fa2", 3890, "tokens/s/GPU", fp8=True, note=TDP),
    Speed(TITAN, "llama-3-8b", 8, "h100", 64 * K, "all_gather", "fa2", 2540, "tokens/s/GPU", fp8=True, cp=2, note=TDP),
    Speed(TITAN, "llama-3-8b", 8, "h100", 128 * K, "all_gather", "fa2", 1071, "tokens/s/GPU", fp8=True, cp=4,
          note="half as fast as its own 64K"),
    Speed(TITAN, "llama-3-8b", 8, "h100", 256 * K, "all_gather", "fa2", 548, "tokens/s/GPU", fp8=True, cp=8,
          note="the same"),
    Speed(TITAN, "llama-3-70b", 256, "h100", 8 * K, "none", "fa2", 829, "tokens/s/GPU", fp8=True, tp=8, rows=16),
    Speed(ASYNC, "llama-3-70b", 256, "h100", 8 * K, "none", "fa2", 597.3, "tokens/s/GPU", tp=8, rows=16),
    Speed(ASYNC, "llama-3-70b", 256, "h100", 8 * K, "none", "fa2", 809.8, "tokens/s/GPU", True, tp=8, rows=16,
          fp8=True),
    Speed("MEMO, arXiv:2407.12117", "llama-2-7b", 8, "a800", M, "ulysses", "fa2", 0.523, "MFU", recompute=False,
          note="saves tokens' activations, recomputes few"),
    Speed("FPDT, arXiv:2408.16978", "llama-3-8b", 4, "a100", 2 * M, "ulysses", "fa2", 0.55, "MFU",
          note="with recomputed attention 83% of the peak: counted otherwise"),
    Speed("ProLong, arXiv:2410.02660", "llama-3-8b", 8, "h100", 64 * K, "none", "fa2", 2525, "tokens/s/GPU",
          note="20B tokens in 2.2K GPU hours; documents shorter than rows"),
    Speed("ProLong, arXiv:2410.02660", "llama-3-8b", 8, "h100", 512 * K, "ulysses", "fa2", 455, "tokens/s/GPU",
          note="20B tokens in 12.2K GPU hours; documents shorter than rows"),
    Speed("UPipe, arXiv:2602.21196", "qwen3-32b", 16, "h100", 128 * K, "ulysses", "fa3", 483.3, "tokens/s/GPU"),
    Speed(QWEN, "qwen-7b", 1, "a100", 2 * K, "none", "fa2", 5.2, "s", lora=Adapters(64), rows=8),
    Speed(QWEN, "qwen-7b", 1, "a100", 4 * K, "none", "fa2", 10.1, "s", lora=Adapters(64), rows=8),
    Speed(QWEN, "qwen-7b", 1, "a100", 8 * K, "none", "fa2", 21.3, "s", lora=Adapters(64), rows=8),
    Speed(QWEN, "qwen-7b", 1, "a100", 8 * K, "none", "fa2", 22.3, "s", lora=Adapters(64, quantized=True), rows=8),
    *(
        Speed(NEMO, "llama-2-7b", gpus, "h100", context, "none" if cp == 1 else "ring", "fa2", value, FULL,
              recompute=False, cp=cp, tp=tp, fp8=True)
        for context, gpus, tp, cp, value in (
            (4 * K, 4, 1, 1, 768), (32 * K, 32, 2, 2, 610), (128 * K, 128, 4, 4, 555), (512 * K, 512, 8, 16, 549),
            (M, 1024, 8, 32, 536),
        )
    ),
    Speed(NEMO, "llama-3-8b", 128, "b200", 128 * K, "ring", "fa4", 1588, FULL, recompute=False, cp=4, tp=2, fp8=True,
          note=CUDNN),
    Speed(NEMO, "llama-3-8b", 1024, "b200", M, "ring", "fa4", 1608, FULL, recompute=False, cp=16, tp=4, fp8=True,
          note=CUDNN),
    Speed("ms-swift example, LoRA", "qwq-32b", 8, "a100", 512 * K, "ulysses", "fa2", 150, "s",
          note="less than attention takes at 100% of the peak: rows are not all 512K"),
)  # fmt: skip


def predicted_speed(row: Speed) -> float:
    """Return what the planner says, in the row's unit."""
    degree = row.cp or row.gpus
    parallel = MeshConfig() if row.schedule == "none" else MeshConfig.of_schedule(row.schedule, degree)
    if row.lora is not None:
        return _adapted_seconds(row, parallel, row.lora)
    if row.fp8 or row.tp > 1:
        return _shared_rate(row, parallel) * (_full_flops(row) / 1e12 if row.unit == FULL else 1.0)
    step = simulate(
        shape(row.model), GPUS[row.gpu], parallel, context=row.context, num_gpus=row.gpus,
        sequences=row.gpus // parallel.cp, recompute=row.recompute, kernel=row.kernel,
    )  # fmt: skip
    rate = step.tokens_per_second
    return {
        "s": step.seconds,
        "MFU": step.mfu,
        "tokens/s/GPU": rate,
        "tokens/s": rate * row.gpus,
    }[row.unit]


def _adapted_seconds(row: Speed, parallel: MeshConfig, lora: Adapters) -> float:
    """Return seconds of a step of `row.rows` rows on each GPU, blocks computed again."""
    model, gpu = shape(row.model), GPUS[row.gpu]
    memory = MemoryConfig(activation_checkpointing="full")
    step = TrainingStep(row.context, parallel=parallel, dtype="bfloat16", memory=memory, lora=lora)
    layers = layer_seconds(model, gpu, parallel, context=row.context, num_gpus=row.gpus, kernel=row.kernel)
    return step_seconds(model, gpu, step, layers, num_gpus=row.gpus, micro_steps=row.rows)


def _full_flops(row: Speed) -> float:
    """Return FLOPs of a token, attention counted in full."""
    model = shape(row.model)
    return 3 * (model.linear_flops() + 2 * float(model.attention_flops(row.context)) / row.context)


def _shared_rate(row: Speed, parallel: MeshConfig) -> float:
    """Return tokens a second and GPU of a step in FP8 or with shared matrices."""
    gpu, ranks = GPUS[row.gpu], row.gpus // row.tp
    # What a rank has of the model; ranks of a ring stand `tp` GPUs apart.
    model, gpu = _share(shape(row.model), row.tp), gpu._replace(per_node=max(1, gpu.per_node // row.tp))
    one, all_rows = (
        kind_seconds(model, gpu, parallel, context=row.context * rows, num_gpus=ranks, kernel=row.kernel)
        for rows in (1, row.rows)
    )
    linear = all_rows.linear / (FP8 if row.fp8 else 1.0)
    forward, backward = one.forward * row.rows, one.backward * row.rows
    tokens = row.context * row.rows / parallel.cp
    sent = tokens * model.hidden * BYTES * (row.tp - 1) / row.tp
    traded = 4 * sent / (gpu.nvlink * LINK_EFFICIENCY)
    there = linear + forward + traded
    layer = max(there, one.gather)
    layer += max(there * row.recompute + 2 * linear + backward + traded, one.gather + one.scatter)
    seconds = model.layers * layer + 3 * all_rows.head
    return tokens / row.tp / seconds


def _share(model: ModelShape, tp: int) -> ModelShape:
    return model._replace(
        heads=model.heads // tp,
        kv_heads=model.kv_heads // tp,
        intermediate=model.intermediate // tp,
        vocab=model.vocab // tp,
    )


def long_conversations_hours(long: int, middle: int, rest: int) -> float:
    """Return hours of 3,500 rows of `long` tokens, 12,000 of `middle` and 4,500 of `rest`: longllm_qlora's mixture."""
    seconds = 0.0
    for rows, tokens in ((3_500, long), (12_000, middle), (4_500, rest)):
        one = Speed("", "llama-3-8b", 1, "a800", tokens, "none", "fa2", 0.0, "s", lora=LONGLLM)
        seconds += rows / 8 * predicted_speed(one)
    return seconds / 3600


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
        form = ".3f" if row.unit == "MFU" else ",.1f" if row.value < 100 else ",.0f"
        print(
            f"| {row.source} | {row.model} | {row.gpus} {row.gpu} | {row.context // K}K | {row.kernel} "
            f"| {row.value:{form}} {row.unit} | {predicted:{form}} | {error:+.0%} "
            f"| {'fitted' if row.fitted else row.note} |",
            flush=True,
        )
    print(f"\nmedian error of {len(errors)} held-out rows: {statistics.median(errors):.0%}\n")
    print("\nlongllm_qlora, 8 h on 8 A800 (arXiv:2404.19553), lengths not published; predicted:")
    for lengths in ((64 * K, 4 * K, 1 * K), (72 * K, 9 * K, 8 * K), (80 * K, 16 * K, 80 * K)):
        print(f"    3,500, 12,000 and 4,500 rows of {lengths}: {long_conversations_hours(*lengths):.1f} h")


if __name__ == "__main__":
    main()
