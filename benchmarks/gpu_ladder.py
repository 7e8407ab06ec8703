"""Sections of `benchmarks/gpu.py --ladder`: how long a row fits, how fast it goes, what decoding and needles cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from gpu_measure import Deadline, Row, Scale, measure, normal
from longspan.infer.local import LocalAnswerer
from longspan.infer.requests import Request
from longspan.kernels.attention import Bands, choose_kernel
from longspan.kernels.attention.flash_versions import FlashVersion, use_flash
from longspan.kernels.loss import linear_cross_entropy
from longspan.kernels.tiled_mlp import enable_tiled_mlp
from longspan.models.checkpointing import enable_checkpointing
from longspan.models.documents import Documents
from longspan.models.head import output_head
from longspan.models.hf import build_model, hidden_states
from longspan.models.shape import model_shape
from longspan.plan.hardware import gpu_named

SHAPES = {
    "llama-3.2-1b": (16, 2048, 32, 8, 64, 8192),
    "llama-3-8b": (32, 4096, 32, 8, 128, 14336),
}
"""Layers, hidden size, heads, key/value heads, head dimension, intermediate size."""
LENGTHS = (8192, 32768, 131072, 524288, 1048576)
DECODE_TOKENS = 131072
NEEDLE_TOKENS = 131072
DEPTHS = 20


class _Bytes:
    """As much of a tokenizer as an answer needs."""

    def decode(self, ids: Any) -> str:
        return bytes(int(token) % 256 for token in ids).decode("latin-1")


def _fields(scale: Scale, name: str) -> dict[str, Any]:
    layers, hidden, heads, kv_heads, head_dim, inner = SHAPES[name]
    if scale.device == "cpu":
        layers, hidden, heads, kv_heads, head_dim, inner = 2, 32, 4, 2, 16, 48
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": inner,
        "vocab_size": scale.vocabulary, "max_position_embeddings": max(LENGTHS),
    }  # fmt: skip


def _model(scale: Scale, name: str) -> Any:
    """Return a model of random weights, made where it runs."""
    with torch.device(scale.device):
        return build_model({**_fields(scale, name), "dtype": str(scale.dtype).removeprefix("torch.")}, seed=0)


def _lengths(scale: Scale) -> tuple[int, ...]:
    return LENGTHS if scale.device == "cuda" else (64, 128)


def train(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """Forward and backward pass of one row, without the optimizer: the last length without an error is what fits."""
    for name in SHAPES:
        model: list[Any] = []
        for tokens in _lengths(scale):
            case = {"model": name, "tokens": tokens}
            yield deadline.row(case, lambda n=name, t=tokens, m=model: _train_case(scale, n, t, m))


def _train_case(scale: Scale, name: str, tokens: int, kept: list[Any]) -> Row:
    if not kept:
        kept.append(enable_tiled_mlp(enable_checkpointing(_model(scale, name).train(), "offload"), 8192))
    model = kept[0]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, scale.vocabulary, tokens)).to(scale.device)
    places = torch.arange(tokens - 1, device=scale.device)
    documents = Documents.single(tokens)

    def forward() -> torch.Tensor:
        hidden = hidden_states(model, ids, documents)
        return linear_cross_entropy(hidden, output_head(model), ids.roll(-1), places=places).loss / tokens

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        model.zero_grad(set_to_none=True)

    row = measure(forward, backward, scale)
    seconds = row["total_ms"] / 1e3
    row["tokens_per_second"] = tokens / seconds
    if scale.device == "cuda":
        known = gpu_named(torch.cuda.get_device_name())
        peak = None if known is None else known.flops
        flops = model_shape(model.config).model_flops(tokens)
        row["mfu"] = None if peak is None else flops / seconds / peak
    return row


def decode(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """One new token of each sequence against its keys: bytes a second against the card's say how well it splits."""
    keys = DECODE_TOKENS if scale.device == "cuda" else 128
    for sequences in (1, 4, 16):
        case = {"tokens": keys, "sequences": sequences}
        yield deadline.row(case, lambda s=sequences: _decode_case(scale, keys, s))


def _decode_case(scale: Scale, keys: int, sequences: int) -> Row:
    q = normal(scale, sequences, scale.heads, scale.head_dim, seed=0)
    k, v = (normal(scale, sequences * keys, scale.kv_heads, scale.head_dim, seed=seed) for seed in (1, 2))
    starts = np.arange(sequences)
    bands = Bands(starts, [1] * sequences, starts * keys, [keys] * sequences, lo=-keys)
    kernel = choose_kernel(scale.device)
    row = measure(lambda: kernel.forward(q, k, v, bands, 0.1), lambda _: None, scale)
    return row | {"gb_per_second": 2 * k.nbytes / row["forward_ms"] / 1e6}


def needles(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """A needle at twenty depths of one haystack, answered from one tree of prompts."""
    tokens = NEEDLE_TOKENS if scale.device == "cuda" else 96
    case = {"model": "llama-3.2-1b", "tokens": tokens, "depths": DEPTHS}
    yield deadline.row(case, lambda: _needle_case(scale, tokens))


def _needle_case(scale: Scale, tokens: int) -> Row:
    model = _model(scale, "llama-3.2-1b").eval()
    answerer = LocalAnswerer(model, _Bytes(), identity={}, batch_tokens=16384)  # type: ignore[arg-type]
    haystack = np.random.default_rng(0).integers(0, scale.vocabulary, tokens)
    places = np.linspace(0, tokens - 8, DEPTHS).astype(int)
    prompts = [np.insert(haystack, place, [1, 2, 3, 4]) for place in places]
    requests = [Request("", prompt, max_new_tokens=8) for prompt in prompts]
    start = time.perf_counter()
    answers = list(answerer.generate(requests))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "answers": len(answers), "tokens_read": answerer.counters.tokens}


def versions(scale: Scale, deadline: Deadline) -> Iterator[Row]:
    """The FlashAttentions that are installed, on one document."""
    tokens = scale.attention_tokens[0]
    wanted: tuple[FlashVersion, ...] = ("auto", "fa2", "fa3", "fa4")
    for version in wanted:
        yield deadline.row(
            {"tokens": tokens, "flash": version}, lambda v=version: _version_case(scale, tokens, v)
        )


def _version_case(scale: Scale, tokens: int, version: FlashVersion) -> Row:
    why = use_flash(version)
    shapes = (scale.heads, scale.kv_heads, scale.kv_heads, scale.heads)
    q, k, v, dout = (normal(scale, tokens, heads, scale.head_dim, seed=i) for i, heads in enumerate(shapes))
    bands = Bands.from_documents([0, tokens])
    kernel = choose_kernel(scale.device)

    def backward(found: tuple[torch.Tensor, torch.Tensor]) -> None:
        kernel.backward(dout, q, k, v, *found, bands, 0.1)

    row = measure(lambda: kernel.forward(q, k, v, bands, 0.1), backward, scale)
    pairs = tokens * (tokens + 1) / 2
    return row | {
        "why": why,
        "total_tflops": 14 * scale.head_dim * scale.heads * pairs / row["total_ms"] / 1e9,
    }


SectionMaker = Callable[[Scale, Deadline], Iterator[Row]]
LADDER: dict[str, tuple[SectionMaker, float]] = {
    "versions": (versions, 40.0),
    "train": (train, 260.0),
    "decode": (decode, 30.0),
    "needles": (needles, 60.0),
}
"""After `correctness`, in this order."""
