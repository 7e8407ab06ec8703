"""The tables of benchmarks/data.py in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Part, ours, other -> how many times as fast ours is meant to be.
TARGETS = {
    ("plan", "longspan", "datatools"): 40,
    ("plan", "longspan", "datatrove"): 40,
    ("plan", "longspan", "CEPE's scheme"): 40,
    ("plan", "longspan", "datatools + fastokens"): 4,
    ("sentencepiece", "longspan", "tokenizers encode"): 5,
    ("repack", "longspan, materialize", "datatools pack"): 6,
}
RATES = ("net", "gross", "further")
TITLES = {
    "plan": "Text to packed rows, byte-level BPE",
    "sentencepiece": "Text to a token store, sentencepiece-style BPE",
    "repack": "Packing again at another length",
}


def render(results: dict[str, Any]) -> str:
    """Return every part that is in `results` as markdown."""
    lines = [*_setting(results)]
    for part, title in TITLES.items():
        if part in results:
            lines += ["", f"### {title}", "", *_rates(part, results[part])]
    shapes = {"best_fit": _best_fit, "memory": _memory, "workers": _workers}
    for part, shape in shapes.items():
        if results.get(part):
            lines += ["", *shape(results[part])]
    return "\n".join(lines)


def _setting(results: dict[str, Any]) -> list[str]:
    machine, corpus = results["machine"], results["corpus"]
    rows = [(name, row["documents"], f"{row['bytes'] / 1e6:.1f}") for name, row in corpus["sources"].items()]
    totals = [sum(row[column] for row in corpus["sources"].values()) for column in ("documents", "bytes")]
    memory = "" if machine["memory_gib"] is None else f", {machine['memory_gib']:.0f} GiB"
    return [
        f"{machine['processor']}, {machine['cores']} cores{memory}; Python {machine['python']}; "
        f"{machine['longspan']}. Peers: {machine['peers'] or 'none'}. "
        f"Load average at the start {machine['load_average'][0]:.1f}.",
        "",
        *_markdown(
            ("source", "documents", "MB of text"), [*rows, ("all", totals[0], f"{totals[1] / 1e6:.1f}")]
        ),
        "",
        f"The peers' subset is one file, {corpus['subset_jsonl_bytes'] / 1e6:.1f} MB of jsonl.",
    ]


def _rates(part: str, found: dict[str, dict[str, Any]]) -> list[str]:
    speeds = ("tokens", "CPU s", "imports s", "tiny input s", *(f"M tokens/s {kind}" for kind in RATES))
    rows, ratios = [], []
    for name, numbers in found.items():
        seconds = (f"{numbers[key]:.2f}" for key in ("gross_cpu_s", "imports_cpu_s", "tiny_cpu_s"))
        rates = (_million(numbers[f"{kind}_rate"]) for kind in RATES)
        same = {True: "yes", False: "NO", None: "-"}[numbers.get("ids_equal")]
        rows.append((name, f"{numbers['tokens']:,}", *seconds, *rates, same))
        ratios += _ratio(part, name, found)
    lines = _markdown(("tool", *speeds, "same ids"), rows)
    if ratios:
        columns = ("longspan is faster than", *RATES, "target, net", "")
        lines += ["", *_markdown(columns, ratios)]
    return lines


def _ratio(part: str, name: str, found: dict[str, dict[str, Any]]) -> Iterator[Sequence[str]]:
    for (its_part, ours, other), target in TARGETS.items():
        if (its_part, other) == (part, name) and ours in found:
            pairs = [(found[ours][f"{kind}_rate"], found[name][f"{kind}_rate"]) for kind in RATES]
            times = [mine / its if mine and its else None for mine, its in pairs]
            judged = "met" if times[0] and times[0] >= target else "MISSED"
            shown = ("-" if value is None else f"{value:.1f}x" for value in times)
            yield (name, *shown, f"{target}x", judged)


def _best_fit(found: dict[str, Any]) -> list[str]:
    return [
        "### Best fit",
        "",
        *_markdown(
            ("documents", "row", "best fit alone, s", "fill", "whole plan, s", "fill", "rows"),
            [
                (
                    f"{found['documents']:,}",
                    found["row_tokens"],
                    f"{found['best_fit_s']:.2f}",
                    f"{found['best_fit_fill']:.3%}",
                    f"{found['plan_s']:.2f}",
                    f"{found['plan_fill']:.3%}",
                    f"{found['rows']:,}",
                )
            ],
        ),
    ]


def _memory(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        (
            f"{row['megabytes']:,.0f}",
            f"{row['tokens']:,}",
            f"{row['peak_mib']:,.0f}",
            f"{row['cpu_s']:.1f}",
            _million(row["tokens"] / row["cpu_s"]),
        )
        for row in found
    ]
    columns = ("MB of jsonl", "tokens", "peak MiB", "CPU s", "M tokens/s gross")
    return ["### Memory of tokenizing, one process", "", *_markdown(columns, rows)]


def _workers(found: dict[str, Any]) -> list[str]:
    wall = found["wall_s"]
    rows = [
        (name, *(f"{wall[f'{key} {count}']:.2f}" for count in (1, 2)), f"{speedup:.2f}", share)
        for name, key, speedup, share in (
            ("spinning processes", "spin", found["spin_speedup"], ""),
            ("tokenize", "tokenize", found["speedup"], f"{found['share_of_spin']:.2f}"),
        )
    ]
    starting = (f"{wall[f'start {count}']:.2f}" for count in (1, 2))
    net = (f"{found['speedup_net']:.2f}", f"{found['share_of_spin_net']:.2f}")
    rows += [("  of which start-up", *starting, "", ""), ("tokenize, net", "", "", *net)]
    columns = ("what", "one, wall s", "two, wall s", "speed-up", "share of spinning")
    return [f"### Two workers, {found['megabytes']:,.0f} MB of jsonl", "", *_markdown(columns, rows)]


def _million(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e6:.2f}"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]
