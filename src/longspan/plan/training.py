"""Bytes of one GPU at the peak of a training step, part by part, for every setting of `memory` and `parallel`.

The peak is the highest of a few moments, each with its own parts:

    forward     the last block computes, what the blocks before it keep is there
    loss        hidden states and their gradient, the head's gradient in fp32, one chunk of logits
    backward    a block's backward pass; the last block has most activations, the first one most gradients
    optimizer   all gradients, and what the optimizer needs inside a step

Parameters, gradients and optimizer states are those of a rank's shard; the parameters of two blocks are gathered, the
one that computes and the next, and a block's gradient is there whole until it is summed over ranks. What happens
inside a block is walked operation by operation (`plan.block`); what a schedule adds is in `plan.memory`.

Checked against the tensors that are really alive in `benchmarks/plan.md`; a GPU adds what its allocator and its
libraries hold, `WORKSPACE`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from longspan.core.errors import ArgumentError
from longspan.plan.block import block_walk, kernel_bytes
from longspan.plan.hardware import WORKSPACE, Gpu
from longspan.plan.memory import SUM_BYTES, attention_buffers
from longspan.plan.models import ModelShape
from longspan.plan.tape import Walk
from longspan.plan.training_step import TrainingStep, element_bytes

__all__ = ["WORKSPACE", "TrainingMemory", "training_memory"]

NF4_BYTES = 4.127 / 8
"""Of a weight in 4 bits: blocks of 64 with a scale in 8 bits, and the scales of those."""
LOGITS_BUDGET = 128 << 20
"""Bytes of the loss's one buffer of logits (kernels.loss)."""
INTENSE_ROWS = 2048
"""Its rows at most, where the head's gradient is summed in the product."""
KEPT = ("parameters", "optimizer state", "gradients", "gathered parameters", "inside the optimizer")
"""Parts that do not grow with a row."""


class TrainingMemory(NamedTuple):
    """Bytes of one rank."""

    moments: dict[str, dict[str, float]]
    """Device bytes by part, at each moment of a step."""
    host: dict[str, float]
    """Host bytes by part."""

    @property
    def moment(self) -> str:
        """The moment with the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Device bytes by part at the peak."""
        return self.moments[self.moment]

    @property
    def device(self) -> float:
        """Device bytes at the peak, without WORKSPACE."""
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    def scaled(self, activations: float) -> TrainingMemory:
        """Return it with so many times the bytes that grow with a row."""
        if activations == 1.0:
            return self
        moments = {
            moment: {name: size if name in KEPT else size * activations for name, size in parts.items()}
            for moment, parts in self.moments.items()
        }
        return TrainingMemory(moments, self.host)

    def limit(self, gpu: Gpu, num_gpus: int) -> str | None:
        """Return what does not fit on `num_gpus` of them, None if all does."""
        if self.device + gpu.workspace > gpu.memory:
            return "device memory"
        return "host memory" if self.host_bytes > gpu.host_for_rank(num_gpus) else None


def training_memory(model: ModelShape, s: TrainingStep) -> TrainingMemory:
    """Return the memory of one rank at the moments of a training step that is not the first.

    Raises:
        ArgumentError: settings that the trainer refuses: tensor parallelism, chunks of a sequence that is spread.
    """
    if s.parallel.tp != 1:
        raise ArgumentError(
            "training does not share single matrices", found=f"tp {s.parallel.tp}", allowed="1"
        )
    if s.memory.chunk_tokens is not None and s.parallel.cp > 1:
        raise ArgumentError(
            "training in chunks needs whole rows", found=f"{s.parallel.cp} ranks share a sequence"
        )
    tokens = -(-s.tokens // s.parallel.cp)
    alive = tokens if s.memory.chunk_tokens is None else min(s.memory.chunk_tokens, tokens)
    weights = _Weights(model, s)
    block = _block(model, s, alive)
    resident, host = _resident(model, s, weights)
    unit = alive * model.hidden * s.compute_bytes
    kept, offloaded = _kept(model, s, block, unit)
    if offloaded:
        host["layer inputs"] = offloaded
    cache = _cache(model, s, tokens, alive)
    if cache:
        (host if s.memory.offload_chunk_cache else resident)["key/value cache"] = cache
    gathered = weights.gathered()
    gradients = weights.device_gradients
    in_chunks = s.memory.chunk_tokens is not None and alive < tokens
    before = gradients if s.accumulates or in_chunks else 0.0
    if in_chunks and not s.is_sharded:
        # Gradients of chunks are added in fp32 (train.recurrent).
        before *= SUM_BYTES / weights.trained_bytes
    base = {**resident, **({"gathered parameters": gathered} if gathered else {})}
    loss_parts = _loss(model, s, alive, weights)
    # The gradient of a block's input or output, and tokens' ids, labels, positions, angles.
    small = tokens * 4 * 8 + alive * model.head_dim * 2 * s.compute_bytes
    norms = 2 * unit + (alive * model.hidden * SUM_BYTES if s.compute_bytes < SUM_BYTES else 0)
    saves = s.memory.activation_checkpointing == "none"
    what_is_kept = "activations" if saves else "layer inputs"
    moments = {
        "forward": {
            **base,
            "gradients": before,
            what_is_kept: max(0.0, kept - (block.saved if saves else unit)),
            "one block": block.saved + unit if saves else block.forward,
            "batch": small,
        },
        "loss": {
            **base,
            "gradients": before,
            what_is_kept: kept + norms,
            **loss_parts,
            "batch": small,
        },
    }
    for name, others, inputs in (
        ("backward of the last block", 0.0, kept - (block.saved if saves else unit)),
        ("backward of the first block", weights.layer_gradients * (model.layers - 1), 0.0),
    ):
        # Under FSDP the head's gradient is whole, beside the shards of the others, until the end of the pass.
        made = max(before, others) + weights.head_gradient
        moments[name] = {
            **base,
            "gradients": made if s.is_sharded else max(before, weights.head_gradient + others),
            what_is_kept: max(0.0, inputs),
            "one block": block.backward + weights.reduced,
            "batch": small,
        }
    if s.is_sharded and s.lora is None:
        outside = weights.outside * (element_bytes(s.memory.reduce_dtype) + s.compute_bytes)
        summed = {"gradients": gradients + outside, "batch": small}
        moments["sum of the embeddings' gradients"] = {**resident, **summed}
    stepping = {"gradients": gradients, "inside the optimizer": weights.optimizer_scratch}
    moments["optimizer"] = {**resident, **stepping}
    return TrainingMemory(moments, {name: size for name, size in host.items() if size})


class _Weights:
    """Sizes of weights, gradients and optimizer state of one rank, in bytes."""

    def __init__(self, model: ModelShape, s: TrainingStep) -> None:
        self.model, self.s = model, s
        self.embeddings = model.vocab * model.hidden
        self.layers = model.parameters - model.outside
        self.outside = model.outside
        lora = s.lora
        self.adapters = 0
        if lora is not None:
            width, kv = model.heads * model.held_dim, model.kv_heads * model.held_dim
            wide = model.hidden + model.intermediate
            # The two sides of each.
            sides = {
                "q": model.hidden + width, "k": model.hidden + kv, "v": model.hidden + kv, "o": width + model.hidden,
                "gate": wide, "up": wide, "down": wide,
            }  # fmt: skip
            self.adapters = lora.rank * sum(sides[name] for name in lora.targets)
        share = 1 / s.parallel.shards
        narrow = s.parameter_bytes
        trained_bytes = SUM_BYTES if lora is not None else narrow
        frozen_layer = NF4_BYTES if lora is not None and lora.quantized else narrow
        whole = self.embeddings if lora is not None and lora.embeddings else 0
        self.trained = (model.parameters if lora is None else model.layers * self.adapters + whole) * share
        self.parameters = self.trained * trained_bytes
        if lora is not None:
            self.parameters += (self.layers * frozen_layer + self.outside * narrow) * share
        self.gradients = self.trained * trained_bytes
        self.trained_bytes = trained_bytes
        self.device_gradients = 0.0 if s.memory.offload_parameters else self.gradients
        of_layer = model.layer_parameters if lora is None else self.adapters
        self.layer_gradients = 0.0 if s.memory.offload_parameters else of_layer * trained_bytes * share
        head_bytes = s.compute_bytes if s.is_sharded else narrow
        self.head_gradient = 0.0 if lora is not None else float(self.embeddings * head_bytes)
        # Of the block before, on its way to the other ranks.
        self.reduced = of_layer * element_bytes(s.memory.reduce_dtype) if s.is_sharded else 0.0
        self.state, self.optimizer_scratch = self._optimizer(share)

    def gathered(self) -> float:
        """Parameters of the blocks that compute now and next, of the root, and a buffer to gather into."""
        s, model = self.s, self.model
        if not s.is_sharded:
            return 0.0
        lora = s.lora
        layer: float = model.largest_layer * s.compute_bytes
        if lora is not None:
            layer = model.largest_layer * (NF4_BYTES if lora.quantized else s.compute_bytes)
            layer += self.adapters * s.compute_bytes
        return (3 if s.parallel.shards > 1 else 1) * layer + self.outside * s.compute_bytes

    def _optimizer(self, share: float) -> tuple[float, float]:
        """Return bytes of the state, and what a step needs inside itself."""
        model, s = self.model, self.s
        matrices = 0.0
        if s.optimizer == "muon":
            matrices = float(model.layers * (model.layer_parameters if s.lora is None else self.adapters))
        rest = self.trained - matrices * share
        state = 2 * rest * self.trained_bytes + matrices * share * SUM_BYTES
        scratch = 0.0
        if matrices:
            # Gathered updates of all shapes, then of one shape a stack and four more of its size.
            widest = 2 * model.layers * model.hidden * model.intermediate if s.lora is None else matrices
            scratch = matrices * SUM_BYTES + 5 * widest * SUM_BYTES
        # The root of the second moment, of one parameter after the other on a CPU; a GPU's operation holds nothing.
        largest = max(
            self.embeddings if s.lora is None else 0,
            *(max(kind.layer_matrices, default=0) for kind in model.kinds),
        )
        roots = 0.0 if s.cuda else 2 * min(rest, largest) * self.trained_bytes
        return state, 0.0 if s.memory.offload_parameters else max(scratch, roots)


def _block(model: ModelShape, s: TrainingStep, alive: int) -> Walk:
    """Return what a block needs: of several kinds the most at a peak, and what each keeps on average."""
    walks = [_kind_block(kind, s, alive) for kind in model.kinds]
    if len(walks) == 1:
        return walks[0]
    saved = sum(kind.layers * walk.saved for kind, walk in zip(model.kinds, walks)) / model.layers
    weights = sum(kind.layers * walk.weights for kind, walk in zip(model.kinds, walks)) / model.layers
    return Walk(max(walk.forward for walk in walks), saved, max(walk.backward for walk in walks), weights)


def _kind_block(model: ModelShape, s: TrainingStep, alive: int) -> Walk:
    query, key = alive * model.heads * model.held_dim, alive * model.kv_heads * model.held_dim
    own = s._replace(tokens=alive)
    attention = 0.0
    if model.heads and s.memory.chunk_tokens is not None and alive < s.tokens:
        # Sums of out and dq in fp32; keys and values of an earlier chunk, the next one, their gradients twice.
        attention = 2.0 * query * SUM_BYTES + 2 * key * (2 * s.compute_bytes + 3 * SUM_BYTES)
    elif model.heads and s.parallel.planned_schedule != "none":
        kernel = kernel_bytes(model, own)
        attention = attention_buffers(
            s.parallel.planned_schedule,
            model,
            alive,
            kernel=kernel,
            ring_degree=s.parallel.cp_ring,
            ulysses_degree=s.parallel.cp_ulysses,
            element_bytes=s.compute_bytes,
        )
        # The block counts the kernel itself.
        attention -= kernel
    return block_walk(model, own, attention_bytes=attention)


def _resident(
    model: ModelShape, s: TrainingStep, weights: _Weights
) -> tuple[dict[str, float], dict[str, float]]:
    """Return what stays between steps, on the device and on the host."""
    stays = {"parameters": weights.parameters, "optimizer state": weights.state}
    if not s.memory.offload_parameters:
        return stays, {}
    # Of the matrices: the rest is small.
    sizes = (shape / s.parallel.shards * s.parameter_bytes for shape in _matrices(model))
    pinned = sum(_pinned(size, s) - size for size in sizes) if s.lora is None else 0.0
    return {}, {**stays, "parameters": weights.parameters + pinned, "gradients": weights.gradients}


def _matrices(model: ModelShape) -> list[int]:
    """Return the elements of every matrix."""
    layers = [size for kind in model.kinds for size in kind.layer_matrices * kind.layers]
    return layers + [model.vocab * model.hidden] * (1 if model.tied else 2)


def _pinned(size: float, s: TrainingStep) -> float:
    """Return the bytes that a tensor takes on the host: torch rounds pinned memory up to a power of two."""
    return float(1 << max(0, math.ceil(math.log2(size)))) if s.cuda and size else size


def _kept(model: ModelShape, s: TrainingStep, block: Walk, unit: float) -> tuple[float, float]:
    """Return what all blocks keep on the device between forward and backward, and on the host."""
    if s.memory.activation_checkpointing == "none":
        return model.layers * block.saved, 0.0
    if s.memory.activation_checkpointing == "full":
        return model.layers * unit, 0.0
    # The one in use and the one on its way.
    on_host = model.layers * _pinned(unit, s)
    return min(2, model.layers) * unit, on_host


def _cache(model: ModelShape, s: TrainingStep, tokens: int, alive: int) -> float:
    if s.memory.chunk_tokens is None or alive >= tokens:
        return 0.0
    total = 0.0
    for kind in model.kinds:
        chunk = 2 * alive * kind.kv_heads * kind.held_dim
        sizes = [float(chunk * item) for item in (s.compute_bytes, SUM_BYTES)]
        if s.memory.offload_chunk_cache:
            sizes = [_pinned(size, s) for size in sizes]
        total += (tokens - alive) / alive * kind.layers * sum(sizes)
    return total


def _loss(model: ModelShape, s: TrainingStep, alive: int, weights: _Weights) -> dict[str, float]:
    item = SUM_BYTES
    narrow = s.compute_bytes < SUM_BYTES
    chunk = max(16, LOGITS_BUDGET // (item * model.vocab))
    if narrow and s.cuda and s.lora is None:
        chunk = max(chunk, min(INTENSE_ROWS, model.hidden * item // (item + s.compute_bytes)))
    chunk = min(chunk, alive)
    logits = chunk * model.vocab * item
    head = 0.0
    if s.lora is None:
        head = weights.embeddings * SUM_BYTES
        if narrow and not s.cuda:
            # The weight in fp32.
            head += weights.embeddings * SUM_BYTES
    elif narrow and not s.cuda:
        head = weights.embeddings * SUM_BYTES
    if narrow and s.cuda:
        logits += chunk * model.vocab * s.compute_bytes
    hidden = alive * model.hidden * s.compute_bytes
    return {
        "head's gradient": head,
        "logits": logits + 2 * chunk * model.hidden * item,
        "gradient of the hidden states": hidden + alive * SUM_BYTES,
    }
