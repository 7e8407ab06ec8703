"""An audit of a large store: time, memory, and which of the planted near copies it finds.

    python benchmarks/data_audit.py --work DIR [--tokens 62500000 250000000]

Documents are drawn by a Zipf law over 50,000 ids; one in a hundred is a copy of one before it with one token in 45
drawn anew, which makes the sets of 5 tokens in a row 0.8 alike (Jaccard): half of the pairs are just above the limit,
half just below. What the pairs are is counted here, on plain sets. A quarter of the size first: what grows with it
shows.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_measure import Memory, finish, start
from longspan.data.store import TokenStore, TokenStoreWriter
from longspan.data.store.measures import Measures

VOCABULARY = 50_000
LIMIT = 0.8
EVERY = 100
CHANGED = 1 / 45

Ids = NDArray[np.uint16]


class Identity:
    """A tokenizer as far as a store needs one."""

    fingerprint, vocab_size, bos_id, eos_id, pad_id = "f" * 64, VOCABULARY, None, 0, None


class Drawn(NamedTuple):
    ids: Ids
    original: Ids | None
    """What it is a near copy of."""


def documents(tokens: int) -> Iterator[Drawn]:
    """Draw documents of 64 to 30,000 tokens until there are so many tokens."""
    draw = np.random.default_rng(0)
    shares = np.cumsum(1 / (np.arange(1, VOCABULARY) + 2.7))
    shares /= shares[-1]
    kept: Ids | None = None
    number = made = 0
    while made < tokens:
        length = int(np.clip(draw.lognormal(6.7, 1.0), 64, 30_000))
        if number % EVERY == EVERY - 1 and kept is not None:
            ids = kept.copy()
            places = np.flatnonzero(draw.random(len(ids)) < CHANGED)
            ids[places] = draw.integers(1, VOCABULARY, len(places))
            yield Drawn(ids, kept)
        else:
            ids = (1 + np.searchsorted(shares, draw.random(length))).astype(np.uint16)
            if number % EVERY == EVERY // 2:
                kept = ids
            yield Drawn(ids, None)
        number += 1
        made += len(ids)


def jaccard(first: Ids, second: Ids) -> float:
    """Return the similarity of the sets of 5 tokens in a row."""
    a, b = ({ids[i : i + 5].tobytes() for i in range(len(ids) - 4)} for ids in (first, second))
    return len(a & b) / len(a | b)


def measure(work: Path, tokens: int) -> dict[str, float]:
    """Write a store, audit it in a process of its own on one core, and count what it found."""
    store, audit = work / f"store-{tokens}", work / f"audit-{tokens}"
    for folder in (store, audit):
        shutil.rmtree(folder, ignore_errors=True)
    alike: dict[int, float] = {}
    with TokenStoreWriter(store, config={}, tokenizer=Identity()) as writer:
        for number, document in enumerate(documents(tokens)):
            writer.add(document.ids, source="drawn", key=number)
            if document.original is not None:
                alike[number] = jaccard(document.original, document.ids)
    command = [sys.executable, "-m", "longspan", "data", "audit", str(store), "--out", str(audit)]
    started = start(command, cores=[0])
    with Memory(started.process.pid) as memory:
        usage, _ = finish(started, command)
    flags = Measures.load(audit).columns["near_duplicate"].astype(bool)
    planted = np.array(list(alike))
    above = np.array([similarity >= LIMIT for similarity in alike.values()])
    return {
        "documents": len(flags),
        "tokens": int(TokenStore(store).lengths.tokens.sum()),
        "CPU s": round(usage.cpu_s, 1),
        "wall s": round(usage.wall_s, 1),
        "memory of its own at most, MiB": round(memory.own / 2**20),
        "with what is mapped, MiB": round(usage.peak_mib),
        "of that the store, MiB": round(sum(path.stat().st_size for path in store.rglob("*")) / 2**20),
        "pairs from the limit on": int(above.sum()),
        "found": int(flags[planted[above]].sum()),
        "pairs below it": int((~above).sum()),
        "called near duplicates": int(flags[planted[~above]].sum()),
        "others called near duplicates": int(flags.sum() - flags[planted].sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[62_500_000, 250_000_000])
    arguments = parser.parse_args()
    columns = [measure(arguments.work, tokens) for tokens in arguments.tokens]
    print("| |" + " |" * len(columns) + "\n|---|" + "---|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:,}" for column in columns) + " |")


if __name__ == "__main__":
    main()
