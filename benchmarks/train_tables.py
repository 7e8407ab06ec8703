"""The tables of benchmarks/train.py in markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

LOSS_TOLERANCE = 1e-4
FASTER = 1.5
"""How many times as fast ours is meant to be."""


def render(results: dict[str, Any]) -> str:
    """Return every part that is in `results` as markdown."""
    machine = results["machine"]
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {results['threads']} thread(s), Python "
        f"{machine['python']}, load average at the start {load}.",
    ]
    for part in results.get("speed", []):
        lines += ["", f"### {part['model']}, documents of {part['lengths']} lengths", ""]
        lines += [*_turns(part["turns"]), "", *_scouts(part["scouts"])]
    if "memory" in results:
        lines += ["", "### Peak memory with 128,256 words", "", *_memory(results["memory"])]
    return "\n".join(lines)


def _turns(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The fastest configuration of each tool: medians over all steps of all turns."""
    names = dict.fromkeys((row["tool"], row["name"]) for row in rows)
    rates = {name: {} for name in names}
    cells = []
    for name in names:
        own = [row for row in rows if (row["tool"], row["name"]) == name and "losses" in row]
        for clock in ("wall", "cpu"):
            rates[name][clock] = statistics.median(row[f"tokens_per_{clock}_s"] for row in own)
        first = next(iter(rates.values()))
        ratio = {clock: first[clock] / rates[name][clock] for clock in ("wall", "cpu")}
        verdict = "" if name[0] == "longspan" else "met" if ratio["cpu"] >= FASTER else "missed"
        worst = max(row["difference"] for row in own)
        cells.append((
            *name, len(own), f"{rates[name]['wall']:,.0f}", f"{rates[name]['cpu']:,.0f}",
            f"{ratio['wall']:.2f}", f"{ratio['cpu']:.2f}", verdict, f"{worst:.0e}",
        ))  # fmt: skip
    head = ("tool", "fastest configuration", "turns", "tokens/s", "tokens/CPU-s", "ours, wall", "ours, CPU")
    return _table((*head, f">= {FASTER}x", "loss difference"), cells)


def _scouts(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    def cells() -> Iterator[tuple[Any, ...]]:
        for row in rows:
            if "error" in row:
                yield row["tool"], row["name"], "", "", "", "", row["error"]
                continue
            if row["same_steps"]:
                comparable = "yes" if row["difference"] <= LOSS_TOLERANCE else "NO"
            else:
                comparable = "no"
            yield (
                row["tool"], row["name"], f"{row['tokens_per_wall_s']:,.0f}", f"{row['tokens_per_cpu_s']:,.0f}",
                f"{row['peak_mib']:,.0f}", f"{row['difference']:.0e}", comparable,
            )  # fmt: skip

    head = (
        "tool",
        "configuration, one run",
        "tokens/s",
        "tokens/CPU-s",
        "peak MiB",
        "loss difference",
        "comparable",
    )
    return _table(head, cells())


def _memory(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Peak up to the end of the last step, beside each of ours; ours alone writes a checkpoint afterwards."""
    own = [row for row in rows if row["tool"] == "longspan"]

    def cells() -> Iterator[tuple[Any, ...]]:
        for row in rows:
            if "error" in row:
                yield row["tool"], row["name"], row["error"], *[""] * (2 + len(own))
                continue
            numbers = [f"{row[key]:,.0f}" for key in ("peak_mib", "imports_mib", "run_peak_mib")]
            ratios = [f"{row['peak_mib'] / ours['peak_mib']:.1f}" for ours in own]
            yield row["tool"], row["name"], *numbers, *ratios

    head = (
        "tool",
        "configuration",
        "peak MiB",
        "of it imports",
        "whole run",
        *(f"of {row['name']}" for row in own),
    )
    return _table(head, cells())


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---|---|" + "---:|" * (len(head) - 2)
    for row in rows:
        yield f"| {' | '.join(str(cell) for cell in row)} |"
