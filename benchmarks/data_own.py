"""Pieces of longspan that benchmarks/data.py measures in a process of their own, each printing JSON.

    python benchmarks/data_own.py digest STORE        documents, tokens and SHA-256 of the ids as uint32
    python benchmarks/data_own.py best_fit 1000000    seconds and fill of best_fit over made-up documents
    python benchmarks/data_own.py spin 50000000       a loop that only uses a core

Nothing here is timed with start-up or imports in it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any

import numpy as np

ROW = 65536


def digest(store: str) -> dict[str, Any]:
    from longspan.data.store import TokenStore

    opened, found = TokenStore(store), hashlib.sha256()
    for document in range(len(opened)):
        found.update(opened.tokens(document).astype("<u4").tobytes())
    return {"documents": len(opened), "tokens": opened.num_tokens, "sha256": found.hexdigest()}


def made_up_lengths(count: int) -> np.ndarray:
    """Return log-normal document lengths: median 1,100 tokens, one document in 800 longer than a row."""
    drawn = np.random.default_rng(0).lognormal(7.0, 1.35, count)
    return np.maximum(drawn, 1).astype(np.uint32)


def made_up_table(count: int) -> Any:
    from longspan.data.store.lengths import LengthTable

    generator = np.random.default_rng(1)
    return LengthTable(
        source_names=("books", "code", "web"),
        source=generator.integers(0, 3, count, np.uint16),
        key=generator.integers(0, 2**64, count, np.uint64),
        shard=np.zeros(count, np.uint32),
        offset=np.zeros(count, np.uint64),
        mask_offset=np.zeros(count, np.uint64),
        tokens=made_up_lengths(count),
        position=np.arange(count, dtype=np.uint32),
    )


def best_fit(count: str) -> dict[str, Any]:
    from longspan.data.plans.best_fit import best_fit_decreasing
    from longspan.data.plans.pack_config import PackConfig
    from longspan.data.plans.packing import plan_packing

    table = made_up_table(int(count))
    pieces = np.minimum(table.tokens, ROW)
    begin = time.process_time()
    bins = best_fit_decreasing(pieces, ROW)
    placed = time.process_time()
    spec = PackConfig(length=ROW, strategy="best_fit", remainder="pad", pad_id=0)
    plan = plan_packing(spec, table, np.arange(len(table), dtype=np.uint32), 0)
    planned = time.process_time()
    return {
        "documents": len(table),
        "row_tokens": ROW,
        "best_fit_s": placed - begin,
        "best_fit_fill": float(pieces.sum(dtype=np.uint64)) / (ROW * (int(bins.max()) + 1)),
        "plan_s": planned - placed,
        "plan_fill": 1 - plan.report.padding_tokens / (ROW * plan.num_rows),
        "rows": plan.num_rows,
    }


def spin(count: str) -> dict[str, Any]:
    total = 0
    begin = time.perf_counter()
    for number in range(int(count)):
        total ^= number
    return {"wall_s": time.perf_counter() - begin, "total": total}


COMMANDS = {
    "digest": digest,
    "best_fit": best_fit,
    "spin": spin,
}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]](*sys.argv[2:])))
