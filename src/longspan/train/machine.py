"""What this machine's CPU computes, measured in a few seconds with layers as wide as a model's.

A layer is run forward and backward without its attention, then attention by itself: norms, RoPE, additions and adapters
are in the rate of matrices, which is how `plan.efficiency` has it for GPUs too. All in fp32, on torch's threads. Memory
beside all tensors is what this process has when nothing is measured yet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import Bands, attention, choose_kernel
from longspan.plan.hardware import CPU, Gpu, MeasuredRates
from longspan.plan.models import ModelShape
from longspan.plan.scale import CPU_HALF_ROWS
from longspan.plan.training_step import Adapters
from longspan.train.fit import machine_budget

__all__ = ["measured_cpu"]

ROWS, MOST_ROWS = 512, 2048
"""Tokens of the layer that is measured, more where that takes less than FLOPS."""
FLOPS = 4e10
HEADS = 8
"""Of the attention that is measured, at MOST_ROWS tokens."""
REPEATS = 3
SQUARE = 1024
FRAGMENTATION = {"whole": 1.35, "adapters": 1.9}
"""Bytes that glibc's heap takes for those of tensors that are alive and grow with a row, as benchmarks/plan.md has them
measured. 1.0 where MALLOC_MMAP_THRESHOLD_ is set, to 262144 there."""
COPIED = 1 << 24
"""Elements of what is copied to measure the memory: 64 MiB."""


def measured_cpu(model: ModelShape, lora: Adapters | None = None) -> Gpu:
    """Return this machine's CPU with rates measured for the layers of a model, trained whole or by adapters.

    Raises:
        ArgumentError: layers without attention alone, whose rate cannot be told from others'.
    """
    kind = max(model.kinds, key=lambda each: (each.heads > 0, each.layers))
    if not kind.heads:
        raise ArgumentError(f"no layer of {model.name} has attention: there is nothing to measure on a CPU")
    beside = _resident()
    square = torch.randn(SQUARE, SQUARE)
    flops = 2 * SQUARE**3 / _seconds(lambda: square @ square)
    block, copied = torch.randn(COPIED), torch.empty(COPIED)
    bandwidth = 2 * 4 * COPIED / _seconds(lambda: copied.copy_(block))
    products = 3 if lora is None else 2
    layer = _TimedLayer(kind, lora)
    of_row = products * 2 * layer.weights
    rows = min(MOST_ROWS, max(ROWS, int(FLOPS / of_row)))
    slower = 1 + CPU_HALF_ROWS / rows
    linear = rows * of_row / _seconds(lambda: layer.run(rows)) * slower / flops
    forward, backward = (rate / flops for rate in _attention_rates(kind))
    memory = machine_budget().device
    heap = (
        1.0
        if "MALLOC_MMAP_THRESHOLD_" in os.environ
        else FRAGMENTATION["whole" if lora is None else "adapters"]
    )
    return Gpu(
        CPU, flops, memory, bandwidth, bandwidth, bandwidth, bandwidth, 0.0, 1, CPU,
        MeasuredRates(linear, forward, backward, heap, beside),
    )  # fmt: skip


def _resident() -> float | None:
    """Return the bytes that this process has in memory; None where nothing says it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


class _TimedLayer(nn.Module):
    """The matrices of a layer with what stands between them; queries stand in for what attention makes of them."""

    def __init__(self, kind: ModelShape, lora: Adapters | None) -> None:
        super().__init__()
        hidden, width, wide = kind.hidden, kind.heads * kind.held_dim, kind.intermediate
        kv_width = kind.kv_heads * kind.held_dim
        sizes = {"q": (hidden, width), "k": (hidden, kv_width), "v": (hidden, kv_width), "o": (width, hidden)}
        if wide:
            sizes |= {"gate": (hidden, wide), "up": (hidden, wide), "down": (wide, hidden)}
        self.linears = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.weights = sum(fan_in * fan_out for fan_in, fan_out in sizes.values())
        self.norms = nn.ParameterList(torch.ones(hidden) for _ in range(2))
        self.head_dim = kind.held_dim
        self.sides = nn.ModuleDict()
        if lora is not None:
            self.requires_grad_(False)
            for name in set(lora.targets) & sizes.keys():
                fan_in, fan_out = sizes[name]
                down, up = nn.Linear(fan_in, lora.rank, bias=False), nn.Linear(lora.rank, fan_out, bias=False)
                self.sides[name] = nn.Sequential(down, up)
        self.hidden = hidden

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linears[name](x)
        return out + 2.0 * self.sides[name](x) if name in self.sides else out

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Return heads after a rotation, as transformers computes RoPE."""
        heads = x.view(len(x), -1, self.head_dim)
        first, second = heads.chunk(2, dim=-1)
        angles = torch.ones(len(x), 1, self.head_dim)
        return (heads * angles + torch.cat((-second, first), dim=-1) * angles).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _norm(x, self.norms[0])
        q, k, v = self.turned(self.linear("q", y)), self.turned(self.linear("k", y)), self.linear("v", y)
        x = x + self.linear("o", q) + k.mean() + v.mean()
        if "gate" not in self.linears:
            return x
        y = _norm(x, self.norms[1])
        return x + self.linear("down", nn.functional.silu(self.linear("gate", y)) * self.linear("up", y))

    def run(self, rows: int) -> None:
        x = torch.randn(rows, self.hidden, requires_grad=True)
        self(x).sum().backward()
        self.zero_grad(set_to_none=True)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return RMSNorm in the steps that transformers takes: torch's own is one kernel."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _attention_rates(kind: ModelShape) -> tuple[float, float]:
    """Return FLOP/s of causal attention, forward and backward."""
    tokens, group = MOST_ROWS, max(1, kind.heads // kind.kv_heads)
    shared = max(1, min(kind.kv_heads, HEADS // group))
    heads = shared * group
    sizes = [(tokens, number, kind.held_dim) for number in (heads, shared, shared)]
    q, k, v = (torch.randn(size, requires_grad=True) for size in sizes)
    kernel, bands = choose_kernel("cpu"), Bands.from_documents([0, tokens])

    def forward() -> torch.Tensor:
        return attention(q, k, v, bands, kernel=kernel)

    def both() -> None:
        torch.autograd.grad(forward().sum(), (q, k, v))

    flops = 4 * tokens**2 / 2 * heads * kind.held_dim
    with torch.no_grad():
        one_way = _seconds(forward)
    # Of two close measurements the difference may be anything: backward takes no less than forward.
    return flops / one_way, 2.5 * flops / max(_seconds(both) - one_way, one_way)


def _seconds(run: Callable[[], object]) -> float:
    """Return the shortest of a few runs after one that is not counted."""
    run()
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return max(min(found), 1e-9)
