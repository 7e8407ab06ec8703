"""The sections with tables of cells: tasks whose rows are words (RULER's subtasks), and those with columns alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.report.effective import effective_note, effective_text
from longspan.report.evaluation import Evaluation
from longspan.report.layouts import Layout, axis_words, length_text, value_text, value_words
from longspan.report.maps_view import accuracy_chart
from longspan.report.pairs_view import grid_changes, pairs_of
from longspan.report.published import published_chart
from longspan.report.sample_data import SampleData
from longspan.report.samples import Place
from longspan.report.tables import (
    ALL,
    RULER_SUBTASKS,
    RULER_THRESHOLD,
    Grid,
    Tally,
    all_columns,
    ruler_effective,
    ruler_mean,
    tally_of,
)
from longspan.report.view import MISSING, Section, Table, TableCell, heat_cell, lost_text, percent, short_name


def grid_section(ev: Evaluation, task: str, data: SampleData) -> Section:
    """Return a task's means by column of every model, its curve, and the cells behind them."""
    layout = ev.layouts[task]
    section = Section(task, layout.heading, "grids", layout.link)
    grids = {label: grid for label, grid in ev.grids[task].items() if grid.columns}
    if not grids:
        return section
    alone = layout.rows is None
    part = _by_column if alone else _by_row
    words = "Choose a cell to read its samples."
    if not alone:
        words = f"Each {axis_words(layout.rows)} weighs alike; no mean is given where one of them has no score. {words}"
    if task == "ruler":
        found = len({row for grid in grids.values() for row in grid.rows} & set(RULER_SUBTASKS))
        params = [file.params for file in ev.files if file.task == task and file.label in grids]
        releases = sorted({str(each["release"]) for each in params if "release" in each})
        by = f", by the generators of {' and '.join(releases)}" if releases else ""
        words = f"{found} of its 13 subtasks were measured{by}. {words}"
    scale = "" if layout.higher_is_better else "Lower is better."
    section.intro = " ".join(filter(None, (layout.title, words, scale, ev.not_comparable(task, grids))))
    section.parts["curve"] = accuracy_chart(ev, grids, what=layout.heading)
    section.parts["published"] = published_chart(ev, task, grids)
    section.parts |= {"wide": alone, "average": None, **part(layout, grids, data)}
    section.parts["changes"] = grid_changes(layout, grids, pairs_of(ev, task, grids))
    if not alone:
        section.missing += [
            f"{layout.heading}, {short_name(label)}, {value_words(layout.columns, place)}: "
            f"{len(grid.means_of_rows(place))} of {len(grid.rows)} {axis_words(layout.rows)}s are scored; their "
            "mean is not given."
            for label, grid in grids.items()
            for place in grid.columns
            if grid.mean_of_rows(place) is None
        ]
    return section


def _by_row(layout: Layout, grids: Mapping[str, Grid], data: SampleData) -> dict[str, Any]:
    columns = all_columns(grids.values())
    by_length = layout.columns == "length" and layout.higher_is_better
    published = layout.task == "ruler"
    caption = f"{layout.heading}: mean of the {axis_words(layout.rows)}s by {axis_words(layout.columns)}"
    if published:
        caption += (
            "; effective lengths by our bound, and as published "
            f"(mean of all 13 at least {RULER_THRESHOLD:.1%})"
        )
    head = ["", *(value_text(layout.columns, place) for place in columns)]
    rows: list[list[str | TableCell]] = []
    for label, grid in grids.items():
        cells = [_average_cell(grid, place) for place in columns]
        if by_length:
            cells.append(TableCell(effective_text(grid), "num strong", effective_note(grid)))
        if published:
            cells.append(_published_cell(grid))
        rows.append([short_name(label), *cells])
    head += ["effective"] * by_length + ["as published"] * published
    tables = [_cells_table(layout, label, grid, data) for label, grid in grids.items()]
    return {"average": Table(caption, head, rows), "tables": tables}


def _average_cell(grid: Grid, column: Place) -> TableCell:
    mean = grid.mean_of_rows(column)
    if mean is not None:
        cell = heat_cell(grid.by_column.get(column))
        return TableCell(f"{mean * 100:.1f}", cell.cls, cell.title)
    scored = (
        f"{len(grid.means_of_rows(column))} of {len(grid.rows)} {axis_words(grid.layout.rows)}s are scored"
    )
    return TableCell(MISSING, "num absent-cell", f"{scored} at this {axis_words(grid.layout.columns)}")


def _published_cell(grid: Grid) -> TableCell:
    """Return RULER's effective length, `< 4,096` where the shortest length is below its bound."""
    effective, shortest = ruler_effective(grid), grid.columns[0]
    if effective is not None:
        return TableCell(length_text(effective), "num")
    if ruler_mean(grid, shortest) is not None:
        return TableCell(f"< {length_text(shortest)}", "num")
    scored = sum(grid.tally(subtask, shortest).scored > 0 for subtask in RULER_SUBTASKS)
    return TableCell(
        MISSING, "num", f"needs all 13 subtasks at each length, {scored} are scored at the shortest"
    )


def _cells_table(layout: Layout, label: str, grid: Grid, data: SampleData) -> dict[str, Any]:
    """Return one label's rows by column; every cell opens its samples."""
    columns = [value_text(layout.columns, place) for place in grid.columns]
    key = data.add_grid(layout.task, short_name(label), grid, [str(row) for row in grid.rows], columns)
    rows: list[list[str | TableCell]] = []
    for place, row in enumerate(grid.rows):
        cells = []
        for number, column in enumerate(grid.columns):
            name = (
                f"{short_name(label)}, {value_words(layout.rows, row)}, {value_words(layout.columns, column)}"
            )
            opens = f"{key}/{place}/{number}" if (row, column) in grid.cells else ""
            cells.append(heat_cell(grid.tally(row, column), name=name, key=opens))
        rows.append([str(row), *cells, TableCell(percent(grid.by_row[row].mean), "num")])
    rows.append(
        [
            TableCell("mean", "reference"),
            *(_average_cell(grid, column) for column in grid.columns),
            TableCell(percent(grid.total.mean), "num strong"),
        ]
    )
    caption = f"{short_name(label)}: accuracy in percent"
    table = Table(caption, [axis_words(layout.rows), *columns, "all"], rows)
    return {"name": short_name(label), "aside": _aside(grid.total), "table": table}


def _by_column(layout: Layout, grids: Mapping[str, Grid], data: SampleData) -> dict[str, Any]:
    """Return one row a label. Where contexts have lengths of their own, columns are what these follow from."""
    own = {label: _columns_of(layout, grid) for label, grid in grids.items()}
    places = sorted({place for by_place in own.values() for place in by_place})
    by_words = axis_words(layout.columns)
    key = data.add_map(layout.task, layout.heading, [], [])
    rows: list[list[str | TableCell]] = []
    for row, (label, grid) in enumerate(grids.items()):
        cells = []
        for column, place in enumerate(places):
            at = own[label].get(place)
            where = value_words(layout.columns, place)
            if grid.layout.columns != layout.columns:
                where = f"{where}, {value_words('length', at or 0)}"
            opens = data.add_cell(key, row, column, grid.cells.get((ALL, at), ()) if at is not None else ())
            tally = None if at is None else grid.by_column.get(at)
            cells.append(heat_cell(tally, name=f"{short_name(label)}, {where}", key=opens))
        rows.append([short_name(label), *cells, TableCell(percent(grid.total.mean), "num strong")])
    heads = [_head(layout, place, grids, own) for place in places]
    medians = any(grid.layout.columns != layout.columns for grid in grids.values())
    caption = f"Accuracy by the {by_words}" + ("; lengths are medians" if medians else "")
    whole = tally_of(s for grid in grids.values() for group in grid.cells.values() for s in group)
    table = Table(caption, [layout.short, *heads, "all"], rows)
    return {"tables": [{"name": f"By {by_words}", "aside": _aside(whole), "table": table}]}


def _columns_of(layout: Layout, grid: Grid) -> dict[Any, Any]:
    """Return the grid's columns, by what the layout calls columns: the median length of each number of topics, say."""
    if grid.layout.columns == layout.columns:
        return {place: place for place in grid.columns}
    return {samples[0].row: place for (_, place), samples in grid.cells.items()}


def _head(layout: Layout, place: Any, grids: Mapping[str, Grid], own: Mapping[str, Mapping[Any, Any]]) -> str:
    text = value_text(layout.columns, place)
    lengths = [
        own[label][place]
        for label, grid in grids.items()
        if place in own[label] and grid.layout.columns != layout.columns
    ]
    if not lengths:
        return text
    shortest, longest = length_text(min(lengths)), length_text(max(lengths))
    return f"{text} ({shortest if shortest == longest else f'{shortest} to {longest}'} tokens)"


def _aside(tally: Tally) -> str:
    lost = lost_text(tally)
    thoughts = f", {tally.thought_tokens:,} tokens of thoughts" if tally.thought_tokens else ""
    return f"{tally.scored:,} scored{thoughts}" + (f", {lost}" if lost else "")
