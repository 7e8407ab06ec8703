"""`memory: auto`: the cheapest settings with which a training step fits in memory.

Every combination of the settings is estimated, its memory by `plan.training` and its time by `plan.cost`; of those that
fit the fastest is taken, of equally fast ones that with fewest settings. On most hardware that is this order:

    nothing; activations computed again (full) or the MLP in tiles; both; inputs of blocks on the host; parameters on
    the host; the row in chunks; keys and values of the chunks on the host
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from longspan.core.errors import ArgumentError
from longspan.core.units import format_bytes
from longspan.plan.cost import step_seconds
from longspan.plan.hardware import GPUS, Gpu
from longspan.plan.models import ModelShape
from longspan.plan.scale import LayerSeconds, layer_seconds
from longspan.plan.training import WORKSPACE, TrainingMemory, training_memory
from longspan.plan.training_step import TrainingStep

__all__ = ["Candidate", "Choice", "candidates", "choose_memory"]

SMALLEST_CHUNK = 1024
"""Tokens of a chunk or a tile below which products are too small to be fast."""
LARGEST_TILE = 4096


class Candidate(NamedTuple):
    """One combination."""

    step: TrainingStep
    memory: TrainingMemory
    seconds: float
    """Of an optimizer step of one micro-step."""

    @property
    def used(self) -> dict[str, Any]:
        """The settings that save memory, by their names in a recipe."""
        chosen = self.step.memory.chosen
        return {name: value for name, value in chosen.items() if value not in (None, False, "none")}

    @property
    def effort(self) -> int:
        """How many settings are in use."""
        return len(self.used)

    def describe(self) -> str:
        """Return the settings in words."""
        words = (name if value is True else f"{name} {value}" for name, value in self.used.items())
        return ", ".join(words) or "none"


class Choice(NamedTuple):
    """The settings that were chosen."""

    candidate: Candidate
    dearer_by: float
    """Share of time that they add to a step with none of them."""
    refused: list[tuple[Candidate, str]]
    """Cheaper combinations, cheapest first, and what each of them lacks."""

    def reasons(self) -> list[str]:
        """Return the choice and why it was made, a line each."""
        memory = self.candidate.memory
        lines = [
            f"memory: {self.candidate.describe()}; {format_bytes(memory.device)} on the device at the peak"
            f" ({memory.moment}), {format_bytes(memory.host_bytes)} on the host, {self.dearer_by:.0%} more time"
        ]
        lines += [f"  not {other.describe()}: {lack}" for other, lack in self.refused]
        return lines


def candidates(
    model: ModelShape,
    step: TrainingStep,
    gpu: Gpu,
    layers: Sequence[LayerSeconds],
    *,
    num_gpus: int,
    micro_steps: float = 1.0,
) -> list[Candidate]:
    """Return every combination of settings with its memory and time, fastest first; see `choose_memory`."""
    found = [
        Candidate(
            one,
            training_memory(model, one).scaled(1.0 if gpu.measured is None else gpu.measured.activations),
            step_seconds(model, gpu, one, layers, num_gpus=num_gpus, micro_steps=micro_steps),
        )
        for one in _combinations(step)
    ]
    return sorted(found, key=lambda each: (round(each.seconds, 9), each.effort, each.memory.device))


def _combinations(s: TrainingStep) -> Iterator[TrainingStep]:
    own = -(-s.tokens // s.parallel.cp)
    walked: list[tuple[int | None, bool]] = [(None, False)]
    # A sequence that is spread over ranks cannot be walked in chunks.
    if s.parallel.cp == 1:
        sizes = {s.tokens // parts for parts in (4, 16, 64)}
        walked += [
            (size, away)
            for size in sorted(sizes, reverse=True)
            for away in (False, True)
            if size >= SMALLEST_CHUNK
        ]
    for chunk, away in walked:
        alive = own if chunk is None else chunk
        tile = min(LARGEST_TILE, max(SMALLEST_CHUNK, alive // 8))
        for tiled in (None, tile) if tile < alive else (None,):
            for checkpointing in ("none", "full", "offload"):
                for offload in (False, True):
                    chosen = {
                        "activation_checkpointing": checkpointing,
                        "tiled_mlp": tiled,
                        "offload_parameters": offload,
                        "chunk_tokens": chunk,
                        "offload_chunk_cache": away,
                    }
                    yield s._replace(memory=s.memory.model_copy(update=chosen))


def choose_memory(
    model: ModelShape, step: TrainingStep, *, device_bytes: float, host_bytes: float | None = None
) -> Choice:
    """Return the cheapest settings of a recipe's `memory` with which a step fits.

    Args:
        step: its `memory` is replaced, but for types.
        device_bytes: memory of one GPU, all of it; `WORKSPACE` of it is left free if `step.cuda`.
        host_bytes: host memory of one rank; None = without limit.

    Raises:
        ArgumentError: nothing fits; the message says what the smallest combination needs, and for what.
    """
    # Another GPU hardly changes the order.
    gpu, world = GPUS["h100"], step.parallel.world
    layers = layer_seconds(model, gpu, step.parallel, context=step.tokens, num_gpus=world)
    found = candidates(model, step, gpu, layers, num_gpus=world)
    free = device_bytes - (WORKSPACE if step.cuda else 0.0)
    refused: list[tuple[Candidate, str]] = []
    plain = min(each.seconds for each in found if each.effort == 0)
    for candidate in found:
        lack = _lack(candidate.memory, free, host_bytes)
        if lack is None:
            return Choice(candidate, candidate.seconds / plain - 1, refused)
        refused.append((candidate, lack))
    least = min(found, key=lambda each: each.memory.device)
    parts = sorted(least.memory.parts.items(), key=lambda part: -part[1])[:4]
    raise ArgumentError(
        f"a step of {step.tokens:,} tokens of {model.name} does not fit",
        found=f"{format_bytes(least.memory.device)} on the device and {format_bytes(least.memory.host_bytes)} on the "
        f"host with {least.describe()}: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in parts),
        allowed=f"{format_bytes(free)} on the device"
        + ("" if host_bytes is None else f", {format_bytes(host_bytes)} on the host"),
        fix="use more GPUs (cp_ring, cp_ulysses, dp_shard), a shorter micro-batch, LoRA or QLoRA",
    )


def _lack(memory: TrainingMemory, device: float, host: float | None) -> str | None:
    if memory.device > device:
        return f"{format_bytes(memory.device)} of {format_bytes(device)} on the device ({memory.moment})"
    if host is not None and memory.host_bytes > host:
        return f"{format_bytes(memory.host_bytes)} of {format_bytes(host)} on the host"
    return None
