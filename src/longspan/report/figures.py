"""The same figures as PNG, SVG and PDF files for slides and papers, drawn with matplotlib, without pyplot."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter, ScalarFormatter

from longspan.core.files import atomic_write
from longspan.core.log import get_logger
from longspan.report.charts import cut_name, cut_names
from longspan.report.evaluation import DatasetDifference, Evaluation
from longspan.report.layouts import axis_words, length_text, value_text
from longspan.report.load import LoadedRun
from longspan.report.palette import DASHES, LINES, ink_on, line_index, sequential, step_of
from longspan.report.perplexity_view import ppl_measure
from longspan.report.scores_view import row_names
from longspan.report.svg import AxisScale, thinned
from longspan.report.tables import Grid, all_columns
from longspan.report.training_view import (
    RAW_POINTS,
    SMOOTH_POINTS,
    binned,
    left_out_words,
    loss_points,
    panel_sources,
    source_losses,
)
from longspan.report.view import long_name, role_of, short_name

_INK, _MUTED, _GRID = "#1d2430", "#667085", "#e3e6eb"
_MISSING_GLYPH = re.compile(r"Glyph (\d+) .* missing from")
_KINDS = ("png", "svg", "pdf")
_MOST_INSIDE = 8
"""Names of lines that stand inside of the axes; more stand below, and the figure is higher by as much."""
_NAME_WIDTH, _NAME_HEIGHT = 2.6, 0.17
"""Inches of a name with its line."""
_MOST_BARS = 60
"""Bars of an audit's panel; of more rows those with most tokens have one."""
_MOST_TICKS = 10
"""Labels of lengths that fit side by side under half a page."""


def write_figures(runs: Sequence[LoadedRun], evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write the figures that the data allows into `folder`; return their paths."""
    figures: dict[str, Figure] = {}
    for task in evaluation.grids:
        if not (grids := evaluation.main_grids(task)):
            continue
        if task in evaluation.maps:
            figures[f"{task}_heatmaps"] = map_figure(grids)
        if (by := accuracy_figure(grids)) is not None:
            axis = next(iter(grids.values())).layout.columns
            figures[f"{task}_by_{axis}"] = by
    if evaluation.distractors:
        hardest = {label: by[max(by)] for label, by in evaluation.distractors.items() if by[max(by)].columns}
        figures |= {"needle_distractors_heatmaps": map_figure(hardest)} if hardest else {}
    if any(table.by_length for table in evaluation.ppl.values()):
        figures["perplexity"] = perplexity_figure(evaluation)
    if differences := evaluation.dataset_differences:
        figures["short_context"] = difference_figure(differences)
    for kind, draw in (("lengths", lengths_figure), ("loss", loss_figure)):
        having = [run for run in runs if (run.lengths if kind == "lengths" else run.metrics)]
        for run in having:
            name = kind if len(having) == 1 else f"{kind}-{run.name}"
            figures[name] = draw(run.lengths if kind == "lengths" else run.metrics)
    paths = []
    for name, figure in figures.items():
        files = [folder / f"{file_name(name)}.{kind}" for kind in _KINDS]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for file in files:
                write_figure(figure, file)
        _say_missing(caught, files[0])
        paths += files
    return paths


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as the file's ending says: .png, .svg, .pdf; the same figure gives the same bytes.

    Fonts in a PDF are TrueType: publishers refuse those of Type 3.
    """
    kind = path.suffix.lower().removeprefix(".")
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    engine = figure.get_layout_engine()
    if (
        engine is not None
    ):  # what is placed once stays for the other kinds of file: placing takes longer than drawing
        engine.execute(figure)
        figure.set_layout_engine("none")
    with atomic_write(path) as file, rc_context({"svg.hashsalt": "longspan", "pdf.fonttype": 42}):
        figure.savefig(file, format=kind, metadata=undated)


def _say_missing(caught: Sequence[warnings.WarningMessage], path: Path) -> None:
    """Say in one line which characters of labels a figure shows as boxes; pass on whatever else was warned of."""
    missing = [found[1] for each in caught if (found := _MISSING_GLYPH.match(str(each.message)))]
    if missing:
        characters = "".join(chr(int(code)) for code in dict.fromkeys(missing))
        get_logger("report").warning(
            "%s: matplotlib's font has no glyphs for %s, which stand as boxes there; the page shows them",
            path.name,
            characters,
        )
    for each in caught:
        if not _MISSING_GLYPH.match(str(each.message)):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def file_name(name: str) -> str:
    """Return a task's or run's name as the name of a file."""
    return re.sub(r"[^\w.()-]+", "_", name)


def difference_figure(rows: Sequence[DatasetDifference]) -> Figure:
    """Draw the change on every benchmark with its interval, in percentage points."""
    figure = Figure(figsize=(7.2, 1.2 + 0.34 * len(rows)), dpi=160, layout="constrained")
    axes = figure.subplots()
    _style(axes, "change in percentage points", "")
    labels = list(dict.fromkeys(row.label for row in rows))
    for place, row in enumerate(rows):
        value, interval = row.difference.value, row.difference.interval or (row.difference.value,) * 2
        color = LINES[line_index(row.label, 1 + labels.index(row.label))][0]
        axes.plot([100 * interval[0], 100 * interval[1]], [place, place], color=color, lw=1.6)
        axes.plot([100 * value], [place], color=color, marker="o", ms=5)
    called = row_names(rows)
    cut = cut_names(called, 56)
    names = [cut[name] + (" (not comparable)" if row.differ else "") for name, row in zip(called, rows)]
    axes.set_yticks(range(len(rows)), [_literal(name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=_MUTED, lw=0.8)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=_GRID, lw=0.8)
    return figure


def map_figure(tables: Mapping[str, Grid]) -> Figure:
    """Draw one heat map per label, the layout's rows down and its columns to the right."""
    layout = next(iter(tables.values())).layout
    columns = min(len(tables), 3)
    rows = -(-len(tables) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), dpi=160, layout="constrained")
    steps = sequential() if layout.higher_is_better else sequential()[::-1]
    cmap = LinearSegmentedColormap.from_list("longspan", steps).with_extremes(bad="#ffffff")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(tables) :]:
        axes.set_visible(False)
    norm = Normalize(0, 1)
    for axes, (label, table) in zip(grid.flat, tables.items()):
        means = [[table.tally(row, column).mean for column in table.columns] for row in table.rows]
        axes.imshow(np.array(means, dtype=float), cmap=cmap, norm=norm, aspect="auto")
        for row, line in enumerate(means):
            for column, mean in enumerate(line):
                text = "\u2013" if mean is None else f"{mean * 100:.0f}"
                ink = _MUTED if mean is None else ink_on(steps[step_of(mean)])
                if len(table.columns) <= 12:
                    axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
        axes.set_title(_literal(cut_name(long_name(label), 48)), fontsize=10, color=_INK, loc="left")
        for ticks, axis, places in (
            (axes.set_xticks, layout.columns, table.columns),
            (axes.set_yticks, layout.rows, table.rows),
        ):
            texts = [_literal(value_text(axis, place)) for place in places]
            ticks(range(len(places)), texts, fontsize=8)
        axes.tick_params(which="both", length=0, labelcolor=_MUTED)
        axes.set_xticks(np.arange(len(table.columns) - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(table.rows) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=1.5)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(
        ScalarMappable(norm, cmap), ax=grid, shrink=0.6, aspect=30, format=PercentFormatter(1.0)
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, labelcolor=_MUTED, length=0)
    figure.supxlabel(_literal(axis_words(layout.columns)), fontsize=9, color=_MUTED)
    figure.supylabel(_literal(axis_words(layout.rows)), fontsize=9, color=_MUTED)
    return figure


def accuracy_figure(grids: Mapping[str, Grid]) -> Figure | None:
    """Draw accuracy by column with 95 % Wilson intervals; None where columns are words."""
    layout, columns = next(iter(grids.values())).layout, all_columns(grids.values())
    if any(isinstance(column, str) for column in columns):
        return None
    figure, axes = _plain(
        _literal(axis_words(layout.columns)),
        _literal(f"{layout.short} accuracy" if layout.higher_is_better else layout.short),
    )
    names = cut_names(map(short_name, grids))
    for position, (label, table) in enumerate(grids.items()):
        rows = [
            (n, t.mean, t.interval)
            for n in table.columns
            if (t := table.by_column[n]).mean is not None and t.interval
        ]
        means = np.array([mean for _, mean, _ in rows], dtype=float)
        bounds = np.array([interval for _, _, interval in rows], dtype=float).reshape(-1, 2)
        errors = np.abs(np.vstack([means - bounds[:, 0], bounds[:, 1] - means]))
        places = [n for n, _, _ in rows]
        axes.errorbar(places, means, yerr=errors, elinewidth=0.8, **_line_style(label, position, names))
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if layout.columns == "length":
        _length_ticks(axes, columns)
    else:
        axes.set_xticks(columns)
    _legend(axes)
    return figure


def perplexity_figure(evaluation: Evaluation) -> Figure:
    """Draw perplexity, or bits per byte across tokenizers, by position and by window length on logarithmic axes."""
    figure = Figure(figsize=(10, 3.8), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths: set[int] = set()
    ends: set[int] = set()
    main = [label for label in evaluation.ppl if not label.startswith("ablate_")]
    measure = ppl_measure(evaluation, main)
    _style(left, "position in the window, tokens", measure.name)
    _style(right, "window length in tokens", measure.name)
    names = cut_names(map(short_name, main))
    for position, (label, table) in enumerate((label, evaluation.ppl[label]) for label in main):
        style = _line_style(label, position, names)
        by_position = [
            ((a + b) / 2, value) for (a, b), sums in table.by_position.items() if (value := measure.of(sums))
        ]
        by_length = [(n, value) for n, sums in table.by_length.items() if (value := measure.of(sums))]
        left.plot(*_columns(by_position), **style)
        right.plot(*_columns(by_length), **style)
        lengths |= set(table.by_length)
        ends |= {end for _, end in table.by_position}
    for axes, ticks in ((left, ends), (right, lengths)):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "25" else ""))
        axes.tick_params(which="minor", labelsize=8, labelcolor=_MUTED, length=0)
        _length_ticks(axes, sorted(ticks))
    _legend(left)
    return figure


def lengths_figure(summaries: Sequence[dict[str, Any]]) -> Figure:
    """Draw token share by document length, one panel per source."""
    summaries = sorted(summaries, key=lambda s: (s["name"] != "before", s["name"]))
    sources = panel_sources(summaries)
    columns = min(len(sources), 3) or 1
    rows = -(-len(sources) // columns) or 1
    figure = Figure(figsize=(4.0 * columns, 2.6 * rows), dpi=160, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(sources) :]:
        axes.set_visible(False)
    for axes, source in zip(grid.flat, sources):
        _style(axes, "", "")
        for number, summary in enumerate(summaries):
            if source in summary["sources"]:
                histogram = summary["sources"][source]["histogram"]
                shares = np.asarray(histogram["tokens"], dtype=float)
                shares = shares / (shares.sum() or 1)
                color = LINES[number % len(LINES)][0]
                axes.stairs(
                    shares,
                    histogram["edges"],
                    fill=number == 0,
                    alpha=0.35 if number == 0 else 1,
                    color=color,
                    lw=1.8,
                    label=_literal(str(summary["title"])),
                )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: length_text(v)))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_title(_literal(cut_name(source, 48)), fontsize=10, color=_INK, loc="left")
    _legend(grid.flat[0])
    words = f", {left_out}" if (left_out := left_out_words(summaries)) else ""
    figure.supxlabel(f"document length in tokens{words}", fontsize=9, color=_MUTED)
    figure.supylabel("share of tokens", fontsize=9, color=_MUTED)
    return figure


def audit_figure(rows: Sequence[dict[str, Any]], measures: Sequence[str]) -> Figure:
    """Draw what an audit found: a panel a measure, a bar for each source and length.

    `rows` and `measures` are what `data.audit.summary` says; measures without a mean are left out.
    """
    most = sorted(range(len(rows)), key=lambda place: -rows[place]["tokens"])[:_MOST_BARS]
    left_out, rows = len(rows) - len(most), [rows[place] for place in sorted(most)]
    drawn = [name for name in measures if any(row[name].get("mean") is not None for row in rows)]
    columns = min(len(drawn), 3) or 1
    height = 0.9 + 0.22 * len(rows)
    figure = Figure(
        figsize=(4.6 * columns, height * (-(-len(drawn) // columns) or 1)), dpi=160, layout="constrained"
    )
    grid = figure.subplots(-(-len(drawn) // columns) or 1, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(drawn) :]:
        axes.set_visible(False)
    labels = [_literal(cut_name(f"{row['source']}, {row['lengths']}", 40)) for row in rows]
    for axes, name in zip(grid.flat, drawn):
        _style(axes, "", "")
        values = [row[name]["mean"] for row in rows]
        known = [place for place, value in enumerate(values) if value is not None]
        axes.barh(known, [values[place] for place in known], color=LINES[0][0], height=0.7)
        for place, value in enumerate(values):
            text = "not measured" if value is None else f"{value:.3g}"
            axes.annotate(
                text,
                (value or 0, place),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=_MUTED,
            )
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)
        axes.set_title(name.replace("_", " "), fontsize=10, color=_INK, loc="left")
    if left_out:
        words = f"the {len(rows)} of {len(rows) + left_out:,} sources and lengths with most tokens"
        figure.supxlabel(words, fontsize=9, color=_MUTED)
    return figure


def loss_figure(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Draw the training loss, every step and smoothed, and by source; of many the highest and lowest have names."""
    figure, axes = _plain("tokens trained on", "loss (nats per token)")
    raw = loss_points(metrics)
    axes.plot(*_columns(binned(raw, RAW_POINTS)), color=LINES[0][0], lw=0.6, alpha=0.35)
    axes.plot(*_columns(binned(raw, SMOOTH_POINTS)), color=LINES[0][0], lw=2.0, label="all sources")
    named, others = source_losses(metrics)
    for points in others.values():
        axes.plot(*_columns(points), color=_MUTED, lw=0.5, alpha=0.5)
    if others:
        axes.plot([], [], color=_MUTED, lw=0.5, label=f"{len(others):,} other sources")
    for number, (source, points) in enumerate(named.items() if len(named) > 1 else ()):
        axes.plot(*_columns(points), color=LINES[1 + number][0], lw=1.4, label=_literal(cut_name(source)))
    for before, after in pairwise(metrics):
        if before.get("stage") != after.get("stage"):
            axes.axvline(before["tokens"], color=_MUTED, lw=0.8, ls=(0, (3, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e6:g}M" if v else "0"))
    _legend(axes)
    return figure


def _line_style(label: str, position: int, names: Mapping[str, str]) -> dict[str, Any]:
    """Return how the line of a label is drawn; that of the model after training is the thickest."""
    color, width = LINES[line_index(label, position)][0], 2.2 if role_of(label) == "after" else 1.4
    name = _literal(names[short_name(label)])
    # Dashes tell lines apart where their colours do not, to colour-blind readers and on grey paper.
    dashes = tuple(float(part) / width for part in DASHES[line_index(label, position)].split())
    style = (0, dashes) if dashes else "-"
    return {"color": color, "marker": "o", "ms": 3.5, "lw": width, "ls": style, "label": name}


def _literal(text: str) -> str:
    """Keep matplotlib from reading a name as mathematics ($) or as hidden (a leading underscore)."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _plain(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, 3.8), dpi=160, layout="constrained")
    axes = figure.subplots()
    _style(axes, xlabel, ylabel)
    return figure, axes


def _style(axes: Any, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=9, color=_MUTED)
    axes.set_ylabel(ylabel, fontsize=9, color=_MUTED)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(labelsize=8, labelcolor=_MUTED, length=0)
    axes.grid(axis="y", color=_GRID, lw=0.8)
    axes.set_axisbelow(True)


def _length_ticks(axes: Any, lengths: Sequence[int]) -> None:
    ticks = thinned(
        lengths, AxisScale(min(lengths, default=1), max(lengths, default=1), 0, _MOST_TICKS, True), 1
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: length_text(v)))


def _legend(axes: Any) -> None:
    figure, (lines, names) = axes.figure, axes.get_legend_handles_labels()
    style = {"frameon": False, "fontsize": 8, "labelcolor": _INK}
    if len(names) <= _MOST_INSIDE:
        axes.legend(**style)
        return
    columns = max(1, int(figure.get_figwidth() // _NAME_WIDTH))
    figure.set_figheight(figure.get_figheight() + _NAME_HEIGHT * -(-len(names) // columns))
    figure.legend(lines, names, loc="outside lower center", ncols=columns, **style)
