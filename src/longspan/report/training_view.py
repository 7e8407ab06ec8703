"""The sections on data and training: length distributions, losses, timings, recipe and environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup

from longspan.core.units import format_count
from longspan.report.charts import (
    Axis,
    LengthHistogram,
    LineChart,
    Mark,
    Series,
    Shares,
    length_panels,
    number_axis,
)
from longspan.report.layouts import length_text
from longspan.report.load import LoadedRun
from longspan.report.svg import linear_ticks
from longspan.report.view import (
    MISSING,
    NARROW,
    WIDE,
    Chart,
    Section,
    Table,
    TableCell,
    cells,
    decimal,
    line_view,
    percent,
)

SMOOTH_POINTS, RAW_POINTS = 120, 400
MOST_SOURCES = 7
"""Sources that have a colour and a name each; of more the `_EXTREMES` highest and lowest have."""
_EXTREMES = 3
MOST_PANELS = 23
"""Sources that have a histogram each; of more those with most tokens have."""
_EVERY = "all sources"


def training_totals(runs: Sequence[LoadedRun]) -> dict[str, float]:
    """Return tokens, steps and, where logged, seconds of the first run that trained; empty without metrics."""
    metrics = next((run.metrics for run in runs if run.metrics), None)
    if metrics is None:
        return {}
    totals = {"tokens": float(metrics[-1]["tokens"]), "steps": float(metrics[-1]["step"])}
    seconds = metrics[-1].get("seconds")
    if isinstance(seconds, (int, float)):
        totals["seconds"] = float(seconds)
    return totals


def lengths_section(runs: Sequence[LoadedRun]) -> Section:
    """Return token shares by document length, per source, for every run that has length summaries."""
    section = Section("data", "Document lengths", "lengths", "Lengths")
    having = [run for run in runs if run.lengths]
    if not having:
        section.missing.append("Document lengths were not recorded: no lengths/*.json.")
        return section
    section.intro = "Share of tokens by the length of the document they stand in (log2 bins)."
    if any(len(run.lengths) > 1 for run in having):
        section.intro += " Upsampling long documents within a source moves its tokens to the right."
    section.parts["runs"] = [_lengths_view(run, run.name if len(having) > 1 else "") for run in having]
    return section


def _lengths_view(run: LoadedRun, name: str) -> dict[str, Any]:
    summaries = sorted(run.lengths, key=lambda s: (s["name"] != "before", s["name"]))
    panels = _length_panels(summaries)
    left_out = left_out_words(summaries)
    # Four across when that leaves no lonely panel in the last row.
    columns = 4 if len(panels) in (4, 7, 8) else 3
    width = 232 if columns == 4 else 318
    return {
        "name": name,
        "legend": [(str(s["title"]), f"c{n}") for n, s in enumerate(summaries)],
        "columns": columns,
        "panels": [{"name": title, "svg": Markup(panel.draw(width))} for title, panel in panels.items()],
        "note": f"Drawn are {left_out}; the table has all." if left_out else "",
        "table": _lengths_table(summaries),
    }


def panel_sources(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Return the sources that have a histogram each: all, or those with most tokens."""
    tokens: dict[str, int] = {}
    for summary in summaries:
        for source, entry in summary["sources"].items():
            tokens[source] = max(tokens.get(source, 0), sum(entry["histogram"]["tokens"]))
    return sorted(sorted(tokens, key=lambda source: (-tokens[source], source))[:MOST_PANELS])


def left_out_words(summaries: Sequence[dict[str, Any]]) -> str:
    """Say which sources have a histogram; empty where all have."""
    every = len({source for summary in summaries for source in summary["sources"]})
    return f"the {MOST_PANELS} of {every:,} sources with most tokens" if every > MOST_PANELS else ""


def _length_panels(summaries: Sequence[dict[str, Any]]) -> dict[str, LengthHistogram]:
    names = panel_sources(summaries)
    groups: dict[str, list[Shares]] = {}
    for source in names:
        for number, summary in enumerate(summaries):
            if source in summary["sources"]:
                histogram = summary["sources"][source]["histogram"]
                groups.setdefault(source, []).append(
                    _shares(str(summary["title"]), number, histogram["edges"], histogram["tokens"])
                )
    total = [_total_shares(summary, number) for number, summary in enumerate(summaries)]
    if len(names) > 1 and all(total):
        groups = {_EVERY: [shares for shares in total if shares], **groups}
    return length_panels(groups, "Token share by document length", "document length in tokens")


def _shares(name: str, color: int, edges: Sequence[float], tokens: Sequence[float]) -> Shares:
    whole = sum(tokens) or 1
    return Shares(name, color, list(edges), [count / whole for count in tokens])


def _total_shares(summary: dict[str, Any], color: int) -> Shares | None:
    """Return all sources together, None when their bins differ."""
    histograms = [entry["histogram"] for entry in summary["sources"].values()]
    if len({tuple(h["edges"]) for h in histograms}) != 1:
        return None
    tokens = np.sum([h["tokens"] for h in histograms], axis=0)
    return _shares(str(summary["title"]), color, histograms[0]["edges"], tokens.tolist())


def _lengths_table(summaries: Sequence[dict[str, Any]]) -> Table:
    entries = [
        (source, s, s["sources"][source])
        for source in sorted({n for s in summaries for n in s["sources"]})
        for s in summaries
        if source in s["sources"]
    ]
    above = sorted({key for _, _, entry in entries for key in entry.get("share_above", {})}, key=_as_number)
    recorded = {q for _, _, entry in entries for q in entry.get("quantiles", {})}
    quantiles = [q for q in ("p50", "p90", "p99", "max") if q in recorded]
    rows: list[list[str | TableCell]] = []
    previous = None
    for source, summary, entry in entries:
        numbers = [format_count(entry[key]) if key in entry else "\u2013" for key in ("documents", "tokens")]
        numbers += [
            f"{entry['quantiles'][q]:,.0f}" if q in entry.get("quantiles", {}) else "\u2013"
            for q in quantiles
        ]
        numbers += [percent(entry.get("share_above", {}).get(key)) for key in above]
        first = TableCell(source) if source != previous else TableCell("", title=source)
        rows.append([first, str(summary["name"]).replace("_", " "), *cells(*numbers)])
        previous = source
    columns = ["source", "", "documents", "tokens", *quantiles, *(f"> {_as_length(key)}" for key in above)]
    title = "Documents and tokens by source; the last columns are shares of tokens in longer documents"
    return Table(title, columns, rows)


def _as_number(key: str) -> float:
    return float(key) if key.replace(".", "", 1).isdigit() else float("inf")


def _as_length(key: str) -> str:
    return length_text(int(key)) if key.isdigit() else key


def training_section(runs: Sequence[LoadedRun]) -> Section:
    """Return losses by source with the stage borders, the learning rate, and losses by position, for every run."""
    section = Section("training", "Training", "training")
    trained = [run for run in runs if run.metrics]
    if not trained:
        section.missing.append("Training losses were not recorded: no metrics.jsonl.")
        return section
    section.intro = (
        "Loss in nats per token. Bold and coloured lines are means over neighbouring steps; "
        "the thin grey line is every step."
    )
    section.parts["runs"] = [
        {
            "name": run.name if len(trained) > 1 else "",
            "charts": [c for c in (_loss_charts(run), _divergence(run), _position_losses(run)) if c],
        }
        for run in trained
    ]
    return section


def source_losses(
    metrics: Sequence[dict[str, Any]],
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[tuple[float, float]]]]:
    """Return (tokens, loss), smoothed, of the sources that are drawn with a name, and of the others."""
    sources = sorted({source for line in metrics for source in (line.get("loss_by_source") or {})})
    lines = {source: binned(loss_points(metrics, source), SMOOTH_POINTS) for source in sources}
    if len(lines) <= MOST_SOURCES:
        return lines, {}
    ordered = sorted((source for source in lines if lines[source]), key=lambda source: lines[source][-1][1])
    named = {*ordered[:_EXTREMES], *ordered[-_EXTREMES:]}
    return {s: lines[s] for s in sources if s in named}, {s: lines[s] for s in sources if s not in named}


def _loss_charts(run: LoadedRun) -> Chart:
    metrics = run.metrics
    steps = loss_points(metrics)
    named, others = source_losses(metrics)
    series = [Series("every step", 0, binned(steps, RAW_POINTS), faint=True)]
    series += [Series(source, 0, points, family="r", faint=True) for source, points in others.items()]
    if len(named) != 1:
        series.append(Series(_EVERY, 0, binned(steps, SMOOTH_POINTS), strong=True, dashed=False))
    for number, (source, points) in enumerate(named.items()):
        series.append(Series(source, 1 + number, points, dashed=False))
    marks = _stage_marks(metrics)
    x = _token_axis(metrics)
    y = number_axis([v for s in series for _, v in s.points] or [0.0, 1.0], "loss")
    rates = _points(metrics, lambda line: line.get("lr"))
    upper = replace(x, name="") if rates else x
    drawn = [LineChart("Training loss by source over tokens", upper, y, series, marks, height=330)]
    if rates:
        top = max(rate for _, rate in rates) * 1.08 or 1.0
        lr_axis = Axis(0, top, [(v, f"{v:g}") for v in linear_ticks(0, top, 2)], "learning rate")
        line = Series("learning rate", 0, binned(rates, RAW_POINTS), dashed=False)
        drawn.append(
            LineChart(
                "Learning rate over tokens", x, lr_axis, [line], [Mark(m.x, "") for m in marks], height=130
            )
        )
    table = _stage_table(metrics, sorted({*named, *others}))
    note = (
        f"Named are the {_EXTREMES} sources with the highest and the {_EXTREMES} with the lowest loss at the end; thin "
        f"grey lines are the other {len(others):,}. The table has all."
    )
    legend = [(s.name, f"c{s.color}", "") for s in series if not s.faint]
    return Chart(
        "Loss by source and stage",
        _stack(drawn, WIDE, True),
        _stack(drawn, NARROW, False),
        legend if len(legend) > 1 else (),
        note if others else "",
        table,
    )


def _stack(charts: Sequence[LineChart], width: float, names: bool) -> Markup:
    """Draw charts under each other with one common plot area."""
    sides = [chart.margins(names) for chart in charts]
    margins = (max(left for left, _ in sides), max(right for _, right in sides))
    return Markup(
        "".join(chart.draw(width, names=names and n == 0, margins=margins) for n, chart in enumerate(charts))
    )


def _stage_table(metrics: Sequence[dict[str, Any]], sources: Sequence[str]) -> Table:
    rows: list[list[str | TableCell]] = []
    for start, end in _stage_spans(metrics):
        lines = metrics[start:end]
        tail = lines[-max(1, len(lines) // 10) :]
        means = [_mean([line.get("loss") for line in tail])]
        means += [
            _mean([(line.get("loss_by_source") or {}).get(source) for line in tail]) for source in sources
        ]
        tokens = lines[-1]["tokens"] - (metrics[start - 1]["tokens"] if start else 0)
        speeds = _mean([line.get("tokens_per_s") for line in lines])
        context = lines[0].get("context_length")
        numbers = [
            length_text(context) if context else MISSING,
            f"{len(lines):,}",
            format_count(tokens),
            f"{speeds:,.0f}" if speeds else MISSING,
            *map(decimal, means),
        ]
        rows.append([str(lines[0].get("stage", "")), *cells(*numbers)])
    columns = ["stage", "context", "logged steps", "tokens", "tokens/s", "loss"]
    columns += [f"loss, {source}" for source in sources]
    table = Table("Stages; losses are means over the last tenth of a stage", columns, rows)
    return table.turned("stage") if len(sources) > MOST_SOURCES else table


def _divergence(run: LoadedRun) -> Chart | None:
    """Return the divergence from a teacher; None for a run that had none."""
    points = _points(run.metrics, lambda line: line.get("kl"))
    if not points:
        return None
    series = [
        Series("every step", 0, binned(points, RAW_POINTS), faint=True),
        Series("KL", 1, binned(points, SMOOTH_POINTS), dashed=False),
    ]
    y = number_axis([value for each in series for _, value in each.points], "KL", zero=True)
    return line_view(
        _over_tokens(run, "Divergence from the teacher over tokens", series, y, 260),
        title="Divergence from the teacher",
        note="KL(teacher || student) over the words that the teacher names and the mass of all others, in nats a "
        "token, unweighted; at the temperature of training, times its square.",
    )


def _position_losses(run: LoadedRun) -> Chart | None:
    names = sorted(
        {name for line in run.metrics for name in (line.get("loss_by_position") or {})}, key=_bucket_start
    )
    if len(names) < 2:
        return None
    series = []
    for number, name in enumerate(names):
        points = _points(run.metrics, lambda line, n=name: (line.get("loss_by_position") or {}).get(n))
        step = 10 + round(10 * number / (len(names) - 1))
        series.append(Series(name, step, binned(points, SMOOTH_POINTS), family="p", dashed=False))
    y = number_axis([v for s in series for _, v in s.points] or [0.0, 1.0], "loss")
    return line_view(
        _over_tokens(run, "Training loss by position in the row", series, y, 300),
        title="Loss by position in the row",
        note="Darker (on a dark page: lighter) lines are later positions.",
    )


def _over_tokens(run: LoadedRun, label: str, series: Sequence[Series], y: Axis, height: float) -> LineChart:
    x, marks = _token_axis(run.metrics), _stage_marks(run.metrics)
    return LineChart(label, x, y, series, marks, height=height)


def _bucket_start(name: str) -> tuple[float, str]:
    return (_as_number(name.partition("-")[0]), name)


def loss_points(metrics: Sequence[dict[str, Any]], source: str | None = None) -> list[tuple[float, float]]:
    """Return (tokens, loss) of every step that has one, of one source when it is named."""
    if source is None:
        return _points(metrics, lambda line: line.get("loss"))
    return _points(metrics, lambda line: (line.get("loss_by_source") or {}).get(source))


def _points(metrics: Sequence[dict[str, Any]], value_of: Any) -> list[tuple[float, float]]:
    points = []
    for line in metrics:
        value = value_of(line)
        if isinstance(value, (int, float)) and np.isfinite(value):
            points.append((float(line["tokens"]), float(value)))
    return points


def binned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return points averaged with their neighbours down to at most `most`."""
    if len(points) <= most:
        return list(points)
    means = [part.mean(axis=0) for part in np.array_split(np.asarray(points), most)]
    return [(float(tokens), float(value)) for tokens, value in means]


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if isinstance(value, (int, float)) and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def _token_axis(metrics: Sequence[dict[str, Any]]) -> Axis:
    last = float(metrics[-1]["tokens"]) or 1.0
    return Axis(0, last, [(v, _tokens_tick(v, last)) for v in linear_ticks(0, last, 6)], "tokens trained on")


def _tokens_tick(value: float, last: float) -> str:
    """Write a tick in the unit of the whole axis: 0, 0.5M, 1M."""
    unit, suffix = next(((u, s) for u, s in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if last >= u), (1.0, ""))
    return f"{value / unit:g}{suffix}" if value else "0"


def _stage_spans(metrics: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Return [start, end) indices of runs of lines with the same stage."""
    borders = [n for n in range(1, len(metrics)) if metrics[n].get("stage") != metrics[n - 1].get("stage")]
    return list(zip([0, *borders], [*borders, len(metrics)]))


def _stage_marks(metrics: Sequence[dict[str, Any]]) -> list[Mark]:
    marks = []
    for start, _ in _stage_spans(metrics):
        line = metrics[start]
        name = str(line.get("stage") or "")
        if line.get("context_length"):
            length = length_text(line["context_length"])
            name = f"{name} ({length})" if name else length
        if name:
            marks.append(Mark(float(metrics[start - 1]["tokens"]) if start else 0.0, name))
    return marks
