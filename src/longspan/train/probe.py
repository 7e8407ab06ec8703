"""Real steps of a recipe on this machine, at two lengths, beside what `plan` says of them: what has to be corrected.

A step's time is that of its matrices, which grows with the tokens, and that of attention, which grows with their
square. Two lengths tell the two apart, and what grows in memory from what does not:

    seconds(T) = a * matrices(T) + b * attention(T)      a, b: how far the rates of `plan` are off
    bytes(T)   = c + estimated weights + d * activations(T)

Rows are one document of random ids each; the model, its weights, adapters, optimizer and memory settings are the
recipe's. What several processes add is estimated as before.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from longspan.core.errors import ArgumentError
from longspan.data.rows.loader import PackedRow
from longspan.parallel.launch import process_group
from longspan.plan.cost import step_seconds
from longspan.plan.efficiency import gpu_shares
from longspan.plan.hardware import CPU, GPUS, Gpu, MeasuredRates, gpu_named
from longspan.plan.models import ModelShape
from longspan.plan.scale import layer_seconds
from longspan.plan.training import KEPT, TrainingMemory, training_memory
from longspan.plan.training_step import TrainingStep
from longspan.train.config import ParallelConfig, StageConfig, TrainConfig
from longspan.train.fit import adapters, fit_memory, machine_budget, training_step
from longspan.train.known_models import KnownModel, known_model
from longspan.train.machine import measured_cpu
from longspan.train.metrics import peak_memory
from longspan.train.optim import build_optimizers
from longspan.train.runtime import on_machine, prepare_blocks
from longspan.train.spread import build_spread
from longspan.train.stage_model import stage_model
from longspan.train.trainer import train_step

__all__ = ["Probe", "Probed", "correction", "machine_name", "probe"]

LENGTHS = {"cpu": (512, 2048), "cuda": (4096, 16384)}
"""Tokens of the two rows, where the recipe's own are not shorter."""
STEPS = 3
"""At each length; the first makes the optimizer's state, and the fastest of the others counts."""
ATTENTION_SEEN = 0.05
"""Share of attention in the estimated time of the longer row below which it is not told apart."""
FREE = 0.8
"""Share of the memory that the longer row may take by estimate."""


class Probed(NamedTuple):
    """One length: what was estimated, in its parts, and what was measured."""

    tokens: int
    matrices: float
    """Seconds, with all that is not attention."""
    attention: float
    kept: float
    """Bytes that do not grow with the row."""
    grown: float
    seconds: float
    bytes: float


class Probe(NamedTuple):
    """What was measured, and the machine corrected by it."""

    rows: list[Probed]
    gpu: Gpu
    lines: list[str]
    """What was scaled, in words."""


def machine_name() -> str:
    """Return what this machine is called where GPUs are named: its GPU, or cpu.

    Raises:
        ArgumentError: a GPU without figures.
    """
    return _this_gpu().name if torch.cuda.is_available() else CPU


def probe(config: TrainConfig, root: Path, *, lengths: tuple[int, int] | None = None) -> Probe:
    """Run a few steps of a recipe's longest stage on this machine, on one process, and return the correction.

    Args:
        config: the recipe.
        root: where relative paths start.
        lengths: tokens of the two rows; None: LENGTHS, or half of the stage's and the whole where it is shorter.

    Raises:
        ArgumentError: a GPU without figures, a model without an estimate, rows that do not fit this machine.
    """
    config = on_machine(config.model_copy(update={"parallel": ParallelConfig()}))
    known = known_model(config.model, root, fetch=True)
    shape = known.shape
    if shape is None:
        raise ArgumentError("there is no estimate for this model, so none can be corrected")
    stage = max(config.stages, key=lambda each: each.context_length)
    cuda = torch.cuda.is_available()
    if config.memory.auto:
        config = config.model_copy(update={"memory": fit_memory(config, shape, machine_budget())[0]})
    gpu = _this_gpu() if cuda else measured_cpu(shape, adapters(config.lora))
    short, long = lengths or LENGTHS["cuda" if cuda else "cpu"]
    long = min(long, stage.context_length)
    short = min(short, long // 2)
    if short < 1:
        raise ArgumentError("a probe needs rows of two tokens at least", found=f"{long}")
    steps = [_step(config, stage, tokens, cuda=cuda) for tokens in (short, long)]
    estimates = [training_memory(shape, step) for step in steps]
    free = machine_budget().device * FREE
    if estimates[1].device + gpu.workspace > free:
        raise ArgumentError(
            f"rows of {long:,} tokens do not fit this machine by estimate: nothing was run",
            found=f"{(estimates[1].device + gpu.workspace) / 1e9:.1f} GB",
            allowed=f"{free / 1e9:.1f} GB",
            fix="probe a smaller model, or with memory settings that save more",
        )
    with process_group(
        timeout_seconds=config.parallel.timeout_seconds, always=config.memory.needs_sharding
    ) as device:
        measured = _measure(config, stage, known, (short, long), device)
    rows = [
        _beside(shape, gpu, step, memory, *found) for step, memory, found in zip(steps, estimates, measured)
    ]
    corrected, lines = correction(gpu, rows)
    return Probe(rows, corrected, lines)


def correction(gpu: Gpu, rows: Sequence[Probed]) -> tuple[Gpu, list[str]]:
    """Return the machine with rates and memory corrected by two measured rows, and what was scaled."""
    short, long = rows
    shares = gpu_shares(gpu)
    lines = []
    a, b = _factors(short, long)
    if a is None or b is None:
        a = b = long.seconds / (long.matrices + long.attention)
        lines.append(
            f"time: all of it times {a:.2f}: attention is too small a part of these rows to be told apart"
        )
    else:
        lines.append(f"time: matrices and all else times {a:.2f}, attention times {b:.2f}")
    grows = (long.bytes - short.bytes) / (long.grown - short.grown) if long.grown > short.grown else 0.0
    if grows > 0:
        lines.append(f"memory: what grows with a row times {grows:.2f}")
    else:
        grows = 1.0
        lines.append(
            "memory: no more for the longer row than for the shorter: what grows is left as estimated"
        )
    beyond = max(0.0, long.bytes - long.kept - grows * long.grown)
    lines.append(
        f"memory: {beyond / 1e9:.2f} GB beside all tensors, for {gpu.workspace / 1e9:.2f} GB allowed"
    )
    measured = MeasuredRates(shares.linear / a, shares.forward / b, shares.backward / b, grows, beyond)
    return gpu._replace(measured=measured), lines


def _factors(short: Probed, long: Probed) -> tuple[float | None, float | None]:
    """Return how many times longer matrices and attention take than estimated; None where two rows do not tell."""
    if long.attention < ATTENTION_SEEN * (long.attention + long.matrices):
        return None, None
    apart = short.matrices * long.attention - long.matrices * short.attention
    if not apart:
        return None, None
    a = (short.seconds * long.attention - long.seconds * short.attention) / apart
    b = (long.seconds * short.matrices - short.seconds * long.matrices) / apart
    # A rate that comes out ten times off, or below zero, is noise.
    return (a, b) if 0.1 < a < 10 and 0.1 < b < 10 else (None, None)


def _this_gpu() -> Gpu:
    name = torch.cuda.get_device_name()
    gpu = gpu_named(name)
    if gpu is None:
        raise ArgumentError(f"there are no figures for this machine's {name}", allowed=", ".join(GPUS))
    return gpu


def _step(config: TrainConfig, stage: StageConfig, tokens: int, *, cuda: bool) -> TrainingStep:
    return training_step(config, stage, cuda=cuda)._replace(tokens=tokens, accumulates=False, documents=1)


def _beside(
    shape: ModelShape, gpu: Gpu, step: TrainingStep, memory: TrainingMemory, seconds: float, size: float
) -> Probed:
    layers = layer_seconds(shape, gpu, step.parallel, context=step.tokens, num_gpus=1)
    whole, matrices = (
        step_seconds(shape, gpu, step, each, num_gpus=1, micro_steps=1)
        for each in (layers, [layer._replace(forward=0.0, backward=0.0) for layer in layers])
    )
    kept = sum(size for name, size in memory.parts.items() if name in KEPT)
    return Probed(step.tokens, matrices, whole - matrices, kept, memory.device - kept, seconds, size)


def _measure(
    config: TrainConfig, stage: StageConfig, known: KnownModel, lengths: Sequence[int], device: torch.device
) -> list[tuple[float, float]]:
    """Return seconds of a step and bytes at its peak, for each length."""
    spread = build_spread(config.parallel, device)
    model = stage_model(config, stage, None, known)
    prepare_blocks(model, config)
    trained = spread.shard(model, config.memory)
    optimizers = build_optimizers(model, config.optimizer)
    words = known.shape.vocab if known.shape is not None else 2
    found = []
    for tokens in lengths:
        gc.collect()
        _forget_peak()
        seconds = []
        for number in range(STEPS):
            row = _row(tokens, words, seed=number)
            started = time.perf_counter()
            train_step(
                trained, optimizers, [row], rows_per_micro_batch=1, spread=spread,
                max_grad_norm=config.optimizer.max_grad_norm, chunk_tokens=config.memory.chunk_tokens,
                offload_chunk_cache=config.memory.offload_chunk_cache,
            )  # fmt: skip
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        found.append((min(seconds[1:]), _peak()))
    return found


def _row(tokens: int, words: int, *, seed: int) -> PackedRow:
    ids = np.random.default_rng(seed).integers(0, words, tokens)
    one: Any = np.zeros(1, dtype=np.uint32)
    borders = np.array([0, tokens], dtype=np.int32)
    return PackedRow(
        ids,
        borders,
        one,
        one.astype(np.uint16),
        ("probe",),
        one.astype(bool),
        np.ones(tokens, dtype=np.uint8),
    )


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    # Linux: the high-water mark of resident memory starts again.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Return bytes of the GPU, or of this process, at the highest since `_forget_peak`."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        return float(torch.cuda.max_memory_reserved() + outside)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024.0 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        return float(peak_memory(torch.device("cpu")))
