"""Tables of scores without depths: RULER, topics, long question answering, benchmarks before and after, the rest."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from longspan.report.charts import Forest, ForestRow, length_text
from longspan.report.evaluation import Evaluation
from longspan.report.needle_view import accuracy_chart
from longspan.report.palette import line_index
from longspan.report.sample_data import SampleData
from longspan.report.samples import Sample
from longspan.report.tables import (
    RULER_SUBTASKS,
    RULER_THRESHOLD,
    Difference,
    Grid,
    Tally,
    by_group,
    difference,
    ruler_effective,
    tally_of,
)
from longspan.report.view import (
    MISSING,
    NARROW,
    WIDE,
    Cell,
    Chart,
    Section,
    Table,
    heat_cell,
    interval_text,
    percent,
    points,
    short_name,
)

MOST_GROUPS = 40


def ruler_section(ev: Evaluation, data: SampleData) -> Section:
    """Return the averages by length of every model, and for each model the subtasks by length."""
    section = Section("ruler", "RULER", "grids")
    grids = {label: grid for label, grid in ev.grids.get("ruler", {}).items() if grid.lengths}
    if not grids:
        return section
    subtasks = {row for grid in grids.values() for row in grid.rows}
    section.intro = (
        f"{len(subtasks & set(RULER_SUBTASKS))} of RULER's 13 subtasks, each weighted alike. "
        "Choose a cell to read its samples."
    )
    lengths = sorted({n for grid in grids.values() for n in grid.lengths})
    section.parts["wide"] = False
    section.parts["average"] = Table(
        "RULER: mean of the subtasks by length; effective lengths by our bound, and as published "
        f"(mean of all 13 at least {RULER_THRESHOLD:.1%})",
        ["", *(length_text(n) for n in lengths), "effective", "as published"],
        [
            [
                short_name(label),
                *(_average_cell(grid, n) for n in lengths),
                Cell(_length_or(grid.effective, f"< {length_text(grid.lengths[0])}"), "num strong"),
                Cell(_length_or(ruler_effective(grid), _published_gap(grid)), "num"),
            ]
            for label, grid in grids.items()
        ],
    )
    section.parts["curve"] = accuracy_chart(ev, grids, what="RULER")
    section.parts["tables"] = [
        _grid_table("ruler", label, grid, data, "subtask") for label, grid in grids.items()
    ]
    return section


def _average_cell(grid: Grid, length: int) -> Cell:
    tally = grid.by_length.get(length, Tally())
    cell, mean = heat_cell(tally), grid.mean_of_rows(length)
    return cell if mean is None else Cell(f"{mean * 100:.1f}", cell.cls, cell.title)


def _length_or(length: int | None, otherwise: str) -> str:
    return length_text(length) if length else otherwise


def _published_gap(grid: Grid) -> str:
    whole = all((subtask, grid.lengths[0]) in grid.tallies for subtask in RULER_SUBTASKS)
    return f"< {length_text(grid.lengths[0])}" if whole else MISSING


_COUNT_WORDS = {
    "topics": ("Topics", "Several topics are talked about one after the other, then one is asked for."),
    "lines": ("Lines", "Many lines hold a number each, then that of one line is asked for."),
}


def count_section(task: str, ev: Evaluation, data: SampleData) -> Section:
    """Return accuracy by the number of topics or lines; the length of a context follows from it."""
    title, words = _COUNT_WORDS[task]
    section = Section(task, title, "grids")
    grids = {label: grid for label, grid in ev.grids.get(task, {}).items() if grid.lengths}
    if not grids:
        return section
    section.intro = f"{words} Choose a cell to read its samples."
    lengths = sorted({n for grid in grids.values() for n in grid.lengths})
    counts = {
        n: next(s.num_parts for grid in grids.values() for s in grid.cells.get(("all", n), ()))
        for n in lengths
    }
    columns = [f"{counts[n]} ({length_text(n)} tokens)" for n in lengths]
    key = data.add_map(task, title, [], [])
    rows: list[list[str | Cell]] = []
    for row, (label, grid) in enumerate(grids.items()):
        cells = []
        for column, n in enumerate(lengths):
            name = f"{short_name(label)}, {counts[n]} {task}, {length_text(n)} tokens"
            opens = data.add_cell(key, row, column, grid.cells.get(("all", n), ()))
            cells.append(heat_cell(grid.by_length.get(n), name=name, key=opens))
        rows.append([short_name(label), *cells, Cell(percent(grid.total.mean), "num strong")])
    section.parts["average"] = None
    section.parts["curve"] = accuracy_chart(ev, grids, what=title)
    table = Table(f"Accuracy by the number of {task}; lengths are medians", [task, *columns, "all"], rows)
    scored = sum(grid.total.scored for grid in grids.values())
    unscored = sum(grid.total.unscored for grid in grids.values())
    aside = f"{scored:,} scored" + (f", {unscored} not scored" if unscored else "")
    section.parts["tables"] = [{"name": f"By number of {task}", "aside": aside, "table": table}]
    section.parts["wide"] = True
    return section


def _grid_table(task: str, label: str, grid: Grid, data: SampleData, row_name: str) -> dict[str, Any]:
    """Return one label's rows by length; every cell opens its samples."""
    columns = [length_text(n) for n in grid.lengths]
    key = data.add_grid(task, short_name(label), grid, [str(row) for row in grid.rows], columns)
    rows: list[list[str | Cell]] = []
    for place, row in enumerate(grid.rows):
        cells = []
        for column, length in enumerate(grid.lengths):
            name = f"{short_name(label)}, {row}, {length_text(length)} tokens"
            opens = f"{key}/{place}/{column}" if (row, length) in grid.cells else ""
            cells.append(heat_cell(grid.tallies.get((row, length)), name=name, key=opens))
        rows.append([str(row), *cells, Cell(percent(grid.by_row[row].mean), "num")])
    rows.append(
        [
            Cell("mean", "reference"),
            *(_average_cell(grid, n) for n in grid.lengths),
            Cell(percent(grid.total.mean), "num strong"),
        ]
    )
    unscored = f", {grid.total.unscored} not scored" if grid.total.unscored else ""
    return {
        "name": short_name(label),
        "aside": f"{grid.total.scored:,} scored{unscored}",
        "table": Table(f"{short_name(label)}: accuracy in percent", [row_name, *columns, "all"], rows),
    }


def scores_section(task: str, title: str, ev: Evaluation, data: SampleData) -> Section:
    """Return one row for every data set (with its subtasks, if they are few) and label: n, score, interval."""
    section = Section(re.sub(r"[^\w-]+", "_", task), title, "scores")
    by_label = ev.scores.get(task, {})
    samples = [sample for group in by_label.values() for sample in group]
    if not samples:
        return section
    fields = ["dataset", "subtask", "metric"]
    if not any(sample.dataset or sample.subtask for sample in samples):
        fields += ["depth", "length"]
    pooled = len(by_group(samples, *fields)) > MOST_GROUPS
    caption = f"{title}: scores by data set and model"
    key = data.add_map(task, title, [], [])
    if pooled:
        section.parts["table"] = _scores_table(caption, by_label, ["dataset", "metric"], data, key)
        key = data.add_map(task, title, [], [])
    detail = _scores_table(caption, by_label, fields, data, key)
    section.parts["table" if not pooled else "detail"] = detail
    section.parts.setdefault("detail", None)
    return section


def _scores_table(
    caption: str, by_label: Mapping[str, Sequence[Sample]], fields: Sequence[str], data: SampleData, key: str
) -> Table:
    groups = {label: by_group(samples, *fields) for label, samples in by_label.items()}
    names = sorted({name for group in groups.values() for name in group}, key=_natural)
    rows: list[list[str | Cell]] = []
    previous = None
    for place, name in enumerate(names):
        for column, label in enumerate(groups):
            samples = groups[label].get(name)
            if samples is None:
                continue
            metric = name[fields.index("metric")]
            words = [
                part for field, part in zip(fields, name) if field != "metric" and part not in ("", "None")
            ]
            shown = " / ".join(words) or "all samples"
            opens = data.add_cell(key, place, column, samples)
            first = Cell(shown) if shown != previous else Cell("", title=shown)
            rows.append([first, *_score_cells(shown, label, metric, samples, opens)])
            previous = shown
    columns = ["data set", "model", "metric", "n", "score", "95% interval", "not scored", "prompt tokens"]
    return Table(caption, columns, rows)


def _score_cells(
    shown: str, label: str, metric: str, samples: Sequence[Sample], opens: str
) -> list[str | Cell]:
    tally = tally_of(samples)
    shares = all(0 <= score <= 1 for score in tally.scores)
    if shares:
        score = heat_cell(tally, name=f"{shown}, {short_name(label)}", key=opens)
        score = (
            score if tally.mean is None else Cell(f"{tally.mean * 100:.1f}", score.cls, score.title, opens)
        )
    else:
        text = f"{shown}, {short_name(label)}: mean {tally.mean:.4g} of {tally.scored}"
        score = Cell(f"{tally.mean:.4g}", "num", text, opens)
    tokens = [tokens for s in samples if (tokens := s.prompt_tokens or s.length)]
    return [
        Cell(short_name(label), "left"),
        Cell(metric or MISSING, "left"),
        Cell(f"{tally.scored:,}", "num"),
        score,
        Cell(interval_text(tally), "num"),
        Cell(f"{tally.unscored:,}" if tally.unscored else MISSING, "num"),
        Cell(f"{statistics.median_low(tokens):,}" if tokens else MISSING, "num", "median"),
    ]


def _natural(key: Sequence[str]) -> list[tuple[int, float, str]]:
    """Sort numbers as numbers: 512 before 1024."""
    return [(0, float(p), "") if p.replace(".", "", 1).isdigit() else (1, 0.0, p) for p in key]


class DatasetDifference(NamedTuple):
    """What changed on one benchmark between a label and what it is compared with."""

    dataset: str
    metric: str
    label: str
    baseline: str
    difference: Difference
    subtasks: Mapping[str, Difference]
    tokens: int | None
    """Median length of the prompts, where recorded."""


def dataset_differences(ev: Evaluation) -> list[DatasetDifference]:
    """Return the change of every benchmark of the harness that a label and its baseline both have."""
    by_label = ev.scores.get("harness", {})
    rows = []
    for label, samples in by_label.items():
        baseline = ev.baseline(label, by_label)
        if baseline is None:
            continue
        old = by_group(by_label[baseline], "dataset", "metric")
        for key, group in by_group(samples, "dataset", "metric").items():
            whole = difference(old.get(key, []), group)
            if whole is None:
                continue
            parts, old_parts = by_group(group, "subtask"), by_group(old[key], "subtask")
            subtasks = {
                name[0]: part
                for name in parts
                if name[0] and name in old_parts and (part := difference(old_parts[name], parts[name]))
            }
            tokens = [s.prompt_tokens for s in group if s.prompt_tokens]
            median = statistics.median_low(tokens) if tokens else None
            rows.append(DatasetDifference(key[0], key[1], label, baseline, whole, subtasks, median))
    return sorted(rows, key=lambda row: (row.dataset, row.metric))


def _compared(row: DatasetDifference) -> str:
    return f"{short_name(row.label)} \u2212 {short_name(row.baseline)}"


def delta_section(ev: Evaluation) -> Section:
    """Return what the extension changed on benchmarks, short ones such as MMLU above all."""
    section = Section("short_context", "Benchmarks before and after", "delta", "Before and after")
    rows = dataset_differences(ev)
    if not rows:
        return section
    section.intro = (
        "Change of the score in percentage points with its 95% interval, on the questions that both models "
        "answered. An interval that holds zero does not show a change."
    )
    section.parts["chart"] = forest_chart(rows)
    section.parts["table"] = _delta_table(rows)
    section.parts["subtasks"] = [_subtask_table(row) for row in rows if len(row.subtasks) > 1]
    return section


def _delta_table(rows: Sequence[DatasetDifference]) -> Table:
    return Table(
        "Change on benchmarks",
        [
            "data set",
            "metric",
            "compared",
            "before",
            "after",
            "change, points",
            "95% interval",
            "pairs",
            "prompt tokens",
        ],
        [
            [
                row.dataset,
                Cell(row.metric or MISSING, "left"),
                Cell(_compared(row), "left"),
                *_difference_cells(row.difference),
                Cell(f"{row.tokens:,}" if row.tokens else MISSING, "num", "median"),
            ]
            for row in rows
        ],
    )


def _subtask_table(row: DatasetDifference) -> Table:
    name = f"{row.dataset}, {_compared(row)}, by subtask"
    return Table(
        name,
        ["subtask", "before", "after", "change, points", "95% interval", "pairs"],
        [[subtask, *_difference_cells(part)] for subtask, part in row.subtasks.items()],
    )


def _difference_cells(change: Difference) -> list[Cell]:
    interval = MISSING
    if change.interval:
        interval = f"{points(change.interval[0])} to {points(change.interval[1])}"
    return [
        Cell(f"{change.before * 100:.1f}", "num"),
        Cell(f"{change.after * 100:.1f}", "num"),
        Cell(points(change.value), "num strong"),
        Cell(interval, "num"),
        Cell(f"{change.pairs:,}" if change.pairs else "unpaired", "num"),
    ]


def forest_chart(rows: Sequence[DatasetDifference]) -> Chart:
    """Return the changes with their intervals around zero."""
    labels = list(dict.fromkeys(row.label for row in rows))
    several = len(labels) > 1 or len({row.baseline for row in rows}) > 1
    lines = [
        ForestRow(
            f"{row.dataset}, {short_name(row.label)}" if several else row.dataset,
            line_index(row.label, 1 + labels.index(row.label)),
            row.difference.value,
            row.difference.interval,
            f"{row.dataset}, {_compared(row)}: {points(row.difference.value)} points",
        )
        for row in rows
    ]
    forest = Forest("Change on benchmarks in percentage points, with 95 percent intervals", lines)
    return Chart(
        title="Change in percentage points",
        wide=Markup(forest.draw(WIDE)),
        narrow=Markup(forest.draw(NARROW)),
    )
