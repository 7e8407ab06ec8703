"""Run the quickstart over several seeds, with its controls, and write the table of benchmarks/quickstart.md.

    python benchmarks/quickstart.py --out bench-runs --seeds 0 1 2 3 4 --ablate-seeds 0

Runs that are complete in `--out` are read and not made again. `--validation` evaluates on the validation split:
that is where the recipe was chosen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SHOWN = ("before", "theta_only", "ntk", "pi", "after")
CONTROLS = ("ablate_short_rows", "ablate_same_theta", "ablate_no_upsampling")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench-runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--ablate-seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--validation", action="store_true")
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        out = arguments.out / f"seed-{seed}"
        if not (out / "results.json").exists():
            command = [sys.executable, "-m", "longspan", "quickstart", "--seed", str(seed), "--out", str(out)]
            command += ["--ablate"] if seed in arguments.ablate_seeds else []
            command += ["--set", "evaluation.split=validation"] if arguments.validation else []
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results.append(json.loads((out / "results.json").read_text()))
    print(render(results))


def render(results: list[dict[str, Any]]) -> str:
    """Return markdown tables: accuracy by length, perplexity, controls, time."""
    lengths = list(results[0]["needle"]["after"]["by_length"])
    lines = ["### Planted facts found (all five digits right), by context length", ""]
    lines += _header(["seed", "model", "mean", *lengths, *results[0]["needle_beyond"]["after"]])
    for result in results:
        for label in (*SHOWN, *CONTROLS):
            if label not in result["needle"]:
                continue
            table = result["needle"][label]
            past = result["needle_beyond"].get(label, {})
            cells = [table["mean"], *(table["by_length"][length] for length in lengths)]
            cells += [past.get(length) for length in results[0]["needle_beyond"]["after"]]
            lines.append(_row([str(result["seed"]), label, *(_share(cell) for cell in cells)]))
    lines += ["", "### Perplexity of held-out text by position, windows of the longest length", ""]
    positions = list(results[0]["ppl"]["after"]["by_position"])
    shown = [
        positions[0],
        positions[1],
        positions[len(positions) // 4],
        positions[len(positions) // 2],
        positions[-1],
    ]
    lines += _header(["seed", "model", *shown, "last: change"])
    for result in results:
        before = result["ppl"]["before"]["by_position"][positions[-1]]
        for label in (*SHOWN, *CONTROLS):
            if label in result["ppl"]:
                values = result["ppl"][label]["by_position"]
                change = values[positions[-1]] / before - 1
                cells = [f"{values[position]:.1f}" for position in shown]
                lines.append(_row([str(result["seed"]), label, *cells, f"{100 * change:+.0f} %"]))
    lines += ["", "### Three other facts in the same text (distractors), extended model", ""]
    lines += _header(["seed", "mean"])
    for result in results:
        for table in result.get("needle_distractors", {}).get("after", {}).values():
            lines.append(_row([str(result["seed"]), _share(table["mean"])]))
    lines += ["", "### Seconds", ""]
    phases = list(results[0]["seconds"])
    lines += _header(["seed", *phases])
    for result in results:
        lines.append(
            _row([str(result["seed"]), *(f"{result['seconds'].get(phase, 0):.0f}" for phase in phases)])
        )
    return "\n".join(lines)


def _header(names: list[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
