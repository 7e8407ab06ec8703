"""The sections with heat maps: tasks whose samples lie on two axes, the rows a number such as a depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from longspan.report.charts import LineChart, Series, cut_name, heat_map, place_axis, share_axis
from longspan.report.evaluation import Evaluation, first_with_role, trained_marks
from longspan.report.layouts import Layout, axis_words, length_text, value_text, value_words
from longspan.report.pairs_view import grid_changes, pairs_of
from longspan.report.palette import line_index
from longspan.report.sample_data import SampleData
from longspan.report.tables import Grid, Tally, all_columns
from longspan.report.view import (
    HALF,
    NARROW,
    ZERO_SHOT,
    Chart,
    Section,
    Table,
    TableCell,
    heat_cell,
    interval_text,
    line_view,
    long_name,
    lost_text,
    percent,
    role_of,
    short_name,
    tokens_text,
    unscored_text,
)

ZERO_SHOT_WORDS = (
    "Zero-shot maps show the model before training with nothing but its RoPE changed: "
    "a larger theta, NTK-aware scaling (NTK), or position interpolation (PI)."
)
LARGE_MAPS = 6
_CELL_WORDS = "A cell shows {} in percent; choose a cell to read its samples."


def map_section(ev: Evaluation, task: str, data: SampleData) -> Section:
    """Return a task's maps, its curves by length, and add the samples behind every cell to `data`."""
    layout = ev.layouts[task]
    section = Section(task, layout.heading, "maps", layout.link)
    grids = _named_grids(ev, task)
    labels = [label for label in grids if not label.startswith("ablate_") and grids[label].columns]
    if not labels:
        return section
    right = layout.higher_is_better
    cells = _CELL_WORDS.format(
        "the share of correct answers" if right else "the mean score, lower is better,"
    )
    section.intro = " ".join(
        filter(None, (layout.title, cells, ev.not_comparable(task, ev.grids.get(task, grids))))
    )
    section.parts["lower"] = not layout.higher_is_better
    zero_shot = [label for label in labels if role_of(label) in ZERO_SHOT]
    main = [label for label in labels if label not in zero_shot] or labels
    large = _side_by_side(ev, main) if len(main) <= LARGE_MAPS else []
    small = [label for label in _side_by_side(ev, main) + zero_shot if label not in large]
    section.parts["large"] = [
        _map_view(ev, layout, label, grids, data, width=640 if len(large) == 1 else HALF) for label in large
    ]
    section.parts["small"] = [_map_view(ev, layout, label, grids, data, width=None) for label in small]
    section.parts["zero_shot"] = ZERO_SHOT_WORDS if any(label in small for label in zero_shot) else ""
    shown = first_with_role("after", labels) or main[0]
    by_length = layout.columns == "length"
    trained = ev.trained_length(_base(ev, shown)) if by_length else None
    section.parts["facts"] = _facts(grids, shown, labels, trained)
    section.parts["beyond"] = _beyond_note(grids[shown], trained)
    section.parts["curve"] = accuracy_chart(
        ev, {label: grids[label] for label in labels}, what=layout.heading
    )
    pairs = pairs_of(ev, task, {label: grids[label] for label in labels}, lambda label: _base(ev, label))
    section.parts["changes"] = grid_changes(layout, grids, pairs)
    if ev.lead == layout:
        if first_with_role("after", labels) and not first_with_role("before", labels):
            section.missing.append(f"{layout.capital} accuracy before training was not measured.")
        if first_with_role("before", labels) and not zero_shot:
            section.missing.append("No zero-shot method (theta only, NTK, PI) was measured.")
    return section


def _named_grids(ev: Evaluation, task: str) -> dict[str, Grid]:
    """Return a task's grids by label; with distractors one for each number of them."""
    if task != "needle_distractors":
        return ev.grids.get(task, {})
    counts = {count for by_count in ev.distractors.values() for count in by_count}
    if len(counts) == 1:
        return {label: grid for label, by in ev.distractors.items() for grid in by.values()}
    return {f"{label} ({n} others)": grid for label, by in ev.distractors.items() for n, grid in by.items()}


def _base(ev: Evaluation, label: str) -> str:
    """Return the label that stands in the records, without the number of distractors."""
    return label if label in ev.labels else label.rpartition(" (")[0]


def _side_by_side(ev: Evaluation, labels: Sequence[str]) -> list[str]:
    """Order labels by run, so that before and after of one run stand next to each other."""
    runs = list(dict.fromkeys(file.run for file in ev.files))

    def place(label: str) -> int:
        base = _base(ev, label)
        return min((runs.index(file.run) for file in ev.files if file.label == base), default=0)

    return sorted(labels, key=place)


def _map_view(
    ev: Evaluation,
    layout: Layout,
    label: str,
    grids: Mapping[str, Grid],
    data: SampleData,
    *,
    width: float | None,
) -> dict[str, Any]:
    """Draw one map, `width` pixels wide and again for narrow pages; small ones are drawn once."""
    table, base, task = grids[label], _base(ev, label), layout.task
    own, old = (ev.trained_length(base), ev.before_length) if layout.columns == "length" else (None, None)
    lines = []
    if width and old and own and old != own:
        lines.append((old, f"before: {length_text(old)}"))
    if own:
        lines.append((own, f"trained: {length_text(own)}"))
    name = long_name(label)
    columns = [value_text(layout.columns, place) for place in table.columns]
    rows = [value_text(layout.rows, place) for place in table.rows]
    key = data.add_grid(task, short_name(label), table, rows, columns)
    files = [file for file in ev.files if file.label == base and file.task == task]
    mean = [percent(table.total.mean), interval_text(table.total)] if table.total.scored else ["not measured"]
    return {
        "name": name,
        "mean": ", ".join(filter(None, (*mean, lost_text(table.total)))),
        "detail": _rope_text(ev.rope(base)),
        "scored_by": ", ".join(dict.fromkeys(filter(None, (file.scored_by for file in files)))),
        "svg": Markup(heat_map(name, table, width or 232, key=key, trained=lines, compact=not width)),
        "narrow": Markup(heat_map(name, table, NARROW, key=key, trained=lines, compact=True))
        if width
        else None,
        "table": Table(
            f"{layout.heading}, {name}",
            [axis_words(layout.rows), *columns],
            [
                [text, *(heat_cell(table.tally(row, column)) for column in table.columns)]
                for text, row in zip(rows, table.rows)
            ],
        ),
    }


def _rope_text(rope: Any) -> str:
    """Write RoPE parameters as `default, theta 100,000`."""
    words = rope_words(rope)
    return f"RoPE {words}" if words else ""


def rope_words(rope: Any) -> str:
    """Write RoPE parameters in words, empty where none were recorded."""
    if not isinstance(rope, dict):
        return ""
    words = [str(rope[name]) for name in ("rope_type", "type") if rope.get(name)][:1]
    for name, value in rope.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            words.append(f"{name.removeprefix('rope_').replace('_', ' ')} {value:,.6g}")
    return ", ".join(words)


def _facts(
    grids: Mapping[str, Grid], main: str, labels: Sequence[str], trained: int | None
) -> list[tuple[str, str]]:
    table = grids[main]
    layout = table.layout
    pick, weakest = (min, "Weakest cell") if layout.higher_is_better else (max, "Worst cell")
    facts = [
        ("Samples", f"{table.total.scored:,} scored, {table.samples_per_cell} in a cell"),
        (
            "All cells",
            f"{percent(table.total.mean)}, 95% interval {interval_text(table.total)}{_by_text(table.total)}: the "
            "mean over every scored sample of every length, as the command says it",
        ),
    ]
    inside = table.up_to(trained) if trained else Tally()
    if trained and inside.scored and inside.scored < table.total.scored:
        within = f"{percent(inside.mean)}, 95% interval {interval_text(inside)}, n = {inside.scored:,}"
        facts.append((f"Up to the trained {tokens_text(trained)}", within))
    known = [(t.mean, column, row) for (row, column), t in table.tallies.items() if t.mean is not None]
    if known:
        share, column, row = pick(known)
        where = f"{value_words(layout.columns, column)}, {value_words(layout.rows, row)}"
        facts.append((weakest, f"{percent(share)} at {where}"))
    unscored, empty = Tally(), Counter[str]()
    for label in labels:
        unscored.reasons += grids[label].total.reasons
        empty += grids[label].total.no_answer
    if empty:
        words = "; ".join(f"{reason}: {count:,}" for reason, count in empty.most_common())
        facts.append(("Empty answers", f"{words}; each counts as wrong"))
    facts.append(
        ("Not scored", f"{unscored_text(unscored)}; never counted as wrong" if unscored.unscored else "none")
    )
    if len(labels) > 1:
        shared = ("Samples", weakest, "Empty answers", "Not scored")
        whose = cut_name(short_name(main))
        facts = [(name if name in shared else f"{name}, {whose}", text) for name, text in facts]
    return facts


def _by_text(tally: Tally) -> str:
    """Write the interval that takes samples on one text together, where it is another."""
    low, high = tally.interval_by_cluster or (0.0, 0.0)
    apart = tally.interval_by_cluster is not None and tally.interval_by_cluster != tally.interval
    return f" ({low:.0%} to {high:.0%} with samples on one text taken together)" if apart else ""


def _beyond_note(table: Grid, trained: int | None) -> str:
    beyond = [length for length in table.columns if trained and length > trained]
    if not beyond or trained is None:
        return ""
    listed = ", ".join(f"{percent(table.by_column[n].mean)} at {length_text(n)}" for n in beyond)
    return f"Beyond the trained {tokens_text(trained)}: {listed}. The model never saw these positions in training."


def accuracy_chart(ev: Evaluation, grids: Mapping[str, Grid], *, what: str) -> Chart | None:
    """Return accuracy by column with 95 % intervals, one line per label; None where columns are words."""
    layout = next(iter(grids.values())).layout
    axis, score = layout.columns, "accuracy" if layout.higher_is_better else "score"
    places = all_columns(grids.values())
    x = place_axis(axis, places, air=1.06)
    if x is None:
        return None
    by = "context length" if axis == "length" else axis_words(axis)
    series = []
    for position, (label, grid) in enumerate(grids.items()):
        known = [(p, t, t.mean) for p in grid.columns if (t := grid.by_column[p]).mean is not None]
        tips = [
            f"{short_name(label)}, {value_words(axis, p)}: {percent(mean)}, {interval_text(t)}, n = {t.scored}"
            for p, t, mean in known
        ]
        points = [(float(p), mean) for p, _, mean in known]
        intervals = [t.interval for _, t, _ in known]
        color = line_index(label, position)
        strong = role_of(label) == "after"
        series.append(Series(short_name(label), color, points, intervals, tips, strong=strong))
    every = "a length" if axis == "length" else "a column"
    chart = LineChart(
        label=f"{what}: {score} by {by} with 95 percent intervals",
        x=x,
        y=share_axis(f"{score}, all samples of {every}"),
        series=series,
        marks=trained_marks(ev, places) if axis == "length" else (),
    )
    table = Table(
        f"{what}: {score} by {by}",
        ["", *(value_text(axis, p) for p in places), "mean", "95% interval"],
        [
            [
                short_name(label),
                *(heat_cell(grid.by_column.get(p)) for p in places),
                TableCell(percent(grid.total.mean), "num"),
                TableCell(interval_text(grid.total), "num"),
            ]
            for label, grid in grids.items()
        ],
    )
    note = (
        f"Whiskers: 95% intervals over all samples of {every}, taken as independent (Wilson's for right or "
        "wrong answers); lines are set a few pixels apart so that whiskers stay readable."
    )
    return line_view(chart, title=f"{score.capitalize()} by {by}", note=note, table=table)
