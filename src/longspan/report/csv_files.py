"""The numbers of a report as CSV, one file for each kind."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from typing import Any

from longspan.report.effective import effective_note
from longspan.report.evaluation import Evaluation
from longspan.report.headline import effective_grids
from longspan.report.layouts import Layout
from longspan.report.ppl_tables import PplTable, bits_per_byte, perplexity
from longspan.report.tables import Grid, Tally, by_group, ruler_effective, tally_of

_CHANGE = re.compile(
    r"[+-]\d[\d.,]*%?( (to|\u00b1) [+-]?\d[\d.,]*%?| \[[^\]a-z|=@]+\])?( noise| unpaired| \(one seed\))?"
)
_COUNTS = ["mean", "low95", "high95", "scored", "unscored", "no_answer"]


def csv_tables(ev: Evaluation) -> dict[str, str]:
    """Return name -> CSV text of everything that was measured."""
    tables = {}
    for task, grids in ev.grids.items():
        layout = ev.layouts[task]
        tables[task] = grid_csv(grids, layout) if layout.rows else column_csv(grids, layout)
    if ev.distractors:
        tables["needle_distractors"] = _distractor_csv(ev)
    for task, by_label in ev.scores.items():
        rows = [
            [label, *key, *_counts(tally_of(samples))]
            for label, group in by_label.items()
            for key, samples in by_group(group, "dataset", "subtask", "metric").items()
        ]
        tables[task] = csv_text(["label", "dataset", "subtask", "metric", *_COUNTS], rows)
    tables["perplexity"] = ppl_csv(ev.ppl)
    tables["effective_context"] = _effective_csv(ev)
    tables["short_context"] = _delta_csv(ev)
    return {name: text for name, text in tables.items() if text.count("\n") > 1}


def grid_csv(grids: Mapping[str, Grid], layout: Layout) -> str:
    """Return one CSV line per label and cell; an empty mean is a cell without a scored sample."""
    rows = [
        [label, column, row, *_counts(grid.tally(row, column))]
        for label, grid in grids.items()
        for row in grid.rows
        for column in grid.columns
    ]
    return csv_text(["label", _name(layout.columns), _name(layout.rows), *_COUNTS], rows)


def column_csv(grids: Mapping[str, Grid], layout: Layout) -> str:
    """Return one CSV line per label and column, with the median length where lengths follow from the column."""
    medians = any(grid.layout.columns != layout.columns for grid in grids.values())
    rows = [
        [label, *([samples[0].row] if medians else []), column, *_counts(grid.by_column[column])]
        for label, grid in grids.items()
        for (_, column), samples in sorted(grid.cells.items())
    ]
    names = [_name(layout.columns), "median_length"] if medians else [_name(layout.columns)]
    return csv_text(["label", *names, *_COUNTS], rows)


def _name(axis: str | None) -> str:
    return (axis or "").removeprefix("num_")


def ppl_csv(tables: Mapping[str, PplTable]) -> str:
    """Return one CSV line per label and group (window length, position bucket or source)."""
    rows: list[list[Any]] = []
    for label, table in tables.items():
        groups = [("length", str(length), sums) for length, sums in table.by_length.items()]
        groups += [("position", f"{a}-{b}", sums) for (a, b), sums in table.by_position.items()]
        groups += [("source", source, sums) for source, sums in table.by_source.items()]
        rows += [
            [
                label,
                by,
                group,
                _blank(perplexity(sums)),
                sums.tokens,
                _blank(bits_per_byte(sums)),
                _blank(sums.bytes),
            ]
            for by, group, sums in groups
        ]
    return csv_text(["label", "by", "group", "perplexity", "tokens", "bits_per_byte", "bytes"], rows)


def _distractor_csv(ev: Evaluation) -> str:
    rows = [
        [label, count, length, depth, *_counts(grid.tally(depth, length))]
        for label, by_count in ev.distractors.items()
        for count, grid in by_count.items()
        for depth in grid.rows
        for length in grid.columns
    ]
    return csv_text(["label", "distractors", "length", "depth", *_COUNTS], rows)


def _effective_csv(ev: Evaluation) -> str:
    rows = [
        [
            label,
            task,
            _blank(ev.trained_length(label)),
            _blank(grid.effective.length),
            _blank(ruler_effective(grid) if task == "ruler" else None),
            grid.columns[-1] if grid.columns else "",
            effective_note(grid),
        ]
        for task, grids in effective_grids(ev).items()
        for label, grid in grids.items()
    ]
    columns = ["label", "task", "trained_length", "effective_context", "ruler_effective", "longest_measured"]
    return csv_text([*columns, "note"], rows)


def _delta_csv(ev: Evaluation) -> str:
    rows: list[list[Any]] = []
    for row in ev.dataset_differences:
        for subtask, change in {"": row.difference, **row.subtasks}.items():
            low, high = change.interval or ("", "")
            names = [row.dataset, subtask, row.metric, row.label, row.baseline]
            numbers = [change.before, change.after, change.value, low, high, change.pairs]
            rows.append([*names, *numbers, ", ".join(row.differ)])
    columns = ["dataset", "subtask", "metric", "label", "compared_with"]
    return csv_text([*columns, "before", "after", "change", "low95", "high95", "pairs", "differ"], rows)


def _counts(tally: Tally) -> list[Any]:
    low, high = tally.interval or ("", "")
    return [_blank(tally.mean), low, high, tally.scored, tally.unscored, tally.no_answer.total()]


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


def csv_text(columns: list[str], rows: list[list[Any]]) -> str:
    """Write a table as CSV that a spreadsheet opens without running anything of it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    # A text cell that starts like a formula would run when a spreadsheet opens the file.
    writer.writerows(
        [
            f"'{v}" if isinstance(v, str) and v[:1] in "=+-@" and v and not _CHANGE.fullmatch(v) else v
            for v in row
        ]
        for row in rows
    )
    return text.getvalue()
