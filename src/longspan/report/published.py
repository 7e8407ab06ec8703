"""Scores that others published, as grey lines beside what was measured here; never among our numbers.

`published.yaml` holds them, each with its source. They stand where a benchmark was asked as it is published: all of
its parts, at one of the published lengths, with the settings that change what is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import pydantic
import yaml

from longspan.core.config import Config
from longspan.report.charts import LineChart, Series, length_axis, share_axis
from longspan.report.evaluation import Evaluation
from longspan.report.layouts import length_text, value_text
from longspan.report.palette import line_index
from longspan.report.tables import Grid, ruler_mean
from longspan.report.view import MISSING, Chart, Table, TableCell, line_view, role_of, short_name

MOST_LINES = 6
"""Published lines in one drawing; all rows stand in its table."""


class PublishedScores(Config):
    """Rows of one source."""

    task: str
    """Name of the task in records."""
    what: str
    source: str
    where: dict[str, Any]
    """Recorded settings that have to be the same; what is not recorded is the published setting."""
    lengths: tuple[int, ...]
    rows: dict[str, tuple[float, ...]]
    """Percent by model, of the first of `lengths`."""

    @pydantic.model_validator(mode="after")
    def _rows_fit(self) -> PublishedScores:
        if any(not 0 < len(row) <= len(self.lengths) for row in self.rows.values()):
            raise ValueError(f"{self.source}: a row has a score for each length, or fewer")
        return self


@cache
def published_scores() -> tuple[PublishedScores, ...]:
    """Return all that is known."""
    text = files("longspan.report").joinpath("published.yaml").read_text("utf-8")
    return tuple(PublishedScores.from_dict(entry, where="published.yaml") for entry in yaml.safe_load(text))


def published_chart(ev: Evaluation, task: str, grids: Mapping[str, Grid]) -> Chart | None:
    """Return our means by length with published ones of the same; None where nothing is the same."""
    sources = [each for each in published_scores() if each.task == task]
    if not sources or next(iter(grids.values())).layout.columns != "length":
        return None
    own = {label: _means(task, grid) for label, grid in grids.items() if _same(ev, task, label, sources)}
    lengths = sorted({length for means in own.values() for length in means})
    shown = [(each, name, found) for each in sources for name, found in _rows_at(each, lengths)]
    own = {label: means for label, means in own.items() if means}
    if not own or not shown:
        return None
    # Those with most lengths; of each source the first ones, in turn.
    drawn = sorted(shown, key=lambda row: (-len(row[2]), list(row[0].rows).index(row[1])))[:MOST_LINES]
    series = [
        _line(name, 0, found, f"published in {each.source}", family="r", dashed=False)
        for each, name, found in drawn
    ]
    for position, (label, means) in enumerate(own.items()):
        color, strong = line_index(label, position), role_of(label) == "after"
        series.append(_line(short_name(label), color, means, "measured here", strong=strong))
    title = "Beside published scores"
    chart = LineChart(
        label=f"{title}: mean score by context length, published ones in grey",
        x=length_axis(lengths, "context length in tokens", air=1.06),
        y=share_axis("mean"),
        series=series,
    )
    note = (
        "Grey: published by others, not measured here. Lengths and the parts of the benchmark are the same; texts, "
        "prompts, samples and machines are theirs, and some points of difference are no difference."
    )
    return line_view(chart, title=title, note=note, table=_table(shown, lengths))


def _line(name: str, color: int, means: Mapping[int, float], whose: str, **style: Any) -> Series:
    points = sorted(means.items())
    tips = [f"{name}, {length_text(length)}: {mean:.1%}, {whose}" for length, mean in points]
    return Series(name, color, points, (), tips, **style)


def _means(task: str, grid: Grid) -> dict[int, float]:
    """Return the mean by length as it is published: of RULER over all 13 subtasks, or none."""
    of_length = (lambda n: ruler_mean(grid, n)) if task == "ruler" else (lambda n: grid.by_column[n].mean)
    means = {int(length): of_length(length) for length in grid.columns}
    return {length: mean for length, mean in means.items() if mean is not None}


def _same(ev: Evaluation, task: str, label: str, sources: Sequence[PublishedScores]) -> bool:
    """Whether all records of a label asked what was published."""
    recorded = [file.params for file in ev.files if file.task == task and file.label == label]
    wanted = {name: value for each in sources for name, value in each.where.items()}
    return bool(recorded) and all(
        params.get(name, value) == value for params in recorded for name, value in wanted.items()
    )


def _rows_at(each: PublishedScores, lengths: Sequence[int]) -> list[tuple[str, dict[int, float]]]:
    rows = [
        (name, {length: score / 100 for length, score in zip(each.lengths, scores) if length in lengths})
        for name, scores in each.rows.items()
    ]
    return [(name, found) for name, found in rows if found]


def _table(rows: Sequence[tuple[PublishedScores, str, dict[int, float]]], lengths: Sequence[int]) -> Table:
    places = [length for length in lengths if any(length in found for _, _, found in rows)]
    return Table(
        "Published by others, not measured here: percent by context length",
        ["", *(value_text("length", place) for place in places), "what", "source"],
        [
            [
                name,
                *(TableCell(f"{found[n] * 100:.1f}" if n in found else MISSING, "num") for n in places),
                TableCell(each.what, "left"),
                TableCell(each.source, "left"),
            ]
            for each, name, found in rows
        ],
    )
