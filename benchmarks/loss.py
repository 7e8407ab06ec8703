"""Memory and time of the chunked linear cross-entropy, forward and backward, each case in its own process.

    python benchmarks/loss.py                   the table of loss.md, about two minutes
    python benchmarks/loss.py --tokens 65536 --vocab 128256 --dim 64 --dtype float32 --method chunked

"extra" is peak resident memory above what the process held once inputs were made, gradients included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

CASES = [
    # tokens, vocabulary, dim, dtype, method
    (65536, 128256, 64, "float32", "chunked"),
    (65536, 128256, 64, "bfloat16", "chunked"),
    (8192, 32000, 256, "float32", "chunked"),
    (8192, 32000, 256, "float32", "reference"),
]


def measure(*, tokens: int, vocab: int, dim: int, dtype: str, method: str) -> dict[str, float]:
    """Run one forward and backward pass in this process; return seconds, MiB of extra peak memory, loss."""
    import torch

    from longspan.kernels.loss import linear_cross_entropy, reference_linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(vocab, dim, generator=generator) / dim**0.5).to(hidden.dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    function = linear_cross_entropy if method == "chunked" else reference_linear_cross_entropy
    # One small pass first, so that thread pools and library buffers are not counted as the method's.
    function(hidden[:64], weight[:64], labels[:64] % 64).loss.backward()
    hidden.grad = weight.grad = None
    before = memory_mib("VmRSS")
    start = time.perf_counter()
    loss = function(hidden, weight, labels).loss
    (loss / tokens).backward()
    seconds = time.perf_counter() - start
    peak = memory_mib("VmHWM")
    return {
        "seconds": seconds,
        "extra_mib": peak - before,
        "loss": loss.item() / tokens,
        "threads": torch.get_num_threads(),
    }


def memory_mib(field: str) -> float:
    """Return a field of this process's status in MiB (Linux): VmRSS is memory now, VmHWM its peak.

    Not `ru_maxrss`: a child process starts with its parent's peak there.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def measure_in_subprocess(*, tokens: int, vocab: int, dim: int, dtype: str, method: str) -> dict[str, float]:
    """Run one case in a fresh process, whose peak memory is the case's own."""
    numbers = ["--tokens", str(tokens), "--vocab", str(vocab), "--dim", str(dim)]
    command = [sys.executable, __file__, *numbers, "--dtype", dtype, "--method", method]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--method", choices=["chunked", "reference"], default="chunked")
    options = parser.parse_args()
    if options.tokens is not None:
        print(json.dumps(measure(**vars(options))))
        return
    print("| tokens | vocabulary | dim | dtype | method | extra MiB | all logits MiB | seconds | threads |")
    print("|---:|---:|---:|---|---|---:|---:|---:|---:|")
    for tokens, vocab, dim, dtype, method in CASES:
        found = measure_in_subprocess(tokens=tokens, vocab=vocab, dim=dim, dtype=dtype, method=method)
        print(
            f"| {tokens} | {vocab} | {dim} | {dtype} | {method} | {found['extra_mib']:.0f} "
            f"| {tokens * vocab * 4 / 2**20:.0f} | {found['seconds']:.1f} | {found['threads']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
