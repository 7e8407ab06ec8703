"""Memory of one training step against the length of the row, at a fixed model: what each saving saves.

    python benchmarks/memory.py                  the tables of memory.md, several minutes
    python benchmarks/memory.py --quick          two lengths of a smaller model: does it run?

Forward and backward pass of one document by a small Llama with Llama-3's vocabulary, fp32, on CPU, each
case in its own process. "device" counts the bytes of all tensors alive at once, weights and gradients included, but for
those on the host: what offloading sent away. On a CPU both are the same memory, so "resident", the
process' peak above what it held with the weights, has both, and what operations need inside themselves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

CHUNK, TILE = 1024, 256
MODEL = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QUICK = {**MODEL, "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 112}
KV_BYTES_PER_TOKEN = 4 * 2 * 2 * 4
"""Of keys and values, and as much of gradients, per unit of head dim: layers * (k, v) * heads * 4 bytes."""


class Method(NamedTuple):
    """One row of the table: what is switched on."""

    whole_logits: bool = False
    checkpointing: str = "none"
    tiled: bool = False
    chunked: bool = False
    host_cache: bool = False
    longest: int = 16384


METHODS = {
    "plain": Method(whole_logits=True, longest=4096),
    "chunked loss": Method(longest=8192),
    "+ checkpointing": Method(checkpointing="full"),
    "+ tiled MLP": Method(checkpointing="full", tiled=True),
    "+ offload": Method(checkpointing="offload", tiled=True),
    "+ chunk-recurrent": Method(checkpointing="full", tiled=True, chunked=True),
    "+ its cache on the host": Method(checkpointing="full", tiled=True, chunked=True, host_cache=True),
}
LENGTHS = (2048, 4096, 8192, 16384)


def measure(name: str, tokens: int, *, quick: bool) -> dict[str, float]:
    """Run one step in this process; return bytes on the device, on the host and resident, and its loss."""
    import torch

    from live_bytes import LiveBytes
    from longspan.kernels.loss import reference_linear_cross_entropy
    from longspan.kernels.tiled_mlp import enable_tiled_mlp
    from longspan.models.checkpointing import HostOffload, enable_checkpointing
    from longspan.models.chunk_cache import ChunkCache
    from longspan.models.head import output_head
    from longspan.models.hf import Documents, build_model, hidden_states
    from longspan.train.batch import Batch
    from longspan.train.objectives import ModelWithLoss
    from longspan.train.recurrent import recurrent_step
    from loss import memory_mib

    method, counter = METHODS[name], LiveBytes()
    config = {**(QUICK if quick else MODEL), "max_position_embeddings": tokens}
    model = build_model(config, seed=0).train()
    root = ModelWithLoss(model)

    def batch_of(num_tokens: int) -> Batch:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config["vocab_size"], (num_tokens,), generator=generator)
        documents = Documents.from_cu_seqlens([0, num_tokens])
        labels = ids.roll(-1)
        labels[-1] = -100
        sources = torch.zeros_like(ids)
        return Batch(ids, labels, None, documents.positions(), sources, ("text",), documents)

    def step(batch: Batch) -> float:
        if method.chunked:
            offload = method.host_cache
            result = recurrent_step(
                root, batch, chunk_tokens=CHUNK, weight=len(batch.labels), offload=offload
            )
            return float(result.loss)
        if method.whole_logits:
            states = hidden_states(model, batch.input_ids, batch.documents)
            result = reference_linear_cross_entropy(states, output_head(model), batch.labels)
        else:
            result = root(batch)
        (result.loss / len(batch.labels)).backward()
        return float(result.loss.detach())

    enable_checkpointing(model, method.checkpointing)
    if method.tiled:
        enable_tiled_mlp(model, TILE)
    step(batch_of(64))  # so that thread pools and library buffers are not counted as the method's
    model.zero_grad(set_to_none=True)
    batch, held = batch_of(tokens), memory_mib("VmRSS")
    _watch(HostOffload, "_pack", lambda saved: counter.move_to_host(saved.host))
    if method.host_cache:
        _watch(ChunkCache, "_leave", counter.move_to_host)
    with counter:
        loss = step(batch)
    resident = (memory_mib("VmHWM") - held) * 2**20
    return {
        "device": counter.peak, "host": counter.host_peak, "resident": resident, "loss": loss / tokens,
    }  # fmt: skip


def _watch(owner: Any, name: str, note: Callable[[Any], None]) -> None:
    """Hand what a method returns to `note` too."""
    method = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs)
        note(found)
        return found

    setattr(owner, name, watched)


def measure_in_subprocess(name: str, tokens: int, *, quick: bool) -> dict[str, float]:
    """Run one case in a fresh process, whose peak memory is the case's own."""
    command = [sys.executable, __file__, "--method", name, "--tokens", str(tokens), *["--quick"] * quick]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report(*, quick: bool) -> None:
    """Print the tables; a case that does not compute the same loss, or a cache of another size, ends it."""
    lengths = (2048, 4096) if quick else LENGTHS
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name, method in METHODS.items():
        found[name] = {
            tokens: measure_in_subprocess(name, tokens, quick=quick)
            for tokens in lengths
            if tokens <= method.longest
        }
        for tokens, case in found[name].items():
            print(name, tokens, case, file=sys.stderr)
            truth = found["chunked loss"].get(tokens) if "chunked loss" in found else None
            if truth is not None and abs(case["loss"] / truth["loss"] - 1) > 1e-5:
                raise SystemExit(f"{name}, {tokens} tokens: loss {case['loss']}, not {truth['loss']}")
    head_dim = (QUICK if quick else MODEL)["hidden_size"] // 4  # type: ignore[operator]
    cache = _slope(found["+ its cache on the host"], "host")
    if abs(cache / (2 * KV_BYTES_PER_TOKEN * head_dim) - 1) > 0.01:
        raise SystemExit(f"the cache grows by {cache} bytes a token")
    for field in ("device", "host", "resident"):
        print(f"\n{field}, MiB, and its slope at the two longest\n")
        print("| | " + " | ".join(f"{tokens:,}" for tokens in lengths) + " | bytes per token |")
        print("|---|" + "---:|" * (len(lengths) + 1))
        for name, cases in found.items():
            cells = [f"{cases[tokens][field] / 2**20:.0f}" if tokens in cases else "" for tokens in lengths]
            print(f"| {name} | " + " | ".join(cells) + f" | {_slope(cases, field):,.0f} |", flush=True)


def _slope(cases: dict[int, dict[str, float]], field: str) -> float:
    """Return bytes per token between the two longest rows."""
    before, last = sorted(cases)[-2:]
    return (cases[last][field] - cases[before][field]) / (last - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.method is not None:
        print(json.dumps(measure(options.method, options.tokens, quick=options.quick)))
        return
    report(quick=options.quick)


if __name__ == "__main__":
    main()
