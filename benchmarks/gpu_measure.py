"""How benchmarks/gpu.py measures: sizes, inputs, times and memory; a case that fails is a row too."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from longspan.core.errors import LongspanError
from longspan.core.seeds import rng

Row = dict[str, Any]
Tensors = tuple[torch.Tensor, ...]

# Out of memory, "not implemented" and what a compiler refuses are RuntimeErrors; the others are what another torch
# answers to a name, an argument or a shape that it does not know.
FAILURES = (RuntimeError, ImportError, AttributeError, TypeError, ValueError, AssertionError, LongspanError)


class Scale(NamedTuple):
    """Sizes of all sections, and where they run."""

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    attention_tokens: tuple[int, ...]
    document_tokens: int
    """Median length of the many documents."""
    zigzag_tokens: tuple[int, ...]
    hidden: int
    intermediate: int
    vocabulary: int
    loss_tokens: tuple[int, ...]
    mlp_tokens: tuple[int, ...]
    mlp_tiles: tuple[int, ...]
    layers: int
    layer_tokens: int
    seconds: float
    """Time for the repetitions of one case, after two."""


# Heads, hidden sizes and vocabulary of Llama-3-8B. Lengths first that say most, should time run out.
FULL = Scale(
    device="cuda",
    dtype=torch.bfloat16,
    heads=32,
    kv_heads=8,
    head_dim=128,
    attention_tokens=(16384, 65536, 262144, 32768, 131072),
    document_tokens=2048,
    zigzag_tokens=(65536, 131072),
    hidden=4096,
    intermediate=14336,
    vocabulary=128256,
    loss_tokens=(8192, 32768, 131072),
    mlp_tokens=(65536, 262144),
    mlp_tiles=(2048, 8192, 32768),
    layers=8,
    layer_tokens=32768,
    seconds=1.5,
)
DRY = Scale(
    device="cpu",
    dtype=torch.float32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    attention_tokens=(256,),
    document_tokens=40,
    zigzag_tokens=(96,),
    hidden=32,
    intermediate=64,
    vocabulary=101,
    loss_tokens=(64,),
    mlp_tokens=(64,),
    mlp_tiles=(16,),
    layers=2,
    layer_tokens=64,
    seconds=0.0,
)


class Deadline:
    """Runs cases until the time is up, and turns what fails into a row."""

    def __init__(self, section: str, seconds: float) -> None:
        self.section, self.end = section, time.monotonic() + seconds

    def row(self, case: Row, run: Callable[[], Row]) -> Row:
        """Return the case with what `run` found, or with the reason why there is nothing."""
        if time.monotonic() > self.end:
            return {"section": self.section, **case, "error": "not run: the time of the section was up"}
        try:
            # Of the case before; an error of the device shows up here too.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            found = run()
        except FAILURES as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            found = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:240]}
        return {"section": self.section, **case, **found}


def measure(forward: Callable[[], Any], backward: Callable[[Any], Any], scale: Scale) -> Row:
    """Return median milliseconds of the forward pass and of both, and MiB of peak memory beyond what was there.

    The first run (compilation, plans, pools) does not count.
    """
    cuda = scale.device == "cuda"

    def once() -> tuple[float, float]:
        if not cuda:
            start = time.perf_counter()
            state = forward()
            middle = time.perf_counter()
            backward(state)
            return (middle - start) * 1e3, (time.perf_counter() - start) * 1e3
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        state = forward()
        events[1].record()
        backward(state)
        events[2].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]), events[0].elapsed_time(events[2])

    once()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    times = [once(), once()]
    end = time.monotonic() + scale.seconds
    while len(times) < 20 and time.monotonic() < end:
        times.append(once())
    row: Row = {
        "forward_ms": statistics.median(t[0] for t in times),
        "total_ms": statistics.median(t[1] for t in times),
        "repeats": len(times),
    }
    if cuda:
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    return row


def normal(scale: Scale, *shape: int, seed: int, std: float = 1.0) -> torch.Tensor:
    """Return N(0, std) made on the device."""
    generator = torch.Generator(scale.device).manual_seed(seed)
    made = torch.randn(shape, generator=generator, device=scale.device, dtype=scale.dtype)
    return made.mul_(std)


def qkv(scale: Scale, tokens: int) -> Tensors:
    """Return q, k, v and the gradient of the output, [tokens, heads, head_dim]."""
    heads = (scale.heads, scale.kv_heads, scale.kv_heads, scale.heads)
    return tuple(normal(scale, tokens, n, scale.head_dim, seed=i) for i, n in enumerate(heads))


def borders(tokens: int, median: int | None) -> np.ndarray:
    """Return cu_seqlens of one document, or of many whose lengths are log-normal around `median`."""
    if median is None:
        return np.array([0, tokens])
    lengths = rng(0, "gpu benchmark", tokens).lognormal(math.log(median), 1.0, size=8 + 4 * tokens // median)
    inner = np.cumsum(np.maximum(lengths.astype(np.int64), 1))
    return np.concatenate([[0], inner[inner < tokens], [tokens]])


def difference(found: Tensors, truth: Tensors) -> float:
    """Return the largest relative difference, by norm, among corresponding tensors."""
    worst = 0.0
    for a, b in zip(found, truth):
        # By parts: a copy in fp32 of the largest tensors would not fit beside everything else.
        error = sum(
            float((x.float() - y.float()).square().sum()) for x, y in zip(a.split(8192), b.split(8192))
        )
        norm = sum(float(y.float().square().sum()) for y in b.split(8192))
        worst = max(worst, math.sqrt(error / norm) if norm else math.sqrt(error))
    return worst
