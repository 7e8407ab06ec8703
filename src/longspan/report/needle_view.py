"""The needle section: heat maps, accuracy by length, and the samples behind every cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from longspan.report.charts import (
    Axis,
    LineChart,
    Series,
    heat_map,
    length_axis,
    length_text,
)
from longspan.report.evaluation import Evaluation, trained_marks
from longspan.report.load import NeedleSample
from longspan.report.palette import line_index
from longspan.report.tables import (
    NeedleTable,
)
from longspan.report.view import (
    NARROW,
    ZERO_SHOT,
    Cell,
    Chart,
    Section,
    Table,
    heat_cell,
    interval_text,
    line_view,
    long_name,
    percent,
    short_name,
    tokens_text,
)

ZERO_SHOT_WORDS = (
    "Zero-shot maps show the model before training with nothing but its RoPE changed: "
    "a larger theta, NTK-aware scaling (NTK), or position interpolation (PI)."
)
SAMPLES_SHOWN = 4000  # over the whole page; keeps it near 1 MB
WINDOW_CHARS, OUTPUT_CHARS = 360, 200


def needle_section(ev: Evaluation) -> Section:
    """Return the needle maps, the curves by length and the data behind every cell."""
    section = Section("needle", "Needle in a haystack")
    labels = ev.main_labels
    if not labels:
        section.missing.append("Needle accuracy was not measured: no records/needle-*.jsonl.")
        return section
    main = "after" if "after" in labels else labels[-1] if labels == ["before"] else labels[0]
    section.intro = (
        "One fact is hidden at a given depth of a long context, then asked for. "
        "A cell shows the share of correct answers in percent; choose a cell to read its samples."
    )
    maps = {label: f"m{number}" for number, label in enumerate(labels)}
    section.parts["main"] = _map_view(ev, main, maps[main], wide=True)
    section.parts["others"] = [
        _map_view(ev, label, key, wide=False) for label, key in maps.items() if label != main
    ]
    section.parts["zero_shot"] = ZERO_SHOT_WORDS if any(label in labels for label in ZERO_SHOT) else ""
    section.parts["facts"] = _needle_facts(ev, main)
    section.parts["beyond"] = _beyond_note(ev, main)
    section.parts["curve"] = accuracy_chart(ev, labels)
    section.parts["samples"] = _sample_data({key: ev.needle[label] for label, key in maps.items()})
    if "before" not in labels:
        section.missing.append("Needle accuracy before training was not measured.")
    if not any(label in labels for label in ZERO_SHOT):
        section.missing.append("No zero-shot method (theta only, NTK, PI) was measured with needles.")
    return section


def _map_view(ev: Evaluation, label: str, key: str, *, wide: bool) -> dict[str, Any]:
    table = ev.needle[label]
    own, old = ev.trained_length(label), ev.before_length
    lines = []
    if wide and old and own and old != own:
        lines.append((old, f"before: {length_text(old)}"))
    if own:
        lines.append((own, f"trained: {length_text(own)}"))
    name = long_name(label)
    drawn = heat_map(name, table, 640 if wide else 232, key=key, trained=lines, compact=not wide)
    return {
        "name": name,
        "mean": percent(table.total.mean),
        "detail": _rope_text(ev.rope(label)),
        "svg": Markup(drawn),
        "narrow": Markup(heat_map(name, table, NARROW, key=key, trained=lines, compact=True))
        if wide
        else None,
        "table": Table(
            f"Needle accuracy, {name}",
            ["depth", *(length_text(n) for n in table.lengths)],
            [
                [percent(d), *(heat_cell(table.tallies.get((d, n))) for n in table.lengths)]
                for d in table.depths
            ],
        ),
    }


def _rope_text(rope: Any) -> str:
    """Write RoPE parameters as `default, theta 100,000`."""
    if not isinstance(rope, dict):
        return ""
    words = [str(rope[name]) for name in ("rope_type", "type") if rope.get(name)][:1]
    for name, value in rope.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            words.append(f"{name.removeprefix('rope_').replace('_', ' ')} {value:,.6g}")
    return "RoPE " + ", ".join(words) if words else ""


def _needle_facts(ev: Evaluation, main: str) -> list[tuple[str, str]]:
    table = ev.needle[main]
    facts = [
        ("Samples", f"{table.total.scored:,} scored, {table.samples_per_cell} in a cell"),
        ("All cells", f"{percent(table.total.mean)}, 95% interval {interval_text(table.total)}"),
    ]
    worst = (
        min((t.mean, key) for key, t in table.tallies.items() if t.mean is not None)
        if table.total.scored
        else None
    )
    if worst is not None:
        share, (depth, length) = worst
        facts.append(("Weakest cell", f"{percent(share)} at {length_text(length)} tokens, depth {depth:.0%}"))
    unscored = sum(ev.needle[label].total.unscored for label in ev.main_labels)
    facts.append(("Not scored", f"{unscored} of all samples; never counted as wrong" if unscored else "none"))
    return facts


def _beyond_note(ev: Evaluation, label: str) -> str:
    trained, table = ev.trained_length(label), ev.needle[label]
    beyond = [length for length in table.lengths if trained and length > trained]
    if not beyond or trained is None:
        return ""
    listed = ", ".join(f"{percent(table.by_length[n].mean)} at {length_text(n)}" for n in beyond)
    return f"Beyond the trained {tokens_text(trained)}: {listed}. The model never saw these positions in training."


def accuracy_chart(ev: Evaluation, labels: Sequence[str]) -> Chart:
    """Return accuracy by length with 95 % intervals, one line per label."""
    lengths = sorted({length for label in labels for length in ev.needle[label].lengths})
    series = []
    for position, label in enumerate(labels):
        rows = [(n, ev.needle[label].by_length[n]) for n in ev.needle[label].lengths]
        known = [(n, tally, tally.mean) for n, tally in rows if tally.mean is not None]
        tips = [
            f"{short_name(label)}, {tokens_text(n)}: {percent(mean)}, {interval_text(t)}, n = {t.scored}"
            for n, t, mean in known
        ]
        points = [(float(n), mean) for n, _, mean in known]
        intervals = [t.interval for _, t, _ in known]
        series.append(
            Series(
                short_name(label),
                line_index(label, position),
                points,
                intervals,
                tips,
                strong=label == "after",
            )
        )
    chart = LineChart(
        label="Needle accuracy by context length with 95 percent intervals",
        x=length_axis(lengths, "context length in tokens", air=1.06),
        y=Axis(0, 1, [(v / 4, f"{v * 25}%") for v in range(5)], "accuracy, all depths"),
        series=series,
        marks=trained_marks(ev, lengths),
    )
    table = Table(
        "Needle accuracy by context length",
        ["", *(length_text(n) for n in lengths), "mean", "95% interval"],
        [
            [
                short_name(label),
                *(heat_cell(ev.needle[label].by_length.get(n)) for n in lengths),
                Cell(percent(ev.needle[label].total.mean), "num"),
                Cell(interval_text(ev.needle[label].total), "num"),
            ]
            for label in labels
        ],
    )
    note = (
        "Whiskers: 95% Wilson intervals over all depths, samples taken as independent; "
        "lines are set a few pixels apart so that whiskers stay readable."
    )
    return line_view(chart, title="Accuracy by context length", note=note, table=table)


def _sample_data(maps: dict[str, NeedleTable]) -> dict[str, Any]:
    """Return what the page shows for a cell: wrong answers first; prompts shared by several labels are stored once."""
    prompts: dict[tuple[str, str, str], int] = {}
    cells: dict[str, Any] = {}
    count = sum(len(table.cells) for table in maps.values())
    most = max(1, SAMPLES_SHOWN // max(count, 1))
    for key, table in maps.items():
        for (depth, length), samples in table.cells.items():
            ordered = sorted(samples, key=lambda s: (s.score if s.score is not None else 0.5, s.sample))
            rows = []
            for sample in ordered[:most]:
                text = (_around(sample), sample.question, sample.expected)
                index = prompts.setdefault(text, len(prompts))
                rows.append(
                    [
                        index,
                        sample.id,
                        sample.output[:OUTPUT_CHARS],
                        sample.score,
                        sample.unscored,
                        sample.achieved_length,
                        sample.achieved_depth,
                    ]
                )
            cells[f"{key}/{table.depths.index(depth)}/{table.lengths.index(length)}"] = {
                "total": len(samples),
                "rows": rows,
            }
    return {"prompts": [list(prompt) for prompt in prompts], "cells": cells}


def _around(sample: NeedleSample) -> str:
    """Cut a prompt window to WINDOW_CHARS around the expected answer."""
    text, place = sample.window, max(sample.window.find(sample.expected), 0)
    if len(text) <= WINDOW_CHARS:
        return text
    start = min(max(0, place - WINDOW_CHARS // 2), len(text) - WINDOW_CHARS)
    end = start + WINDOW_CHARS
    return ("\u2026" if start else "") + text[start:end] + ("\u2026" if end < len(text) else "")
