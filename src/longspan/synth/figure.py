"""A picture of where the evidence of a set lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longspan.core.files import atomic_write

_INK, _MUTED, _GRID, _FILL = "#1d2430", "#667085", "#e3e6eb", "#0b5cad"


def draw_depths(counts: Sequence[int], path: str | Path, *, title: str) -> None:
    """Write a PNG: places of evidence by depth, with a line where an even spread has them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    bins = len(counts)
    figure = Figure(figsize=(7.2, 3.4), dpi=160, layout="constrained")
    axes = figure.subplots()
    edges = [number / bins for number in range(bins + 1)]
    axes.stairs(counts, edges, fill=True, color=_FILL, alpha=0.75)
    even = sum(counts) / bins
    axes.axhline(even, color=_INK, lw=1.0, ls=(0, (4, 3)))
    axes.text(1.01, even, "even", fontsize=8, color=_INK, va="center")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_title(title.replace("$", r"\$"), fontsize=10, color=_INK, loc="left")
    axes.set_xlabel("depth of the evidence in its context, in tokens", fontsize=9, color=_MUTED)
    axes.set_ylabel("places of evidence", fontsize=9, color=_MUTED)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(labelsize=8, labelcolor=_MUTED, length=0)
    axes.grid(axis="y", color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    with atomic_write(path) as file:
        # No metadata: the same samples give the same bytes.
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
