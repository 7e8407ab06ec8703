"""Measure sequence parallelism on paper and by counting, and print the tables of benchmarks/parallel.md.

    python benchmarks/parallel.py bytes --world 4      what every schedule sends, counted under gloo and in closed form
    python benchmarks/parallel.py balance --run RUN    work of each rank on packed rows; RUN is a folder made by
                                                       `longspan quickstart --out RUN`
    python benchmarks/parallel.py scale                the simulation, 8 to 1,024 GPUs, 128K to 16M tokens; writes plots
    python benchmarks/parallel.py published            the simulation beside published rows, and under other assumptions

Needs no GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import parallel_balance as balance
import parallel_scale as scale
from longspan.parallel.shards import SequenceShards
from longspan.plan.communication import AttentionShape, bytes_sent
from longspan.plan.models import MODELS
from parallel_count import Case, count, needed_rows

HERE = Path(__file__).parent
ELEMENT_BYTES = 2
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["bytes", "balance", "scale", "published"])
    parser.add_argument("--world", type=int, default=4, choices=[2, 4, 8], help="ranks, for bytes")
    parser.add_argument("--run", type=Path, default=Path("quickstart-run"), help="for balance")
    parser.add_argument("--rows", type=int, default=8, help="rows of the synthetic mix, for balance")
    parser.add_argument("--length", type=int, default=2**19, help="tokens of such a row, for balance")
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64], help="ranks, for balance")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the plots")
    arguments = parser.parse_args()
    if arguments.part == "bytes":
        print(bytes_table(arguments.world))
    elif arguments.part == "balance":
        print(balance_report(arguments.run, arguments.rows, arguments.length, arguments.worlds))
    elif arguments.part == "scale":
        print(scale_report(arguments.out))
    else:
        tables = (scale.ring_table, scale.sensitivity_table)
        print("\n\n".join(table() for table in tables))


def bytes_table(world: int) -> str:
    """Run every schedule, and set what is counted beside the closed form: it is equal or this fails."""
    tokens = 64 * world
    packed = (0, tokens // 8, tokens // 8 + 9, tokens // 2 + 5, tokens - 11, tokens)
    masks = {"one document": ((0, tokens), None), "packed": (packed, None), "packed, window 20": (packed, 20)}
    half = max(1, world // 2)
    kinds = [
        ("ring", "zigzag", world, 1),
        ("ring", "contiguous", world, 1),
        ("striped", "striped", world, 1),
        ("dist_flash", "contiguous", world, 1),
        ("all_gather", "balanced", world, 1),
        ("ulysses", "contiguous", 1, world),
        ("usp", "zigzag", half, world // half),
    ]
    cases = [
        Case(name, layout, ring, ulysses, HEADS, KV_HEADS, borders, window, "bfloat16", HEAD_DIM)
        for name, layout, ring, ulysses in kinds
        for borders, window in masks.values()
    ]
    lines = [
        f"| schedule, layout, world {world} | mask | forward, bytes: rank with most | backward | equal on all ranks |",
        "|---|---|---:|---:|---|",
    ]
    for i, (case, counted) in enumerate(zip(cases, count(cases, world))):
        shards = SequenceShards(case.layout, case.cu_seqlens, world, window=case.window)
        shape = AttentionShape(shards.num_local, HEADS, KV_HEADS, HEAD_DIM, ELEMENT_BYTES)
        needed = needed_rows(shards, case.window)
        closed = [
            bytes_sent(
                case.schedule,
                shape,
                ring_degree=case.ring,
                ulysses_degree=case.ulysses,
                rank=rank,
                needed=needed,
            )
            for rank in range(world)
        ]
        if [tuple(sent) for sent in closed] != counted:
            raise SystemExit(f"{case}: counted {counted}, closed form {closed}")
        forward, backward = (max(values) for values in zip(*counted))
        mask = list(masks)[i % len(masks)]
        lines.append(f"| {case.schedule}, {case.layout} | {mask} | {forward:,} | {backward:,} | yes |")
    return "\n".join(lines) + "\n\n" + model_table(MODELS["llama-3-8b"].name, 2**17)


def model_table(name: str, context: int) -> str:
    """Return the closed forms of one causal document for a real model."""
    model = MODELS[name]
    worlds = (8, 32)
    lines = [
        f"| {name}, {context // 1024}K tokens, MiB a rank and layer | "
        + " | ".join(f"forward, {world} ranks | backward" for world in worlds)
        + " |",
        "|---|" + "---:|---:|" * len(worlds),
    ]
    for schedule in ("ring", "striped", "dist_flash", "all_gather", "ulysses", "usp"):
        texts = []
        for world in worlds:
            ulysses = {"ulysses": world, "usp": 8 if world > 8 else 2}.get(schedule, 1)
            shape = AttentionShape(context // world, model.heads, model.kv_heads, model.head_dim)
            of_ranks = [
                bytes_sent(schedule, shape, ring_degree=world // ulysses, ulysses_degree=ulysses, rank=rank)
                for rank in range(world)
            ]
            texts += [f"{max(values) / 2**20:,.0f}" for values in zip(*of_ranks)]
        lines.append(f"| {schedule} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def balance_report(run: Path, rows: int, length: int, worlds: list[int]) -> str:
    """Return the tables of balance."""
    sets = [
        (balance.quickstart_rows(run, 64), worlds[:1]),
        (balance.corpus_rows(run, 2**17), worlds),
        (balance.prolong_rows(rows, length, seed=0), worlds),
    ]
    return balance.describe(sets) + "\n\n" + balance.balance_tables(sets)


def scale_report(out: Path) -> str:
    """Simulate two models, write their plots, return the tables."""
    parts = []
    for model, gpu in (("llama-3-8b", "h100"), ("llama-3-70b", "h100"), ("llama-3-8b", "h200")):
        cells = scale.grid(model, gpu)
        parts.append(f"### {model} on {gpu.upper()}\n\n{scale.winners_table(cells)}")
        if gpu == "h100":
            scale.draw(cells, model, gpu, out / f"parallel-{model}.png")
            places = [(2**17, 1024), (2**20, 64), (2**20, 1024), (2**22, 64), (2**24, 256), (2**24, 1024)]
            parts.append(scale.schedules_table(cells, places))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
