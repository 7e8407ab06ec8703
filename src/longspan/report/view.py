"""What the page template is given: plain tables and charts, already worded and drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup

from longspan.report.charts import LineChart, tally_size, tally_text
from longspan.report.layouts import by_value, length_text
from longspan.report.load import LoadedRun, RecordFile
from longspan.report.palette import DASHES, step_of
from longspan.report.tables import Tally

WIDE, HALF, NARROW = 1000.0, 486.0, 350.0
ARROW = "\u2192"
MISSING = "\u2013"
LONG = 40
"""Rows of a table; one that has more is folded away where something shorter says the like."""
LONG_NAME = 24
"""Characters; a longer name has a wide column of the table."""
_MOST_REASONS = 3

_NAMES = {
    "before": ("before", "Before training"),
    "after": ("after", "After training"),
    "theta_only": ("theta only", "Zero-shot: theta"),
    "ntk": ("NTK", "Zero-shot: NTK"),
    "pi": ("PI", "Zero-shot: PI"),
    "yarn": ("YaRN", "Zero-shot: YaRN"),
}
ZERO_SHOT = ("theta_only", "ntk", "pi", "yarn")
Clause = list[tuple[str, bool]]
"""A part of the sentence of results: text, and whether it is a number."""


@dataclass(frozen=True)
class TableCell:
    """One table cell: text, CSS class, and a longer text for hover; `key` names the samples that it opens."""

    text: str
    cls: str = ""
    title: str = ""
    key: str = ""


def cells(*texts: str, cls: str = "num") -> list[TableCell]:
    """Return cells of one kind: numbers, unless told."""
    return [TableCell(text, cls) for text in texts]


def tile(name: str, value: str, note: str) -> dict[str, str]:
    """Return a key figure."""
    return {"name": name, "value": value, "note": note}


@dataclass(frozen=True)
class Table:
    """A table; cells are plain text or TableCell, the first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | TableCell]]

    def turned(self, first: str) -> Table:
        """Return the table with its columns as rows; `first` stands over their names."""
        names = [row[0] if isinstance(row[0], str) else row[0].text for row in self.rows]
        rows = [[name, *cells] for name, *cells in zip(self.columns[1:], *(row[1:] for row in self.rows))]
        return replace(self, columns=[first, *names], rows=rows)


@dataclass(frozen=True)
class Chart:
    """A figure drawn for wide and narrow pages, with its legend and its numbers as a table."""

    title: str
    wide: Markup
    narrow: Markup
    legend: Sequence[tuple[str, str, str]] = ()
    note: str = ""
    table: Table | None = None
    half: bool = False


@dataclass
class Section:
    """A section of the page; `missing` holds one line for everything in it that was not measured.

    `view` names how the template shows `parts`; empty: they are one table. `nav` is the title where room is short.
    """

    id: str
    title: str
    view: str = ""
    nav: str = ""
    intro: str = ""
    parts: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def role_of(label: str) -> str:
    """Return a label without the name of its run or scorer: `after` of `after (second)`."""
    return label.partition(" (")[0]


def short_name(label: str) -> str:
    """Return a label's name for lines and table rows."""
    return _named(label, 0)


def long_name(label: str) -> str:
    """Return a label's name for headings."""
    return _named(label, 1)


def _named(label: str, form: int) -> str:
    role = role_of(label)
    if role in _NAMES:
        return _NAMES[role][form] + label[len(role) :]
    return label.removeprefix("ablate_").replace("_", " ") if role.startswith("ablate_") else label


def order_of(label: str) -> tuple[int, str]:
    """Sort key: before, after, zero-shot methods, then the rest by name, numbers by their value."""
    known, role = list(_NAMES), role_of(label)
    return (known.index(role) if role in known else len(known), f"{by_value(label)}\0{label}")


def file_order(file: RecordFile) -> tuple[int, str]:
    """Sort key: of the label without the name of its run, so that runs keep the order in which they were named."""
    return order_of(file.label.removesuffix(f" ({file.run})"))


def merge_records(runs: Sequence[LoadedRun]) -> list[RecordFile]:
    """Return all evaluations of all runs; labels that several runs have carry the names of their runs."""
    having = Counter(label for run in runs for label in {file.label for file in run.records})
    merged = [
        replace(
            file, run=run.name, label=f"{file.label} ({run.name})" if having[file.label] > 1 else file.label
        )
        for run in runs
        for file in run.records
    ]
    return sorted(merged, key=file_order)


def line_view(
    chart: LineChart, *, title: str, note: str = "", table: Table | None = None, half: bool = False
) -> Chart:
    """Draw a line chart for both page widths."""
    legend = [
        (
            s.name,
            f"{s.family}{s.color}",
            DASHES[s.color % len(DASHES)] if s.dashed and s.family == "c" else "",
        )
        for s in chart.series
        if not s.faint
    ]
    return Chart(
        title=title,
        wide=Markup(chart.draw(HALF if half else WIDE)),
        narrow=Markup(chart.draw(NARROW, names=False)),
        legend=legend if len(legend) > 1 else (),
        note=note,
        table=table,
        half=half,
    )


def percent(value: float | None) -> str:
    """Write a share as `97%`, missing as a dash."""
    return MISSING if value is None else f"{value:.0%}"


def decimal(value: float | None) -> str:
    """Write a perplexity or a loss with three or four digits, missing as a dash."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def points(value: float) -> str:
    """Write a difference of shares in percentage points: `+3.1` with a true minus sign."""
    return f"{100 * value:+.1f}".replace("-", "\u2212")


def change(before: float, after: float) -> str:
    """Write a relative change as `+3.1%` or `-1.6%` with a true minus sign."""
    return share(after / before - 1)


def share(value: float) -> str:
    """Write a relative change that is known as a share: `+3.1%`."""
    return f"{value:+.1%}".replace("-", "\u2212")


def heat_cell(tally: Tally | None, *, name: str = "", key: str = "") -> TableCell:
    """Return an accuracy cell coloured by the sequential scale; `name` says for hover what it is."""
    if tally is None or tally_size(tally) == 0:
        return TableCell(MISSING, "num absent-cell")
    hint = f"{name}: {tally_text(tally)}" if name else tally_text(tally)
    if tally.mean is None or tally.goodness is None:
        return TableCell("n/s", "num absent-cell", hint, key)
    step = step_of(tally.goodness)
    return TableCell(percent(tally.mean), f"num heat-cell h{step} i{step}", hint, key)


def interval_text(tally: Tally) -> str:
    """Write a 95 % interval as `86% to 99%`."""
    return interval_of(tally.interval)


def interval_of(interval: tuple[float, float] | None) -> str:
    """Write an interval of shares as `86% to 99%`."""
    return MISSING if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}"


def unscored_text(tally: Tally) -> str:
    """Write what has no score and why: `200 samples unscored (endpoint: failed)`."""
    if not tally.unscored:
        return ""
    named = tally.reasons.most_common(_MOST_REASONS)
    reasons = [reason if len(named) == 1 else f"{reason}: {count:,}" for reason, count in named]
    more = tally.unscored - sum(count for _, count in named)
    reasons += [f"other reasons: {more:,}"] if more else []
    return f"{tally.unscored:,} sample{'s' if tally.unscored > 1 else ''} unscored ({'; '.join(reasons)})"


def lost_text(tally: Tally) -> str:
    """Write what has no score, and what has an empty answer and so counts as wrong, each with its reasons."""
    empty = [f"{count:,} {reason}" for reason, count in tally.no_answer.most_common()]
    return ", ".join(filter(None, (*empty, unscored_text(tally))))


def tokens_text(length: int) -> str:
    """Write a length with its unit."""
    return f"{length_text(length)} tokens"
