"""Changes between models, question by question: in points, with intervals, and corrected for how many there are.

Two evaluations that asked the same are compared on the questions that both have a score for, texts that questions share
counted as one each (`core.intervals.paired_difference`). One interval in twenty leaves out zero by chance alone: of
several changes, those are strong whose p-value is below 5 % after Holm's correction for the number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from longspan.core.intervals import holm
from longspan.report.comparison import differ_text
from longspan.report.evaluation import Evaluation
from longspan.report.layouts import Layout, axis_words, value_text
from longspan.report.ppl_tables import PplChange
from longspan.report.samples import ScoredSample
from longspan.report.tables import Difference, Grid, all_columns, difference
from longspan.report.view import MISSING, Table, TableCell, points, short_name

Change = TypeVar("Change", Difference, PplChange)
CHANCE = 0.05
_IN_POINTS = "change in points [95% interval]"
_MOST_ACROSS = 8
"""Columns that changes with their intervals have room for; of more each is a row."""


class Pair(NamedTuple):
    """A change that is shown: from one label to another."""

    old: str
    new: str
    name: str
    same_questions: bool


def pairs_of(
    ev: Evaluation, task: str, among: Mapping[str, Any], base: Callable[[str], str] = str
) -> list[Pair]:
    """Return the changes between labels of a task; `base` is a label's name in the records."""
    found = []
    suffixes = dict.fromkeys(label[len(base(label)) :] for label in among)
    for suffix in suffixes:
        bases = {base(label): None for label in among if label[len(base(label)) :] == suffix}
        for old, new in ev.compared(bases):
            differ = ev.differing(task, new, old)
            name = f"{short_name(new + suffix)} \u2212 {short_name(old + suffix)}"
            name += f" ({differ_text(differ)})" if differ else ""
            found.append(Pair(old + suffix, new + suffix, name, ev.same_questions(task, new, old)))
    return found


def grid_changes(layout: Layout, grids: Mapping[str, Grid], pairs: Sequence[Pair]) -> Table | None:
    """Return the change of every pair at each column, and over all that both were asked; None without a pair."""
    places = all_columns(grids.values())
    cells = [
        [
            difference(
                grids[pair.old].at(place), grids[pair.new].at(place), same_questions=pair.same_questions
            )
            for place in places
        ]
        for pair in pairs
    ]
    whole = [
        difference(grids[pair.old].at(), grids[pair.new].at(), same_questions=pair.same_questions)
        for pair in pairs
    ]
    totals = corrected_cells([[change] for change in whole], change_cell)
    rows: list[list[str | TableCell]] = [
        [pair.name, *row, *total]
        for pair, row, total in zip(pairs, corrected_cells(cells, change_cell), totals)
    ]
    columns = ["change", *(value_text(layout.columns, place) for place in places), "all"]
    table = changes_table(f"{layout.heading}: {_IN_POINTS}", columns, rows)
    return table.turned(axis_words(layout.columns)) if table and len(places) > _MOST_ACROSS else table


def set_changes(
    title: str,
    by_label: Mapping[str, Mapping[tuple[str, ...], Sequence[ScoredSample]]],
    pairs: Sequence[Pair],
) -> Table | None:
    """Return the change of every pair on each set, a row a set."""
    names = list(dict.fromkeys(name for sets in by_label.values() for name in sets))
    cells = [
        [
            difference(
                by_label[pair.old].get(name, ()),
                by_label[pair.new].get(name, ()),
                same_questions=pair.same_questions,
            )
            for pair in pairs
        ]
        for name in names
    ]
    rows: list[list[str | TableCell]] = [
        [" / ".join(filter(None, name)), *row]
        for name, row in zip(names, corrected_cells(cells, change_cell))
    ]
    return changes_table(f"{title}: {_IN_POINTS}", ["set", *(pair.name for pair in pairs)], rows)


def changes_table(caption: str, columns: list[str], rows: list[list[str | TableCell]]) -> Table | None:
    """Return the rows that hold a change; None without one."""
    shown = [row for row in rows if any(isinstance(cell, TableCell) and cell.text != MISSING for cell in row)]
    return Table(caption, columns, shown) if shown else None


def changes_words() -> str:
    """Return the sentences that say how to read such a table."""
    return (
        "On the questions that both models answered, those on one text taken together; unpaired where they were asked "
        "other questions. Grey: the interval holds zero. Bold: the change stands (p < 5%) after Holm's correction for "
        "the number of changes in the table; those over all questions are counted apart."
    )


def corrected_p(changes: Sequence[Difference | PplChange | None]) -> list[float | None]:
    """Return the p-values of changes that are shown together, by Holm; None where one has none."""
    known = iter(holm([change.p for change in changes if change is not None and change.p is not None]))
    return [None if change is None or change.p is None else next(known) for change in changes]


def emphasis(change: Difference | PplChange, corrected: float | None) -> str:
    """Return the class of a change: strong where it stands, muted where its interval holds zero."""
    low, high = change.interval or (0.0, 0.0)
    if low <= 0 <= high:
        return "muted"
    return "strong" if corrected is not None and corrected < CHANCE else ""


def corrected_cells(
    changes: Sequence[Sequence[Change | None]], write: Callable[[Change | None, float | None], TableCell]
) -> list[list[TableCell]]:
    """Return the cells of changes that are shown together; `write` is given each with its corrected p-value."""
    values = iter(corrected_p([change for row in changes for change in row]))
    return [[write(change, next(values)) for change in row] for row in changes]


def bracketed(value: str, low: str, high: str) -> str:
    """Write a change with its interval, which stays on one line: `+3.1 [+0.2, +6.0]`."""
    return f"{value} [{low},\u00a0{high}]"


def _interval_text(change: Difference) -> str:
    return MISSING if change.interval is None else " to ".join(map(points, change.interval))


def interval_words(change: Difference) -> str:
    """Write the interval of a change, and whether it is over the same questions."""
    paired = f"{change.pairs:,} pairs" if change.pairs else "unpaired"
    return f"95% interval {_interval_text(change)}, {paired}"


def change_columns(change: Difference, corrected: float | None) -> list[TableCell]:
    """Return a change as three cells of a row: points, interval, pairs."""
    return [
        TableCell(points(change.value), f"num {emphasis(change, corrected)}"),
        TableCell(_interval_text(change), "num"),
        TableCell(f"{change.pairs:,}" if change.pairs else "unpaired", "num"),
    ]


def change_cell(change: Difference | None, corrected: float | None = None) -> TableCell:
    """Return one change; `corrected` is its p-value beside the other changes of its table."""
    if change is None or change.interval is None:
        return TableCell(MISSING, "num muted")
    low, high = change.interval
    words = [interval_words(change)]
    words += [f"on {change.texts:,} texts"] if change.texts else []
    words += [f"p = {change.p:.2g}, corrected {corrected:.2g}"] if corrected is not None else []
    text = bracketed(*map(points, (change.value, low, high))) + ("" if change.pairs else " unpaired")
    return TableCell(text, f"num change {emphasis(change, corrected)}", ", ".join(words))
