"""Pieces of longspan that benchmarks/data.py measures in a process of their own, each printing JSON.

python benchmarks/data_own.py digest STORE           documents, tokens and SHA-256 of the ids as uint32
python benchmarks/data_own.py best_fit 1000000       seconds and fill of best_fit over made-up documents
python benchmarks/data_own.py save_table 100000000 OUT   a made-up length table
python benchmarks/data_own.py plan_table OUT         seconds and memory of a mixture and rows for it
python benchmarks/data_own.py spin 50000000          a loop that only uses a core
"""

from __future__ import annotations

import hashlib
import json
import resource
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
    from longspan.data.lengths import LengthTable

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
    from longspan.data.best_fit import best_fit_decreasing
    from longspan.data.packing import PackSpec, plan_packing

    table = made_up_table(int(count))
    pieces = np.minimum(table.tokens, ROW)
    begin = time.process_time()
    bins = best_fit_decreasing(pieces, ROW)
    placed = time.process_time()
    spec = PackSpec(length=ROW, strategy="best_fit", remainder="pad", pad_id=0)
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


def save_table(count: str, path: str) -> dict[str, Any]:
    made_up_table(int(count)).save(path)
    return {"documents": int(count)}


def plan_table(path: str) -> dict[str, Any]:
    from longspan.data.lengths import LengthTable
    from longspan.data.mixture import MixtureSpec, plan_mixture
    from longspan.data.packing import PackSpec, plan_packing

    begin = time.process_time()
    lengths = LengthTable.load(path)
    mixture = plan_mixture(
        MixtureSpec(mode="per_source", keep_short=0.2, tokens=lengths.total_tokens // 4), lengths, 0
    )
    mixed = time.process_time()
    plan = plan_packing(PackSpec(length=131072), lengths, mixture.documents, 0)
    packed = time.process_time()
    return {
        "documents": len(lengths),
        "chosen_documents": len(mixture.documents),
        "rows": plan.num_rows,
        "mixture_s": mixed - begin,
        "packing_s": packed - mixed,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
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
    "save_table": save_table,
    "plan_table": plan_table,
    "spin": spin,
}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]](*sys.argv[2:])))
