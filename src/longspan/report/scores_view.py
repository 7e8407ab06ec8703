"""Tables of scores by data set: long question answering, benchmarks before and after, whatever has no axes."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from markupsafe import Markup

from longspan.report.benchmarks_view import benchmark_tables
from longspan.report.charts import Forest, ForestRow
from longspan.report.comparison import differ_text
from longspan.report.evaluation import DatasetDifference, Evaluation
from longspan.report.layouts import by_value
from longspan.report.pairs_view import change_columns, changes_words, corrected_p, pairs_of, set_changes
from longspan.report.palette import line_index
from longspan.report.sample_data import SampleData
from longspan.report.samples import ScoredSample
from longspan.report.tables import Difference, by_group, tally_of
from longspan.report.view import (
    LONG,
    MISSING,
    NARROW,
    WIDE,
    Chart,
    Section,
    Table,
    TableCell,
    cells,
    heat_cell,
    interval_text,
    lost_text,
    points,
    short_name,
    unscored_text,
)


def scores_section(ev: Evaluation, task: str, data: SampleData) -> Section:
    """Return one row for every data set (with its subtasks, if they are few) and label: n, score, interval."""
    title = ev.layouts[task].heading
    section = Section(re.sub(r"[^\w-]+", "_", task), title, "scores", ev.layouts[task].link)
    by_label = ev.scores[task]
    samples = [sample for group in by_label.values() for sample in group]
    if not samples:
        return section
    fields = ["dataset", "subtask", "metric"]
    if not any(sample.dataset or sample.subtask for sample in samples):
        fields += ["depth", "length"]
    elif any(sample.num_topics for sample in samples):
        fields.insert(2, "num_topics")
    section.intro = ev.not_comparable(task, by_label)
    benchmarks = benchmark_tables(title, task, by_label, data)
    pooled = len(by_group(samples, *fields)) > LONG
    caption = f"{title}: scores by data set and model"
    key = data.add_map(task, title, [], [])
    if pooled:
        section.parts["table"] = _scores_table(caption, by_label, ["dataset", "metric"], data, key)
        key = data.add_map(task, title, [], [])
    detail = _scores_table(caption, by_label, fields, data, key)
    section.parts["table" if not pooled else "detail"] = detail
    section.parts.setdefault("detail", None)
    section.parts["benchmarks"] = benchmarks
    section.parts["changes"] = None
    if task != "harness":  # its changes have a section of their own
        sets = {label: by_group(group, "dataset", "subtask", "metric") for label, group in by_label.items()}
        section.parts["changes"] = set_changes(title, sets, pairs_of(ev, task, by_label))
    return section


def _scores_table(
    caption: str,
    by_label: Mapping[str, Sequence[ScoredSample]],
    fields: Sequence[str],
    data: SampleData,
    key: str,
) -> Table:
    groups = {label: by_group(samples, *fields) for label, samples in by_label.items()}
    names = sorted(
        {name for group in groups.values() for name in group}, key=lambda key: list(map(by_value, key))
    )
    rows: list[list[str | TableCell]] = []
    previous = None
    for place, name in enumerate(names):
        for column, label in enumerate(groups):
            samples = groups[label].get(name)
            if samples is None:
                continue
            metric = name[fields.index("metric")]
            words = [
                f"{part} topics" if field == "num_topics" else part
                for field, part in zip(fields, name)
                if field != "metric" and part not in ("", "None")
            ]
            shown = " / ".join(words) or "all samples"
            opens = data.add_cell(key, place, column, samples)
            first = TableCell(shown) if shown != previous else TableCell("", title=shown)
            rows.append([first, *_score_cells(shown, label, metric, samples, opens)])
            previous = shown
    columns = [
        "data set",
        "model",
        "metric",
        "n",
        "score",
        "95% interval",
        "not scored",
        "empty",
        "prompt tokens",
    ]
    return Table(caption, columns, rows)


def _score_cells(
    shown: str, label: str, metric: str, samples: Sequence[ScoredSample], opens: str
) -> list[str | TableCell]:
    tally = tally_of(samples)
    shares = all(0 <= score <= 1 for score in tally.scores)
    if shares:
        score = heat_cell(tally, name=f"{shown}, {short_name(label)}", key=opens)
        if tally.mean is not None:
            score = replace(score, text=f"{tally.mean * 100:.1f}")
    else:
        text = f"{shown}, {short_name(label)}: mean {tally.mean:.4g} of {tally.scored}"
        score = TableCell(f"{tally.mean:.4g}", "num", text, opens)
    tokens = [tokens for s in samples if (tokens := s.prompt_tokens or s.length)]
    return [
        *cells(short_name(label), metric or MISSING, cls="left"),
        *cells(f"{tally.scored:,}"),
        score,
        TableCell(interval_text(tally), "num"),
        TableCell(f"{tally.unscored:,}" if tally.unscored else MISSING, "num", unscored_text(tally)),
        TableCell(f"{tally.no_answer.total():,}" if tally.no_answer else MISSING, "num", lost_text(tally)),
        TableCell(f"{statistics.median_low(tokens):,}" if tokens else MISSING, "num", "median"),
    ]


def _compared(row: DatasetDifference) -> str:
    names = f"{short_name(row.label)} \u2212 {short_name(row.baseline)}"
    return names + (f" ({differ_text(row.differ)})" if row.differ else "")


def delta_section(ev: Evaluation) -> Section:
    """Return what the extension changed on benchmarks, short ones such as MMLU above all."""
    section = Section("short_context", "Benchmarks before and after", "delta", "Before and after")
    rows = ev.dataset_differences
    if not rows:
        return section
    section.intro = f"Change of the score in percentage points with its 95% interval. {changes_words()}"
    section.intro = " ".join(
        filter(None, (section.intro, ev.not_comparable("harness", ev.scores["harness"])))
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
                TableCell(row.metric or MISSING, "left"),
                TableCell(_compared(row), "left"),
                *_difference_cells(row.difference, corrected),
                TableCell(f"{row.tokens:,}" if row.tokens else MISSING, "num", "median"),
            ]
            for row, corrected in zip(rows, corrected_p([row.difference for row in rows]))
        ],
    )


def _subtask_table(row: DatasetDifference) -> Table:
    name = f"{row.dataset}, {_compared(row)}, by subtask"
    return Table(
        name,
        ["subtask", "before", "after", "change, points", "95% interval", "pairs"],
        [
            [subtask, *_difference_cells(part, corrected)]
            for (subtask, part), corrected in zip(row.subtasks.items(), corrected_p([*row.subtasks.values()]))
        ],
    )


def _difference_cells(change: Difference, corrected: float | None) -> list[TableCell]:
    return [
        *cells(f"{change.before * 100:.1f}", f"{change.after * 100:.1f}"),
        *change_columns(change, corrected),
    ]


def row_names(rows: Sequence[DatasetDifference]) -> list[str]:
    """Return how changes are called in a drawing: the data set, and what is compared where there are several."""
    baselines: dict[str, set[str]] = {}
    for row in rows:
        baselines.setdefault(row.label, set()).add(row.baseline)
    if len(baselines) == 1 and len(next(iter(baselines.values()))) == 1:
        return [row.dataset for row in rows]
    return [
        f"{row.dataset}, {short_name(row.label)}"
        + (f" \u2212 {short_name(row.baseline)}" if len(baselines[row.label]) > 1 else "")
        for row in rows
    ]


def forest_chart(rows: Sequence[DatasetDifference]) -> Chart:
    """Return the changes with their intervals around zero."""
    labels = list(dict.fromkeys(row.label for row in rows))
    lines = [
        ForestRow(
            name,
            line_index(row.label, 1 + labels.index(row.label)),
            row.difference.value,
            row.difference.interval,
            f"{row.dataset}, {_compared(row)}: {points(row.difference.value)} points",
        )
        for name, row in zip(row_names(rows), rows)
    ]
    forest = Forest("Change on benchmarks in percentage points, with 95 percent intervals", lines)
    return Chart(
        title="Change in percentage points",
        wide=Markup(forest.draw(WIDE)),
        narrow=Markup(forest.draw(NARROW)),
    )
