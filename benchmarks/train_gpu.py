"""Sections of benchmarks/train.py --gpu: steps of Llama-3-8B-shaped blocks, and the longest row that fits.

Model FLOPs are 6 * tokens * weights of matrices (the output embedding included), and for causal attention
6 * layers * heads * head_dim * tokens^2, counted once: neither what checkpointing computes again nor the hidden half
of the square. MFU is their rate over 989 TFLOP/s, dense bf16 of an H100 or H200.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu import Section, run_all
from gpu_measure import Deadline, Row, Scale, measure

PEAK_FLOPS = 989e12
LLAMA_3_8B_LAYERS = 32
RECORD_TOKENS = 1_200_000
STEP_LAYERS = 4
# Lengths first that say most, should time run out.
STEP_TOKENS = {"cuda": (131072, 32768, 262144, 65536), "cpu": (64,)}
FIT_LAYERS = (1, 3)
FIT_TOKENS = {"cuda": (65536, 131072), "cpu": (64, 128)}
CHUNK_TOKENS = {"cuda": 16384, "cpu": 24}
TILE_TOKENS = {"cuda": 8192, "cpu": 16}

METHODS = (
    "longspan",
    "transformers, SDPA flash, Liger",
    "transformers, SDPA cuDNN, Liger",
    "transformers, SDPA flash, all logits",
)
LONG_METHODS = ("full, offloaded", "QLoRA", "chunk-recurrent, offloaded")


def run_sections(*, out: Path | None, markdown: Path | None, dry_run: bool) -> None:
    """Run both sections, print their tables and write what was asked for."""
    sections: dict[str, Section] = {"step": (step, 220.0), "longest": (longest, 230.0)}
    run_all(sections, out=out, table=markdown, dry_run=dry_run)


def step(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """Forward and backward pass of one document, every block checkpointed: ours against transformers."""
    for tokens in STEP_TOKENS[scale.device]:
        for method in METHODS:
            case = {"tokens": tokens, "layers": STEP_LAYERS, "method": method}
            yield deadline.row(case, partial(_step_case, scale, tokens, method))


def _config(scale: Scale, layers: int, tokens: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": scale.hidden,
        "intermediate_size": scale.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": scale.heads,
        "num_key_value_heads": scale.kv_heads,
        "head_dim": scale.head_dim,
        "vocab_size": scale.vocabulary,
        "max_position_embeddings": tokens,
        "tie_word_embeddings": False,
    }


def _model(scale: Scale, layers: int, tokens: int) -> Any:
    """Return a model with random weights, made where it runs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**_config(scale, layers, tokens))
    with torch.device(scale.device):
        return AutoModelForCausalLM.from_config(config, dtype=scale.dtype).train()


def model_flops(scale: Scale, layers: int, tokens: int) -> tuple[float, float]:
    """Return the FLOPs of a training step and those of attention among them."""
    projections = scale.hidden * scale.head_dim * 2 * (scale.heads + scale.kv_heads)
    block = projections + 3 * scale.hidden * scale.intermediate
    attention = 6.0 * layers * scale.heads * scale.head_dim * tokens**2
    return 6.0 * tokens * (layers * block + scale.vocabulary * scale.hidden) + attention, attention


def _step_case(scale: Scale, tokens: int, method: str) -> Row:
    from longspan.models.checkpointing import enable_checkpointing
    from longspan.models.hf import enable

    model = _model(scale, STEP_LAYERS, tokens)
    ids = torch.arange(tokens, device=scale.device) * 7919 % scale.vocabulary
    loss: Callable[[], torch.Tensor]
    backend: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if method == "longspan":
        enable_checkpointing(enable(model), "full")
        loss = partial(_own_loss, model, ids)
    else:
        if "Liger" in method:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model)
        model.set_attn_implementation("sdpa")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if scale.device == "cuda":
            chosen = SDPBackend.CUDNN_ATTENTION if "cuDNN" in method else SDPBackend.FLASH_ATTENTION
            backend = sdpa_kernel(chosen)

        def loss() -> torch.Tensor:
            return model(input_ids=ids[None], labels=ids[None], use_cache=False).loss

    def backward(value: torch.Tensor) -> None:
        value.backward()
        model.zero_grad(set_to_none=True)

    with backend:
        row = measure(loss, backward, scale) | {"loss": float(loss().detach())}
    flops, attention = model_flops(scale, STEP_LAYERS, tokens)
    row |= {"tokens_per_s": tokens / row["total_ms"] * 1e3, "attention_share": attention / flops}
    if scale.device == "cuda":
        row["mfu"] = flops / (row["total_ms"] / 1e3) / PEAK_FLOPS
    return row


def _own_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    from longspan.train.objectives import ModelWithLoss

    return ModelWithLoss(model)(_batch(ids)).loss / (len(ids) - 1)


def _batch(ids: torch.Tensor) -> Any:
    from longspan.models.documents import Documents
    from longspan.train.batch import IGNORE_LABEL, Batch

    documents = Documents.single(len(ids))
    labels = ids.roll(-1)
    labels[-1] = IGNORE_LABEL
    return Batch(
        ids, labels, None, documents.positions(ids.device), torch.zeros_like(ids), ("text",), documents
    )


def longest(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """Peak memory and seconds with few layers and tokens, then the longest row of 32 layers by the fit through them.

    peak(L, T) = a + b L + c T + d L T, through the four cases; longest = (memory - a - 32 b) / (c + 32 d).
    seconds(L, T) = L (e T^2 + f T) + g T, by least squares: attention, the rest of a layer, the loss. Without the
    optimizer's, which does not depend on T.
    """
    for method in LONG_METHODS:
        found: list[Row] = []
        for layers in FIT_LAYERS:
            for tokens in FIT_TOKENS[scale.device]:
                case = {"tokens": tokens, "layers": layers, "method": method}
                row = deadline.row(case, partial(_long_case, scale, layers, tokens, method))
                found.append(row)
                yield row
        if scale.device == "cuda":
            case = {"layers": LLAMA_3_8B_LAYERS, "method": f"{method}: extrapolated"}
            yield deadline.row(case, partial(extrapolate, scale, found, _memory_mib()))


def _memory_mib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**20


def extrapolate(scale: Scale, rows: list[Row], memory_mib: float) -> Row:
    """Return what the fit says of all layers of Llama-3-8B: longest row, and the record's memory, time and rate."""
    layers = np.array([row["layers"] for row in rows], float)
    tokens = np.array([row["tokens"] for row in rows], float)
    peaks = np.array([row["peak_mib"] for row in rows], float)
    seconds = np.array([row["seconds"] for row in rows], float)
    a, b, c, d = np.linalg.solve(np.stack([np.ones(4), layers, tokens, layers * tokens], 1), peaks)
    work = np.stack([layers * tokens**2, layers * tokens, tokens], 1)
    # Scaled, because the columns differ by ten orders of magnitude.
    size = work.max(0)
    e, f, g = np.linalg.lstsq(work / size, seconds, rcond=None)[0] / size
    n, t = LLAMA_3_8B_LAYERS, RECORD_TOKENS
    record_seconds = n * (e * t**2 + f * t) + g * t
    flops, _ = model_flops(scale, n, t)
    return {
        "tokens": int((memory_mib - a - n * b) / (c + n * d)),
        "peak_mib": memory_mib,
        "record_peak_mib": a + n * b + (c + n * d) * t,
        "record_minutes": record_seconds / 60,
        "record_tflops": flops / record_seconds / 1e12,
    }


def _long_case(scale: Scale, layers: int, tokens: int, method: str) -> Row:
    from longspan.kernels.tiled_mlp import enable_tiled_mlp
    from longspan.models.checkpointing import enable_checkpointing
    from longspan.models.hf import enable
    from longspan.models.lora import LoraConfig, apply_lora
    from longspan.parallel.launch import process_group
    from longspan.train.config import MemoryConfig, OptimizerConfig, ParallelConfig
    from longspan.train.optim import build_optimizers, set_lr
    from longspan.train.spread import build_spread

    model = enable(_model(scale, layers, tokens))
    adapted = method == "QLoRA"
    chunk = CHUNK_TOKENS[scale.device] if "chunk" in method else None
    # Set by hand and not by a recipe, because nothing here is read from files.
    memory = MemoryConfig(offload_parameters=not adapted)
    enable_tiled_mlp(model, TILE_TOKENS[scale.device])
    enable_checkpointing(model, "full" if chunk else "offload")
    if adapted:
        apply_lora(model, LoraConfig(quantize="nf4"), seed=0)
    ids = torch.arange(tokens, device=scale.device) * 7919 % scale.vocabulary
    with process_group(timeout_seconds=600, always=memory.needs_sharding) as device:
        trained = build_spread(ParallelConfig(), device).shard(model, memory)
        optimizers = build_optimizers(model, OptimizerConfig())
        set_lr(optimizers, lr=1e-5, adamw_lr=1e-5)
        # The first step makes the optimizer's state; the second is measured.
        _gradients(trained, ids, chunk)
        _update(optimizers)
        if scale.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = _gradients(trained, ids, chunk)
        row: Row = {"seconds": time.perf_counter() - start, "loss": loss}
        start = time.perf_counter()
        _update(optimizers)
        row["optimizer_seconds"] = time.perf_counter() - start
    if scale.device == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def _gradients(trained: Any, ids: torch.Tensor, chunk: int | None) -> float:
    """Run forward and backward pass and return the loss, which waits for both."""
    from longspan.train.recurrent import recurrent_step

    batch, weight = _batch(ids), len(ids) - 1
    if chunk is not None:
        total = recurrent_step(trained, batch, chunk_tokens=chunk, weight=weight, offload=True).loss
    else:
        total = trained(batch).loss
        (total / weight).backward()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return float(total.detach()) / weight


def _update(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
