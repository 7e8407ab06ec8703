"""A page on files of conversations: what is in them, how long it is, and what would be learnt, in colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from longspan.core.files import atomic_write
from longspan.report.charts import Shares, length_panels
from longspan.report.html import page_file, styles, template

PANEL_WIDTH = 318


def write_chat_page(out: str | Path, inputs: Sequence[object], contents: Mapping[str, Any]) -> None:
    """Write the page `out` (.html); `contents` are the fields of what `data.tokenize.chat_contents` found.

    Raises:
        ArgumentError: `out` is not an .html file name.
    """
    out = chat_page_file(out)
    unit = contents["unit"]
    text = template("chat.html.j2").render(
        inputs=[str(each) for each in inputs],
        tiles=_tiles(contents),
        counts=list(contents["counts"].items()),
        unit=unit,
        lengths=_length_rows(contents),
        panels=_panels(contents["histograms"], unit),
        learnt=contents["learnt"],
        notes=list(contents["notes"].items()),
        faults=[(why, count, contents["examples"].get(why, "")) for why, count in contents["faults"].items()],
        shown=[each._asdict() for each in contents["shown"]],
        css=styles(),
    )
    with atomic_write(out, "w") as file:
        file.write(text)


def chat_page_file(out: str | Path) -> Path:
    """Return the name of a page. Raises ArgumentError where it is none: before conversations are read for it."""
    return page_file(out, what="page", option="--page", usual="chats.html")


def _tiles(contents: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return name, value and a note of what is asked first."""
    counts, unit, learnt = contents["counts"], contents["unit"], contents["learnt"]
    unusable = counts.get("conversations that cannot be used", 0)
    tiles = [
        ("Conversations", f"{counts['conversations']:,}", f"{counts['turns']:,} turns"),
        ("Calls of tools", f"{contents['parts'].get('calls', {}).get('number', 0):,}", ""),
        ("Median length", f"{contents['lengths']['median']:,}", f"{unit}; longest {contents['lengths']['longest']:,}"),
    ]  # fmt: skip
    if learnt is not None:
        tiles.append(
            ("Learnt", f"{learnt['share']:.1%}", f"{learnt['learnt']:,} of {learnt['tokens']:,} tokens")
        )
    return [*tiles, ("Cannot be used", f"{unusable:,}", "left out, and counted" if unusable else "")]


def _length_rows(contents: Mapping[str, Any]) -> list[tuple[str, ...]]:
    whole = {"number": contents["counts"]["conversations"], **contents["lengths"]}
    rows = {"conversations": whole, **contents["parts"]}
    columns = ("number", "sum", "median", "p90", "longest")
    return [(name, *(f"{row[key]:,}" if key in row else "" for key in columns)) for name, row in rows.items()]


def _panels(histograms: Mapping[str, Mapping[str, Sequence[int]]], unit: str) -> list[tuple[str, Markup]]:
    """Return a drawing of each distribution, all on one axis."""
    shares = {
        name: [Shares(name, 1, histogram["edges"], [count / whole for count in histogram["counts"]])]
        for name, histogram in histograms.items()
        if (whole := sum(histogram["counts"]))
    }
    panels = length_panels(shares, f"Lengths in {unit}", f"length in {unit}")
    return [(name, Markup(panel.draw(PANEL_WIDTH))) for name, panel in panels.items()]
