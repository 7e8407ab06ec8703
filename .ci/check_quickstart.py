"""Check what `longspan quickstart` left: the numbers are there and finite, the page needs no network.

python .ci/check_quickstart.py RUN
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LABELS = ("before", "after", "theta_only", "ntk", "pi")
PAGE_BYTES = (20_000, 5_000_000)
# What a browser would fetch: sources, style sheets, imports. A link to follow (<a href>) fetches nothing.
LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*\s(?:src|data)\s*=\s*["']?\s*(?!data:)(?:https?:)?//"""
    r"""|<link\b[^>]*\shref\s*=\s*["']?\s*(?!data:)(?:https?:)?//"""
    r"""|url\(\s*["']?\s*(?:https?:)?//"""
    r"""|@import\s+["']?(?:https?:)?//"""
    r"""|\b(?:fetch|import)\(\s*["'`](?:https?:)?//""",
    re.IGNORECASE,
)


def problems(run: Path) -> Iterator[str]:
    """Yield what is wrong with a run folder; nothing when all is well."""
    results, page = run / "results.json", run / "report.html"
    for path in (results, page, run / "COMPLETE", run / "config.yaml", run / "env.json"):
        if not path.is_file():
            yield f"{path.name} is missing"
    if results.is_file():
        yield from _result_problems(json.loads(results.read_text(encoding="utf-8")))
    if page.is_file():
        yield from _page_problems(page.read_text(encoding="utf-8"))


def _result_problems(results: dict[str, Any]) -> Iterator[str]:
    for key in ("seed", "needle", "ppl", "seconds"):
        if key not in results:
            yield f"results.json has no {key!r}"
            return
    for label in LABELS:
        needle = results["needle"].get(label)
        if needle is None:
            yield f"results.json has no needle result of {label!r}"
        elif not (needle["mean"] is not None and 0 <= needle["mean"] <= 1 and needle["scored"] > 0):
            yield f"needle {label}: mean {needle['mean']} of {needle['scored']} samples"
        ppl = results["ppl"].get(label)
        if ppl is None:
            yield f"results.json has no perplexity of {label!r}"
        elif not all(value is not None and value >= 1 for value in ppl["by_length"].values()):
            yield f"perplexity {label}: {ppl['by_length']}"
    for place, number in _numbers(results):
        if not math.isfinite(number):
            yield f"results.json {place} is {number}"


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{place}.{index}")
    elif isinstance(value, (int, float)):
        yield place, float(value)


def _page_problems(page: str) -> Iterator[str]:
    size = len(page.encode())
    if not PAGE_BYTES[0] <= size <= PAGE_BYTES[1]:
        yield f"report.html has {size} bytes, expected {PAGE_BYTES[0]} to {PAGE_BYTES[1]}"
    for match in LOADS.finditer(page):
        yield f"report.html loads from the network: {match.group()[:80]}"
    if "<svg" not in page:
        yield "report.html shows no figure"


def main() -> int:
    """Check the run named on the command line; return the exit code."""
    found = list(problems(Path(sys.argv[1])))
    for problem in found:
        print(f"quickstart: {problem}", file=sys.stderr)  # noqa: T201
    if not found:
        print("quickstart: results and page are whole")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
