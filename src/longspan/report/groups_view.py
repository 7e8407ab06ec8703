"""Groups of seeds on the page: the result in a sentence, curves, and for each task tables of means and of changes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from longspan.core.units import format_count
from longspan.report.charts import LineChart, Series, length_axis, share_axis
from longspan.report.evaluation import Evaluation
from longspan.report.groups import Change, Quantity, RunGroup, all_changes, all_values, paired_change
from longspan.report.headline import extension
from longspan.report.layouts import by_value, length_text
from longspan.report.palette import LINES, line_index
from longspan.report.view import (
    ARROW,
    MISSING,
    Chart,
    Clause,
    Section,
    Table,
    TableCell,
    decimal,
    line_view,
    order_of,
    percent,
    points,
    short_name,
    tile,
)

_PLUS_MINUS = "\u00b1\u00a0"
_MOST_ACROSS = 8
"""Measures that have a column each; of more each has a row."""
_MOST_CLAIMS = 2
"""Quantities of the sentence; the tiles have the others."""


def groups_sections(ev: Evaluation, groups: Sequence[RunGroup]) -> list[Section]:
    """Return mean and spread of every group, and the changes beside their noise: a table for each task."""
    several = len(groups) > 1
    sizes = ", ".join(f"{group.name} ({len(group.runs)})" for group in groups)
    spread = Section("seeds", "Across seeds", "charts and tables")
    spread.intro = (
        f"Runs whose settings differ in the seed alone are one group: {sizes}. Beside each mean stands the standard "
        "deviation between seeds, in points where the mean is in percent: what another seed would change."
    )
    means = [
        (
            f"{group}, {short_name(label)}" if several else short_name(label),
            quantity,
            _spread_cell(quantity, found),
        )
        for (group, label), quantity, found in all_values(groups)
    ]
    tables = _by_task(ev, "model", means, "mean \u00b1 standard deviation over seeds")
    charts = {task: chart for task in tables if (chart := _chart(ev, task, groups)) is not None}
    spread.parts["tasks"] = [(charts.get(task), table) for task, table in tables.items()]
    noise = Section("noise", "Changes and training noise", "charts and tables")
    noise.intro = (
        "Each change \u00b1 half the width of the 95% interval that the spread between seeds gives it: Student's t "
        "over the changes of the seeds, Welch's between groups. Bold: beyond training noise. Grey, with the "
        "word noise: inside training noise; the interval holds 0, and another seed alone could have made the change. "
        "What other questions would change is not in these intervals but in those of the sections below."
    )
    changes = [
        (
            (f"{short_name(what)}: " if several else "") + f"{short_name(old)} {ARROW} {short_name(new)}",
            quantity,
            _change_cell(quantity, change),
        )
        for (what, old, new), quantity, change in all_changes(groups)
    ]
    if changes:
        words = "change{} \u00b1 half of its 95% interval"
        noise.parts["tasks"] = [(None, table) for table in _by_task(ev, "change", changes, words).values()]
    return [spread, noise]


def _by_task(
    ev: Evaluation, first: str, entries: Sequence[tuple[str, Quantity, TableCell]], words: str
) -> dict[str, Table]:
    """Return a table for each task: a row for each name, a column for each measure; turned where these are many."""
    tables: dict[str, dict[str, dict[str, TableCell]]] = {}
    shares: dict[str, bool] = {}
    for name, quantity, cell in entries:
        tables.setdefault(quantity.task, {}).setdefault(name, {})[quantity.measure] = cell
        shares[quantity.task] = quantity.is_share and shares.get(quantity.task, True)
    found = {}
    for task, rows in tables.items():
        measures = list(dict.fromkeys(measure for row in rows.values() for measure in row))
        missing = TableCell(MISSING, "num muted")
        lines: list[list[str | TableCell]] = [
            [name, *(row.get(measure, missing) for measure in measures)] for name, row in rows.items()
        ]
        caption = f"{ev.layouts[task].heading}: {words.format(' in points' if shares[task] else '')}"
        table = Table(caption, [first, *(measure.replace("/", " / ") for measure in measures)], lines)
        found[task] = table.turned("") if len(measures) > max(_MOST_ACROSS, len(rows)) else table
    return found


def _chart(ev: Evaluation, task: str, groups: Sequence[RunGroup]) -> Chart | None:
    """Return the means by length of everything but controls, whiskers from the lowest to the highest seed."""
    if not (grids := ev.grids.get(task)) or not all(grid.by_length for grid in grids.values()):
        return None
    lengths = sorted({int(length) for grid in grids.values() for length in grid.columns})
    series = []
    lines = [
        (group, label)
        for group in groups
        for label in sorted(group.values, key=order_of)
        if not label.startswith("ablate_")
    ]
    for position, (group, label) in enumerate(lines):
        values = {n: group.values[label].get(Quantity(task, length_text(n), True)) for n in lengths}
        known = {n: list(found.values()) for n, found in values.items() if found}
        name = f"{group.name}, {short_name(label)}" if len(groups) > 1 else short_name(label)
        series.append(
            Series(
                name,
                position % len(LINES) if len(groups) > 1 else line_index(label, position),
                [(float(n), statistics.fmean(found)) for n, found in known.items()],
                [(min(found), max(found)) for found in known.values()],
                [
                    f"{name}, {length_text(n)} tokens: {_seeds_words(found, percent)}"
                    for n, found in known.items()
                ],
                strong=label == "after",
            )
        )
    series = [each for each in series if each.points]
    if len(lengths) < 2 or not series:
        return None
    heading, word = ev.layouts[task].heading, "accuracy" if ev.layouts[task].higher_is_better else "score"
    chart = LineChart(
        label=f"{heading}: mean {word} over seeds by context length",
        x=length_axis(lengths, "context length in tokens", air=1.06),
        y=share_axis(f"{word}, mean over seeds"),
        series=series,
        height=280,
    )
    return line_view(chart, title=heading, note="Whiskers: from the lowest to the highest seed.")


def group_headline(
    ev: Evaluation, groups: Sequence[RunGroup], training: Mapping[str, float]
) -> tuple[Clause, list[dict[str, str]]] | None:
    """Return the result of the first group as a sentence and tiles, as `headline` does of one run.

    None where no run of it has models called before and after.
    """
    group = groups[0]
    old, new = group.values.get("before"), group.values.get("after")
    start, end = ev.before_length, ev.after_length
    if not old or not new or not start or not end:
        return None
    seeds = f"{len(group.runs)} seeds" if len(group.runs) > 1 else "one seed"
    extended, length_tile = extension(start, end)
    sentence: Clause = [(f"{group.name}, {seeds}: ", False), *extended]
    tiles = [length_tile]
    if ev.lead is not None:
        before, after = (_effective_words(group, ev.lead.task, label) for label in ("before", "after"))
        tiles.append(tile(f"Effective context, {ev.lead.short}", after, f"before {before}; {seeds}"))
    for number, (quantity, name) in enumerate(_shown(ev, new, start, end)):
        earlier, later = old.get(quantity), new[quantity]
        if not earlier:
            continue
        write, unit = (percent, " points") if quantity.is_share else (decimal, "")
        first, second = (statistics.fmean(found.values()) for found in (earlier, later))
        if number < _MOST_CLAIMS:
            sentence += [
                (f"; {name} from ", False),
                (write(first), True),
                (" to ", False),
                (write(second), True),
            ]
        notes = [f"{_spread_text(quantity, later)} over {seeds}" if len(later) > 1 else seeds]
        notes += [f"before {_mean_text(quantity, earlier)}"]
        if common := sorted(earlier.keys() & later.keys()):
            change = paired_change([later[run] - earlier[run] for run in common])
            notes.append(f"change {_change_text(quantity, change)}{unit}, {change.verdict}")
        tiles.append(tile(name[0].upper() + name[1:], write(second), "; ".join(notes)))
    if training:
        tiles.append(
            tile("Training tokens", format_count(training["tokens"]), f"{training['steps']:,.0f} steps a run")
        )
    return [*sentence, (".", False)], tiles


def _effective_words(group: RunGroup, task: str, label: str) -> str:
    """Write the effective contexts of the runs: `2,048`, or `1,024 (1 of 3), 2,048 (2 of 3)`."""
    labels = [group.results[run.name].get(task, {}) for run in group.runs]
    texts = sorted((str(of[label]["effective_text"]) for of in labels if label in of), key=by_value)
    if len(set(texts)) < 2:
        return texts[0] if texts else MISSING
    return ", ".join(f"{text} ({texts.count(text)} of {len(texts)})" for text in dict.fromkeys(texts))


def _shown(
    ev: Evaluation, values: Mapping[Quantity, object], before: int, after: int
) -> list[tuple[Quantity, str]]:
    """Return what the headline says: the lead task at the trained length, perplexity at the old and the new length."""
    found = []
    if ev.lead is not None:
        columns = {int(n) for grid in ev.lead_grids.values() for n in grid.columns}
        at = max((n for n in columns if n <= after), default=min(columns, default=after))
        found = [
            (
                Quantity(ev.lead.task, length_text(at), True),
                f"{ev.lead.short} accuracy at {length_text(at)} tokens",
            )
        ]
    found += [
        (Quantity("ppl", length_text(n), False), f"perplexity at {length_text(n)} tokens")
        for n in (before, after)
    ]
    return [(quantity, name) for quantity, name in dict.fromkeys(found) if quantity in values]


def _mean_text(quantity: Quantity, found: Mapping[str, float]) -> str:
    mean = statistics.fmean(found.values())
    text = percent(mean) if quantity.is_share else decimal(mean)
    return f"{text}\u00a0{_spread_text(quantity, found)}" if len(found) > 1 else text


def _spread_text(quantity: Quantity, found: Mapping[str, float]) -> str:
    spread = statistics.stdev(found.values())
    return _PLUS_MINUS + (f"{100 * spread:.1f}" if quantity.is_share else decimal(spread))


def _seeds_words(values: Sequence[float], write: Callable[[float], str]) -> str:
    mean = write(statistics.fmean(values))
    if len(values) == 1:
        return f"{mean}, one seed"
    return f"{mean}, {len(values)} seeds, {write(min(values))} to {write(max(values))}"


def _spread_cell(quantity: Quantity, found: Mapping[str, float]) -> TableCell:
    words = _seeds_words(list(found.values()), percent if quantity.is_share else decimal)
    return TableCell(_mean_text(quantity, found), "num", words)


def _change_text(quantity: Quantity, change: Change) -> str:
    """Write a change with half of its interval: `+57.0 \u00b1 7.6` in points, `+0.41 \u00b1 0.09` of a perplexity."""

    def number(value: float) -> str:
        return points(value) if quantity.is_share else f"{value:+.2f}".replace("-", "\u2212")

    if change.interval is None:
        return number(change.value)
    half = number(change.interval[1] - change.value).lstrip("+")
    return f"{number(change.value)}\u00a0{_PLUS_MINUS}{half}"


def _change_cell(quantity: Quantity, change: Change) -> TableCell:
    text = _change_text(quantity, change)
    if change.interval is None:
        return TableCell(f"{text} (one seed)", "num change muted", change.verdict)
    if change.is_noise:
        return TableCell(f"{text} noise", "num change muted", change.verdict)
    return TableCell(text, "num change strong", change.verdict)
