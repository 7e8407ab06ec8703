"""One table for each benchmark: its sets under their categories, the mean of each category, and that of all sets.

Sets weigh alike, as LongBench, InfiniteBench and MMLU publish their means. HELMET's is the mean over its categories
(Yen et al. 2024), which its records keep as data sets of their own. A set without a score is left out of a mean, which
says then how many sets it is over: it is not a zero, and such a mean is no published one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from longspan.report.layouts import by_value
from longspan.report.sample_data import SampleData
from longspan.report.samples import ScoredSample
from longspan.report.tables import Tally, tally_of
from longspan.report.view import LONG, MISSING, Table, TableCell, heat_cell, short_name

_HELMET = "helmet_"


class _Set(NamedTuple):
    """Where the samples of a set belong."""

    benchmark: str
    """Empty: the task, whose data sets are its sets."""
    category: str
    name: str


def _set_of(sample: ScoredSample) -> _Set:
    if sample.dataset.startswith(_HELMET):
        return _Set("HELMET", sample.dataset.removeprefix(_HELMET), sample.subtask or sample.dataset)
    if sample.subtask:
        return _Set(sample.dataset, sample.category, sample.subtask)
    return _Set("", sample.category, sample.dataset)


def benchmark_tables(
    title: str, task: str, by_label: Mapping[str, Sequence[ScoredSample]], data: SampleData
) -> list[Table]:
    """Return a table for each benchmark of several sets, a column for each label; cells open their samples."""
    placed: dict[str, list[_Placed]] = {}
    for label, samples in by_label.items():
        for sample in samples:
            if sample.dataset and sample.num_topics is None:
                where = _set_of(sample)
                placed.setdefault(where.benchmark, []).append((where, label, sample))
    found = []
    for (name, metric), sets in sorted(_by_metric(placed).items()):
        scores = [
            s.score for by in sets.values() for group in by.values() for s in group if s.score is not None
        ]
        if len(sets) > 1 and scores and all(0 <= score <= 1 for score in scores):
            words = ", ".join(filter(None, (name or title, metric)))
            found += _tables_of(words, task, sets, list(by_label), data)
    return found


_Placed = tuple[_Set, str, ScoredSample]
_Sets = dict[_Set, dict[str, list[ScoredSample]]]


def _by_metric(placed: Mapping[str, Sequence[_Placed]]) -> dict[tuple[str, str], _Sets]:
    """Part benchmarks of which a set has several metrics: a mean is over one number for each set."""
    parted: dict[tuple[str, str], _Sets] = {}
    for name, members in placed.items():
        several = len({(where, s.metric) for where, _, s in members}) > len(
            {where for where, _, _ in members}
        )
        for where, label, sample in members:
            sets = parted.setdefault((name, sample.metric if several else ""), {})
            sets.setdefault(where, {}).setdefault(label, []).append(sample)
    return parted


def _tables_of(
    name: str,
    task: str,
    sets: Mapping[_Set, Mapping[str, Sequence[ScoredSample]]],
    labels: Sequence[str],
    data: SampleData,
) -> list[Table]:
    """Return the table of one benchmark, before it one of its means where it is long."""
    key = data.add_map(task, name, [], [])
    tallies: dict[str, dict[_Set, Tally]] = {label: {} for label in labels}
    order = sorted(sets, key=lambda where: (by_value(where.category), by_value(where.name)))
    categories: dict[str, list[_Set]] = {}
    for where in order:
        categories.setdefault(where.category, []).append(where)
        for label, samples in sets[where].items():
            tallies[label][where] = tally_of(samples)
    rows: list[list[str | TableCell]] = []
    shown = [label for label in labels if tallies[label]]
    for category, members in categories.items():
        if len(categories) > 1:
            means = [_mean_cell(_means(tallies[label], members)) for label in shown]
            rows.append([TableCell(category or "no category", "reference"), *means])
        for where in members:
            place = order.index(where)
            cells = []
            for column, label in enumerate(shown):
                opens = data.add_cell(key, place, column, sets[where].get(label, ()))
                cell = heat_cell(
                    tallies[label].get(where), name=f"{where.name}, {short_name(label)}", key=opens
                )
                mean = tallies[label][where].mean if where in tallies[label] else None
                cells.append(cell if mean is None else replace(cell, text=f"{mean * 100:.1f}"))
            rows.append([TableCell(where.name, "member" if len(categories) > 1 else ""), *cells])
    whole = []
    for label in shown:
        of_sets = _means(tallies[label], order)
        of_categories = [_whole(_means(tallies[label], members)) for members in categories.values()]
        whole.append(_mean_cell(of_categories if name == "HELMET" else of_sets))
    over = f"{len(categories)} categories" if name == "HELMET" else f"{len(order)} sets"
    rows.append([TableCell(f"mean of {over}", "reference"), *whole])
    metrics = {s.metric for by in sets.values() for group in by.values() for s in group if s.metric}
    scored = f", {metrics.pop()}" if len(metrics) == 1 else ""
    columns = ["set", *map(short_name, shown)]
    table = Table(f"{name}: scores in percent{scored}", columns, rows)
    means_alone = [row for row in rows if isinstance(row[0], TableCell) and row[0].cls == "reference"]
    if len(rows) <= LONG or len(means_alone) == 1:
        return [table]
    return [Table(f"{name}: means of categories in percent{scored}", columns, means_alone), table]


def _means(tallies: Mapping[_Set, Tally], members: Sequence[_Set]) -> list[float | None]:
    return [tallies[where].mean if where in tallies else None for where in members]


def _mean(means: Sequence[float | None]) -> float | None:
    known = [mean for mean in means if mean is not None]
    return math.fsum(known) / len(known) if known else None


def _whole(means: Sequence[float | None]) -> float | None:
    return None if None in means else _mean(means)


def _mean_cell(means: Sequence[float | None]) -> TableCell:
    """Return a mean; where some have none it says over how many of them it is."""
    mean, known = _mean(means), sum(each is not None for each in means)
    if mean is None:
        return TableCell(MISSING, "num absent-cell", f"none of {len(means)} has a score")
    if known < len(means):
        return TableCell(
            f"{mean * 100:.1f} ({known} of {len(means)})", "num muted", f"{len(means) - known} have no score"
        )
    return TableCell(f"{mean * 100:.1f}", "num strong")
