"""How long planning takes, and how much memory, for a length table of many documents.

    python benchmarks/plan_scale.py --documents 100M

The table is simulated: seven sources with the shares of SlimPajama, log-normal lengths. It is written to disk
and memory-mapped, as that of a real store is. Mixture (per_source, half of the tokens) and packing (concat,
128K rows; with --best-fit best_fit too) run in this process, one after another, each timed, with the peak of
memory that is its own (anonymous) and of all mapped pages.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_measure import Memory
from longspan.core.units import format_bytes, parse_tokens
from longspan.data.plans.mixture import plan_mixture
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import plan_packing
from longspan.data.store.lengths import LengthTable

SOURCES = {
    "C4": (0.35, 315),
    "CommonCrawl": (0.40, 900),
    "StackExchange": (0.08, 450),
    "Wikipedia": (0.10, 400),
    "Github": (0.05, 700),
    "ArXiv": (0.015, 12_000),
    "Book": (0.005, 100_000),
}
BLOCK = 1 << 22


def simulate(folder: Path, documents: int) -> LengthTable:
    """Write a length table of `documents` rows and open it memory-mapped."""
    generator = np.random.default_rng(0)
    shares = np.array([share for share, _ in SOURCES.values()])
    medians = np.log([median for _, median in SOURCES.values()])
    source = np.empty(documents, np.uint16)
    tokens = np.empty(documents, np.uint32)
    key = np.empty(documents, np.uint64)
    for first in range(0, documents, BLOCK):
        part = slice(first, min(first + BLOCK, documents))
        count = part.stop - part.start
        source[part] = generator.choice(len(shares), count, p=shares / shares.sum())
        lengths = np.exp(medians[source[part]] + generator.normal(0, 1.0, count))
        tokens[part] = np.clip(lengths, 1, 2_000_000)
        key[part] = generator.integers(0, 2**64, count, dtype=np.uint64)
    table = LengthTable(
        source=source,
        source_names=tuple(SOURCES),
        key=key,
        shard=np.zeros(documents, np.uint32),
        offset=np.zeros(documents, np.uint64),
        mask_offset=np.zeros(documents, np.uint64),
        tokens=tokens,
        position=np.arange(documents, dtype=np.uint32),
    )
    table.save(folder / "lengths")
    del table
    return LengthTable.load(folder / "lengths")


def measure(name: str, work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Run `work` and return its result and what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    with Memory() as memory:
        result = work()
    found = {
        "step": name,
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "own_memory": format_bytes(memory.own),
        "with_mapped_pages": format_bytes(memory.mapped),
    }
    print(json.dumps(found), flush=True)
    return result, found


def main() -> None:
    """Simulate, plan, print one JSON line a step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", default="10M", help="rows of the table, such as 100M")
    parser.add_argument("--best-fit", action="store_true", help="pack best_fit after concat")
    arguments = parser.parse_args()
    documents = parse_tokens(arguments.documents)
    with tempfile.TemporaryDirectory(prefix="plan-scale-") as name:
        folder = Path(name)
        table = simulate(folder, documents)
        print(json.dumps({"documents": documents, "tokens": table.total_tokens}), flush=True)
        spec = MixtureConfig(mode="per_source", tokens=table.total_tokens // 2, keep_short=0.5)
        plan, _ = measure("mix", lambda: plan_mixture(spec, table, 0))
        measure("save mixture", partial(plan.save, folder / "mix"))
        chosen = plan.documents
        packing = PackConfig(length=131072, specials="eos", eos_id=2)
        packed, _ = measure("pack", lambda: plan_packing(packing, table, chosen, 0))
        measure("save packing", partial(packed.save, folder / "pack"))
        print(json.dumps({"rows": packed.num_rows, "spans": len(packed.span_document)}), flush=True)
        del packed
        if arguments.best_fit:
            fit = PackConfig(length=131072, strategy="best_fit", remainder="pad", pad_id=0)
            packed, _ = measure("pack best_fit", lambda: plan_packing(fit, table, chosen, 0))
            fill = 1 - packed.report.padding_tokens / (packed.num_rows * 131072)
            print(json.dumps({"rows": packed.num_rows, "filled": round(fill, 5)}), flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"peak_memory_with_simulation": format_bytes(peak)}), flush=True)


if __name__ == "__main__":
    main()
