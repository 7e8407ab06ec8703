"""What this machine's CPU computes, measured in a few seconds with layers as wide as a model's.

A layer is run forward and backward without its attention, then attention by itself: norms, additions and adapters
are in the rate of matrices, which is how `plan.efficiency` has it for GPUs too. All in fp32, on torch's threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

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

ROWS = 512
"""Tokens of the layer that is measured; of attention twice as many."""
REPEATS = 3
SQUARE = 1024
FRAGMENTATION = 2.0
"""Bytes that glibc's heap takes for those of tensors that are alive: measured in a step of LoRA on layers of SmolLM2's
widths, rows of 512 and 2,048 tokens. 1.0 where MALLOC_MMAP_THRESHOLD_ is set, to 262144 there."""
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
    square = torch.randn(SQUARE, SQUARE)
    flops = 2 * SQUARE**3 / _seconds(lambda: square @ square)
    block, copied = torch.randn(COPIED), torch.empty(COPIED)
    bandwidth = 2 * 4 * COPIED / _seconds(lambda: copied.copy_(block))
    products = 3 if lora is None else 2
    layer = _TimedLayer(kind, lora)
    layer_flops = products * 2 * ROWS * layer.weights
    slower = 1 + CPU_HALF_ROWS / ROWS
    linear = layer_flops / _seconds(layer.run) * slower / flops
    forward, backward = (rate / flops for rate in _attention_rates(kind))
    memory = machine_budget().device
    return Gpu(
        CPU, flops, memory, bandwidth, bandwidth, bandwidth, bandwidth, 0.0, 1, CPU,
        MeasuredRates(linear, forward, backward, 1.0 if "MALLOC_MMAP_THRESHOLD_" in os.environ else FRAGMENTATION),
    )  # fmt: skip


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
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        q, kv = self.linear("q", y), (self.linear("k", y), self.linear("v", y))
        x = x + self.linear("o", q) + sum(each.mean() for each in kv)
        if "gate" not in self.linears:
            return x
        y = self.norms[1](x)
        return x + self.linear("down", nn.functional.silu(self.linear("gate", y)) * self.linear("up", y))

    def run(self) -> None:
        x = torch.randn(ROWS, self.hidden, requires_grad=True)
        self(x).sum().backward()
        self.zero_grad(set_to_none=True)


def _attention_rates(kind: ModelShape) -> tuple[float, float]:
    """Return FLOP/s of causal attention, forward and backward."""
    tokens = 2 * ROWS
    sizes = [(tokens, heads, kind.held_dim) for heads in (kind.heads, kind.kv_heads, kind.kv_heads)]
    q, k, v = (torch.randn(size, requires_grad=True) for size in sizes)
    kernel, bands = choose_kernel("cpu"), Bands.from_documents([0, tokens])

    def forward() -> torch.Tensor:
        return attention(q, k, v, bands, kernel=kernel)

    def both() -> None:
        torch.autograd.grad(forward().sum(), (q, k, v))

    flops = 4 * tokens**2 / 2 * kind.heads * kind.held_dim
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
