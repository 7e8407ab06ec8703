"""Numbers from records: score grids with intervals, and differences between labels. Perplexity is in `ppl_tables`.

A sample without a score is counted as unscored and left out of every mean; it is never a zero. A cell without
a scored sample is None. A mean is over all scored samples of one label, of all lengths, as the command that evaluated
them says it; no other label has a part in it.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from longspan.core.errors import DataError
from longspan.core.intervals import (
    Effective,
    clustered_interval,
    effective_context,
    independent_difference,
    paired_difference,
    paired_p,
    score_interval,
)
from longspan.report.layouts import Layout, by_value, layout_of
from longspan.report.load import RecordFile
from longspan.report.ppl_tables import PplTable, ppl_table
from longspan.report.samples import Place, PplSample, ScoredSample

RULER_SUBTASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
"""The 13 subtasks in the order of Hsieh et al. (2024), table 3."""
_ORDERED = (*RULER_SUBTASKS, "short", "medium", "long")
RULER_THRESHOLD = 0.856
"""Mean over the 13 subtasks that a length must reach to be effective in RULER: that of Llama-2-7B at 4K."""


@dataclass
class Tally:
    """Scores of a group of samples."""

    higher_is_better: bool = True
    scores: list[float] = field(default_factory=list)
    clusters: list[str] = field(default_factory=list)
    """Of each score the text that it shares with others; empty: its own."""
    thought_tokens: int = 0
    """Tokens of all thoughts."""
    longest_thought: int = 0
    """Tokens of the longest."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Samples without a score, by reason."""
    no_answer: Counter[str] = field(default_factory=Counter)
    """Scored samples whose answer is empty, by why that is; they count as wrong."""

    def add(self, sample: ScoredSample) -> None:
        """Count one sample."""
        if sample.score is None:
            self.reasons[sample.unscored or "no score"] += 1
        else:
            self.scores.append(sample.score)
            self.clusters.append(sample.cluster)
            self.thought_tokens += sample.thought_tokens or 0
            self.longest_thought = max(self.longest_thought, sample.thought_tokens or 0)
            if sample.no_answer:
                self.no_answer[sample.no_answer] += 1

    @property
    def unscored(self) -> int:
        """Samples that have none."""
        return self.reasons.total()

    @property
    def correct(self) -> float:
        """Sum of the scores: the number of right answers where each is right or wrong."""
        return math.fsum(self.scores)

    @property
    def scored(self) -> int:
        """Samples that have a score."""
        return len(self.scores)

    @property
    def mean(self) -> float | None:
        """Mean score of the scored samples, None without any."""
        return self.correct / self.scored if self.scored else None

    @property
    def goodness(self) -> float | None:
        """Mean from worst (0) to best (1), for colours."""
        return self.mean if self.mean is None or self.higher_is_better else 1 - self.mean

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean; None without a scored sample or with scores that are no shares."""
        return score_interval(self.scores) if _shares(self.scores) else None

    @property
    def interval_by_cluster(self) -> tuple[float, float] | None:
        """95 % interval that takes samples on one text for dependent; None where no texts are known, or only one."""
        if not all(self.clusters) or not _shares(self.scores):
            return None
        return clustered_interval(self.scores, self.clusters)


ALL = "all"
"""The row of a task that has columns alone."""


@dataclass
class Grid:
    """One label's scores by the layout's rows (depth, subtask) and columns (length), and in all."""

    layout: Layout = field(default_factory=lambda: Layout("", columns="length"))
    columns: list[Any] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    cells: dict[tuple[Place, Place], list[ScoredSample]] = field(default_factory=dict)
    tallies: dict[tuple[Place, Place], Tally] = field(default_factory=dict)
    by_column: dict[Place, Tally] = field(default_factory=dict)
    by_row: dict[Place, Tally] = field(default_factory=dict)
    total: Tally = field(default_factory=Tally)

    @property
    def samples_per_cell(self) -> int:
        """Samples in the fullest cell, scored or not."""
        return max((len(samples) for samples in self.cells.values()), default=0)

    @property
    def by_length(self) -> bool:
        """Whether columns are context lengths, so that there is an effective one."""
        return self.layout.columns == "length"

    @property
    def numbered(self) -> bool:
        """Whether rows are numbers, which make a map; words make a table."""
        return not any(isinstance(row, str) for row in self.rows)

    @property
    def effective(self) -> Effective:
        """Longest length up to which the lower 95 % bound, pooled over rows, stays above the threshold."""
        return effective_context(
            {int(length): (tally.interval, tally.scored) for length, tally in self.by_column.items()}
        )

    def tally(self, row: Place, column: Place) -> Tally:
        """Return the tally of a cell, an empty one where nothing was measured."""
        return self.tallies.get((row, column)) or Tally(self.layout.higher_is_better)

    def at(self, column: Place | None = None) -> list[ScoredSample]:
        """Return the samples of a column, or of all."""
        return [s for (_, place), group in self.cells.items() if column in (None, place) for s in group]

    def means_of_rows(self, column: Place) -> list[float]:
        """The rows' means in a column, of those that have one."""
        means = (self.tally(row, column).mean for row in self.rows)
        return [mean for mean in means if mean is not None]

    def mean_of_rows(self, column: Place) -> float | None:
        """Mean over the rows' means in a column: every subtask weighs alike. None where one of them has none."""
        means = self.means_of_rows(column)
        return math.fsum(means) / len(means) if means and len(means) == len(self.rows) else None

    def up_to(self, length: int) -> Tally:
        """Return the tally of the lengths that are not longer."""
        return tally_of(s for (_, n), samples in self.cells.items() if int(n) <= length for s in samples)


def score_grid(samples: Iterable[ScoredSample], layout: Layout) -> Grid:
    """Group samples by (row, column)."""
    grid, higher = Grid(layout), layout.higher_is_better
    grid.total.higher_is_better = higher
    for sample in samples:
        grid.total.add(sample)
        row = ALL if layout.rows is None else sample.row
        if row is None or sample.column is None:
            continue  # it could not be composed: it has no cell, and is unscored in `total`
        cell = (row, sample.column)
        grid.cells.setdefault(cell, []).append(sample)
        grid.tallies.setdefault(cell, Tally(higher)).add(sample)
        grid.by_column.setdefault(sample.column, Tally(higher)).add(sample)
        grid.by_row.setdefault(row, Tally(higher)).add(sample)
    grid.columns = sorted(grid.by_column, key=_place_order)
    grid.rows = sorted(grid.by_row, key=_place_order)
    return grid


def all_columns(grids: Iterable[Grid]) -> list[Any]:
    """Return the columns that some of several grids have, in order."""
    return sorted({column for grid in grids for column in grid.columns}, key=_place_order)


def _place_order(place: Place) -> tuple[bool, float, str]:
    """Sort key: numbers, the words of `_ORDERED` as they stand there, other words (qa2 before qa10)."""
    if not isinstance(place, str):
        return (False, place, "")
    known = _ORDERED.index(place) if place in _ORDERED else len(_ORDERED)
    return (True, known, by_value(place))


def ruler_effective(grid: Grid) -> int | None:
    """Return RULER's own effective length: the longest up to which the mean of all 13 subtasks is >= 85.6 %.

    None: not even the shortest reaches it, or a subtask has no score there.
    """
    reached = None
    for length in grid.columns:
        mean = ruler_mean(grid, length)
        if mean is None or mean < RULER_THRESHOLD:
            break
        reached = length
    return reached


def ruler_mean(grid: Grid, length: int) -> float | None:
    """Return the mean of all 13 subtasks at a length; None where one of them has no score."""
    means = [grid.tally(subtask, length).mean for subtask in RULER_SUBTASKS]
    known = [mean for mean in means if mean is not None]
    return math.fsum(known) / len(known) if len(known) == len(means) else None


@dataclass(frozen=True)
class Difference:
    """How a label differs from another on the same questions, or on the same data set."""

    before: float
    after: float
    interval: tuple[float, float] | None
    pairs: int
    """Questions that both have a score for; 0: the intervals are of independent samples."""
    texts: int = 0
    """Texts that these questions are on, which the interval takes for what is independent; 0: each has its own."""
    p: float | None = None
    """Two-sided p-value of no difference; None where nothing is paired."""

    @property
    def value(self) -> float:
        """Mean after - mean before."""
        return self.after - self.before


def difference(
    before: Sequence[ScoredSample], after: Sequence[ScoredSample], *, same_questions: bool = True
) -> Difference | None:
    """Compare scores, paired by data set, `subtask` and `sample` where both sides have these.

    Paired samples alone are compared when there are any, none without `same_questions`. None when one side has no
    score.
    """
    old, new = (_by_question(side) if same_questions else {} for side in (before, after))
    common: list[_Question] = [key for key in old if key in new]
    if common:
        first, second = [old[key] for key in common], [new[key] for key in common]
        changes, texts = [b - a for a, b in zip(first, second)], _clusters_of(before, common)
        if not _shares([*first, *second]):  # the intervals are those of shares
            return Difference(
                math.fsum(first) / len(first), math.fsum(second) / len(second), None, len(common)
            )
        count = len(set(texts or ()))
        return Difference(
            math.fsum(first) / len(first),
            math.fsum(second) / len(second),
            paired_difference(changes, texts),
            len(common),
            count if count < len(common) else 0,
            paired_p(changes, texts),
        )
    tallies = tally_of(before), tally_of(after)
    first_mean, second_mean = tallies[0].mean, tallies[1].mean
    if first_mean is None or second_mean is None:
        return None
    interval = None
    if all(_shares(tally.scores) for tally in tallies):
        interval = independent_difference(*((tally.correct, tally.scored) for tally in tallies))
    return Difference(first_mean, second_mean, interval, 0)


def _shares(scores: Iterable[float]) -> bool:
    return all(0 <= score <= 1 for score in scores)


_Question = tuple[str, str, str, str, Place | None, Place | None]


def _question(sample: ScoredSample) -> _Question:
    return (sample.dataset, sample.subtask, sample.sample, sample.metric, sample.row, sample.column)


def _by_question(samples: Sequence[ScoredSample]) -> dict[_Question, float]:
    """Return scores by question, of those questions that stand once; a sample without a number cannot be paired."""
    keys = Counter(map(_question, samples))
    return {
        key: s.score for s in samples if s.score is not None and s.sample and keys[key := _question(s)] == 1
    }


def _clusters_of(samples: Sequence[ScoredSample], questions: Sequence[_Question]) -> list[str] | None:
    """Return the texts of some questions; None where they are not known."""
    known = {_question(sample): sample.cluster for sample in samples}
    found = [known[question] for question in questions]
    return found if all(found) else None


@dataclass
class Tables:
    """The tables of every label; files of one task and label are pooled."""

    layouts: dict[str, Layout] = field(default_factory=dict)
    """By task, in the order of a report."""
    grids: dict[str, dict[str, Grid]] = field(default_factory=dict)
    """By task and label, of tasks that have axes."""
    distractors: dict[str, dict[int, Grid]] = field(default_factory=dict)
    """By label and number of distractors."""
    scores: dict[str, dict[str, list[ScoredSample]]] = field(default_factory=dict)
    """By task and label, of tasks that have none."""
    ppl: dict[str, PplTable] = field(default_factory=dict)


def tabulate(records: Iterable[RecordFile]) -> Tables:
    """Pool the samples of every label; needles among other needles are kept apart from single ones.

    Raises:
        DataError: files of one task have different axes.
    """
    pooled: dict[str, dict[str, list[ScoredSample]]] = {}
    distractors: dict[str, dict[int, list[ScoredSample]]] = {}
    ppl: dict[str, list[PplSample]] = {}
    layouts: dict[str, Layout] = {}
    for file in records:
        layouts[file.task] = _agreed(layouts.get(file.task, file.layout), file)
        if file.task == "ppl":
            ppl.setdefault(file.label, []).extend(file.samples)
            continue
        for sample in file.samples:
            single = file.task != "needle_distractors" and (file.task != "needle" or not sample.distractors)
            if single:
                pooled.setdefault(file.task, {}).setdefault(file.label, []).append(sample)
            else:
                distractors.setdefault(file.label, {}).setdefault(sample.distractors, []).append(sample)
    if distractors and "needle_distractors" not in layouts:
        layouts["needle_distractors"] = layout_of({"task": "needle_distractors"}, (), "")
    layouts = dict(sorted(layouts.items(), key=lambda item: item[1].order))
    tables = Tables(layouts, ppl={label: ppl_table(samples) for label, samples in ppl.items()})
    for task in filter(pooled.__contains__, layouts):
        layout, by_label = layouts[task], pooled[task]
        if layout.columns is None:
            tables.scores[task] = by_label
            continue
        if layout.rows is None and layout.columns != "length" and _have_lengths(by_label.values()):
            layout = layout._replace(columns="length")
            by_label = {label: _at_median_length(samples) for label, samples in by_label.items()}
        tables.grids[task] = {label: score_grid(samples, layout) for label, samples in by_label.items()}
    tables.distractors = {
        label: {n: score_grid(by_count[n], layouts["needle_distractors"]) for n in sorted(by_count)}
        for label, by_count in distractors.items()
    }
    return tables


def _agreed(layout: Layout, file: RecordFile) -> Layout:
    """Return the layout of a task of several files: what is said outranks what was read off samples."""
    own = file.layout
    if (own.rows, own.columns) == (layout.rows, layout.columns):
        return layout
    if own.said and layout.said:
        raise DataError(
            f"{file.path} has other axes than a file of the same task",
            found=f"{own.rows} and {own.columns}, {layout.rows} and {layout.columns}",
            fix="evaluate again, or report them apart",
        )
    if own.said or layout.said:
        return own if own.said else layout
    if all(sample.score is None for sample in file.samples):
        return layout  # nothing was scored there, so nothing has a place
    return own if layout.columns is None else layout._replace(columns=None, rows=None)


def _have_lengths(groups: Iterable[Sequence[ScoredSample]]) -> bool:
    return all(sample.length is not None for group in groups for sample in group if sample.score is not None)


def _at_median_length(samples: Sequence[ScoredSample]) -> list[ScoredSample]:
    """Put all samples of one column (a number of topics, say) at one length, their median; `row` says the column."""
    lengths: dict[Place | None, list[int]] = defaultdict(list)
    for sample in samples:
        if sample.length is not None:
            lengths[sample.column].append(sample.length)
    median = {column: statistics.median_low(values) for column, values in lengths.items()}
    return [
        sample._replace(row=sample.column, column=median.get(sample.column), achieved_length=sample.length)
        for sample in samples
    ]


def by_group(samples: Iterable[ScoredSample], *fields: str) -> dict[tuple[str, ...], list[ScoredSample]]:
    """Group samples by the text of `fields` (dataset, subtask, metric, ...), in order of the names."""
    groups: dict[tuple[str, ...], list[ScoredSample]] = {}
    for sample in samples:
        groups.setdefault(tuple(str(getattr(sample, name)) for name in fields), []).append(sample)
    return dict(sorted(groups.items()))


def tally_of(samples: Iterable[ScoredSample]) -> Tally:
    """Count samples."""
    tally = Tally()
    for sample in samples:
        tally.add(sample)
    return tally
