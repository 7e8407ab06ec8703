"""How evenly the layouts spread the attention work of packed rows, and what travels for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longspan.core.seeds import rng
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import plan_packing
from longspan.data.plans.presets import PRESETS
from longspan.data.store import TokenStore
from longspan.parallel.shards import SequenceShards
from longspan.plan.communication import AttentionShape, bytes_sent
from longspan.plan.models import MODELS
from longspan.quickstart import load_config
from longspan.train.streams import plan_stage
from parallel_count import needed_rows
from work_balance import Balance, balance_of

SHAPE = AttentionShape(0, MODELS["llama-3-8b"].heads, MODELS["llama-3-8b"].kv_heads, 128)
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")


class Rows(NamedTuple):
    """Document borders of packed rows."""

    name: str
    rows: list[list[int]]

    @property
    def mean_document(self) -> float:
        """Tokens of the mean document or piece of one."""
        return sum(row[-1] for row in self.rows) / sum(len(row) - 1 for row in self.rows)


class Spread(NamedTuple):
    """One layout on one set of rows."""

    layout: str
    world: int
    balance: Balance
    worst: float
    """Largest busiest / mean of a single row."""
    needed: float
    """Keys of others that a rank needs, as a share of all keys of others: the rank that needs most, mean of rows."""
    sent: float
    """Bytes of the rank that sends most in a layer of `SHAPE`, forward and backward, mean of rows."""
    bands: float
    """Bands that a rank hands to its kernel for all keys, mean; a band is one contiguous piece of queries and keys."""
    run: float
    """Tokens of the mean contiguous run of a rank."""


def spread(rows: Rows, layout: str, world: int) -> Spread:
    """Measure one layout; every row counts as often as it is long."""
    total = Balance(0.0, 0.0, 0.0)
    worst, needed, sent, bands, runs = 0.0, [], [], [], []
    for cu_seqlens in rows.rows:
        shards = SequenceShards(layout, cu_seqlens, world)
        balance = balance_of(shards)
        total, worst = total.plus(balance), max(worst, balance.total_ratio)
        table = needed_rows(shards, None)
        needed.append((table.sum(axis=1) - table.diagonal()).max() / ((world - 1) * shards.num_local))
        sent.append(_sent(shards, table))
        bands.append(_bands(shards))
        runs.append(np.mean([run.length if run.stride == 1 else 1 for rank in shards.runs for run in rank]))
    return Spread(
        layout,
        world,
        total,
        worst,
        *(float(np.mean(values)) for values in (needed, sent, bands, runs)),
    )


def _sent(shards: SequenceShards, needed: np.ndarray) -> int:
    """Return what the rank that sends most sends: striped in a ring, the others by all-gather."""
    schedule = "striped" if shards.layout == "striped" else "all_gather"
    shape = SHAPE._replace(tokens=shards.num_local)
    return max(
        sum(bytes_sent(schedule, shape, ring_degree=shards.world, rank=rank, needed=needed))
        for rank in range(shards.world)
    )


def _bands(shards: SequenceShards) -> float:
    """Return the bands of the mean rank over all keys, as its schedule calls them: at once, or step by step."""
    everyone = tuple(range(shards.world))
    if shards.layout == "striped":
        tables = [[shards.bands((q,), (k,)) for k in everyone] for q in everyone]
    else:
        tables = [[shards.bands((q,), everyone)] for q in everyone]
    return float(np.mean([sum(len(table) for table in of_rank) for of_rank in tables]))


def quickstart_rows(run: Path, count: int) -> Rows:
    """Return the first rows of the quickstart's extension stage, as its training reads them."""
    config = load_config("small")
    stage = config.extend.stages[-1]
    mixer = plan_stage(stage, data_root=run, seed=config.seed).mixer
    rows = [row.cu_seqlens.tolist() for row in mixer.rows(0, count)]
    return Rows(f"quickstart, {stage.context_length:,} a row", rows)


def corpus_rows(run: Path, length: int) -> Rows:
    """Return all rows of the quickstart's text packed end to end at another length."""
    store = TokenStore(run / "stores" / "text")
    documents = np.arange(len(store.lengths))
    rng(0, "benchmark", "corpus").shuffle(documents)
    plan = plan_packing(PackConfig(length=length), store.lengths, documents, 0)
    offsets = plan.row_offsets.astype(np.int64)
    rows = [
        np.concatenate([[0], np.cumsum(plan.span_tokens[a:b].astype(np.int64))]).tolist()
        for a, b in pairwise(offsets)
    ]
    return Rows(f"quickstart text, {length:,} a row", rows)


LONG_TOKENS = 65536
"""ProLong's 64K stage cuts repositories and books into documents of exactly this length."""
MEAN_TOKENS = {
    "fineweb-edu": 1000,
    "fineweb": 650,
    "stackexchange": 670,
    "wikipedia": 750,
    "tulu": 1000,
    "arxiv": 18000,
    "openwebmath": 2300,
    "textbooks": 1000,
}
"""Mean document: about the published tokens / documents of each set (tulu and textbooks: assumed)."""
SIGMA = 1.1
"""Of the log-normal lengths: assumed the same for all."""


def prolong_rows(count: int, length: int, *, seed: int) -> Rows:
    """Return rows of documents drawn by the token shares of ProLong's 64K stage, end to end, the last one cut.

    Code repositories and books are `LONG_TOKENS` long each, the rest log-normal, at most `LONG_TOKENS`.
    """
    weights = PRESETS["prolong-64k"].weights
    names = list(weights)
    means = np.array([MEAN_TOKENS.get(name, LONG_TOKENS) for name in names], dtype=float)
    shares = np.array([weights[name] for name in names]) / means
    generator = rng(seed, "benchmark", "prolong")
    rows = []
    for _ in range(count):
        lengths: list[int] = []
        while sum(lengths) < length:
            source = int(generator.choice(len(names), p=shares / shares.sum()))
            drawn = generator.lognormal(np.log(means[source]) - SIGMA**2 / 2, SIGMA)
            tokens = LONG_TOKENS if names[source] not in MEAN_TOKENS else int(np.clip(drawn, 16, LONG_TOKENS))
            lengths.append(tokens)
        borders = np.minimum(np.cumsum([0, *lengths]), length)
        rows.append(borders.tolist())
    return Rows(f"ProLong-64K mix, {length:,} a row", rows)


def balance_tables(sets: Sequence[tuple[Rows, Sequence[int]]]) -> str:
    """Return one markdown table of all rows, worlds and layouts."""
    lines = [
        "| rows | world | layout | total | worst row | ring | needed keys | sent, MiB | bands | run, tokens |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rows, worlds in sets:
        for world in worlds:
            for layout in LAYOUTS:
                found = spread(rows, layout, world)
                lines.append(
                    f"| {rows.name} | {world} | {layout} | {found.balance.total_ratio:.4f} | {found.worst:.4f} "
                    f"| {found.balance.ring_ratio:.3f} | {found.needed:.1%} | {found.sent / 2**20:,.0f} "
                    f"| {found.bands:,.0f} | {found.run:,.0f} |"
                )
    return "\n".join(lines)


def describe(sets: Sequence[tuple[Rows, Sequence[int]]]) -> str:
    """Return a table of what the rows are."""
    lines = ["| rows | number | documents a row | mean document, tokens |", "|---|---:|---:|---:|"]
    for rows, _ in sets:
        documents = sum(len(row) - 1 for row in rows.rows) / len(rows.rows)
        lines.append(f"| {rows.name} | {len(rows.rows)} | {documents:.1f} | {rows.mean_document:,.0f} |")
    return "\n".join(lines)
