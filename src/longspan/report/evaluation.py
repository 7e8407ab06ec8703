"""All evaluations of a report, grouped by task and label: what the evaluation sections draw from."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from longspan.report.charts import Mark
from longspan.report.comparison import differing, listed, same_questions, tasks_of
from longspan.report.layouts import Layout
from longspan.report.load import RecordFile
from longspan.report.tables import Difference, Grid, Tables, by_group, difference, tabulate
from longspan.report.view import file_order, order_of, role_of, short_name

MOST_MARKS = 3


class DatasetDifference(NamedTuple):
    """What changed on one benchmark between a label and what it is compared with."""

    dataset: str
    metric: str
    label: str
    baseline: str
    difference: Difference
    subtasks: Mapping[str, Difference]
    tokens: int | None
    """Median length of the prompts, where recorded."""
    differ: tuple[str, ...] = ()
    """What differs between the two evaluations beside the model."""


@dataclass
class Evaluation(Tables):
    """All evaluations of a report by task and label."""

    files: list[RecordFile] = field(default_factory=list)

    @classmethod
    def from_records(cls, records: Sequence[RecordFile]) -> Evaluation:
        """Group the samples of every record file."""
        return cls(**vars(tabulate(records)), files=list(records))

    @property
    def lead(self) -> Layout | None:
        """The task that the headline and the controls are about: the first with a map by length."""
        return next(
            (self.layouts[task] for task in self.maps if self.layouts[task].columns == "length"), None
        )

    @property
    def lead_grids(self) -> dict[str, Grid]:
        """Those of the lead task by label."""
        return self.grids[self.lead.task] if self.lead else {}

    @property
    def maps(self) -> list[str]:
        """Tasks whose rows are numbers, which are drawn as maps."""
        return [
            task
            for task, grids in self.grids.items()
            if self.layouts[task].rows and all(grid.numbered for grid in grids.values())
        ]

    @cached_property
    def labels(self) -> list[str]:
        """All labels in order; of several runs those of the first that was named stand first."""
        return list(dict.fromkeys(file.label for file in sorted(self.files, key=file_order)))

    def _in_order(self, among: Iterable[str]) -> list[str]:
        """Return some labels in order; what is no label, such as one with a number of distractors, stands last."""
        known = {label: place for place, label in enumerate(self.labels)}
        return sorted(among, key=lambda label: (known.get(label, len(known)), order_of(label)))

    @property
    def before(self) -> str | None:
        """Label of the model before its extension, of the first run that has one."""
        return first_with_role("before", self.labels)

    @property
    def after(self) -> str | None:
        """Label of the model after its extension, of the first run that has one."""
        return first_with_role("after", self.labels)

    @property
    def before_length(self) -> int | None:
        """Context length the model was trained for before the extension, in tokens."""
        return self.trained_length(self.before) if self.before else None

    @property
    def after_length(self) -> int | None:
        """Context length the model was trained for by the extension, in tokens."""
        return self.trained_length(self.after) if self.after else None

    def baseline(self, label: str, among: Mapping[str, object]) -> str | None:
        """Return what a label is compared with: `before` of its own run, else of another, else the first label."""
        own = {file.run for file in self.files if file.label == label}
        candidates = [other for other in self._in_order(among) if other != label]
        same_run = [o for o in candidates if own & {f.run for f in self.files if f.label == o}]
        found = first_with_role("before", same_run) or first_with_role("before", candidates)
        if role_of(label) == "before":
            return None
        if found is not None:
            return found
        first = self._in_order(among)[0]
        return None if first == label else first

    def compared_with(self, label: str, among: Mapping[str, object]) -> str | None:
        """Return what a reader compares a label with: its baseline, and of a further `before` the first label."""
        first = self._in_order(among)[0]
        return self.baseline(label, among) or (None if label == first else first)

    def differing(self, task: str, one: str, two: str) -> tuple[str, ...]:
        """Return what differs between the evaluations of two labels in a task, beside the model."""
        found = set(differing(self.files, task, one, two))
        for each in tasks_of(task):
            found |= self._unshared_rows(each, one, two)
        return tuple(sorted(found))

    def _unshared_rows(self, task: str, one: str, two: str) -> set[str]:
        """Return the name of the rows of a common length that one of two labels lacks: they would not weigh alike."""
        grids = self.grids.get(task, {})
        if one not in grids or two not in grids or (axis := self.layouts[task].rows) is None:
            return set()
        common = {n for n in grids[one].columns if n in grids[two].columns}
        rows = ({(row, n) for row, n in grids[label].cells if n in common} for label in (one, two))
        shared = axis.removeprefix("num_").replace("_", " ").removesuffix("s") + "s"
        return {shared} if len({frozenset(each) for each in rows}) > 1 else set()

    def same_questions(self, task: str, one: str, two: str) -> bool:
        """Return whether two labels were asked the same, so that their answers are paired."""
        return same_questions(differing(self.files, task, one, two))

    def compared(self, among: Mapping[str, object]) -> list[tuple[str, str]]:
        """Return the pairs (from, to) of labels whose change a reader asks for.

        Each with its baseline, and labels of one role in several runs with that of the first run.
        """
        pairs = []
        ordered = self._in_order(among)
        for label in ordered:
            first = next(o for o in ordered if role_of(o) == role_of(label))
            if first != label and (role_of(label) != "before" or self._model(first) != self._model(label)):
                pairs.append((first, label))
            baseline = self.compared_with(label, among)
            if baseline is not None and role_of(baseline) != role_of(label):
                pairs.append((baseline, label))
        return pairs

    @cached_property
    def dataset_differences(self) -> list[DatasetDifference]:
        """The change of every benchmark of the harness that a label and its baseline both have."""
        by_label = self.scores.get("harness", {})
        rows = []
        for baseline, label in self.compared(by_label):
            samples, same = by_label[label], self.same_questions("harness", label, baseline)
            differ = self.differing("harness", label, baseline)
            old = by_group(by_label[baseline], "dataset", "metric")
            for key, group in by_group(samples, "dataset", "metric").items():
                whole = difference(old.get(key, []), group, same_questions=same)
                if whole is None:
                    continue
                parts, old_parts = by_group(group, "subtask"), by_group(old[key], "subtask")
                subtasks = {
                    name[0]: part
                    for name in parts
                    if name[0]
                    and name in old_parts
                    and (part := difference(old_parts[name], parts[name], same_questions=same))
                }
                tokens = [s.prompt_tokens for s in group if s.prompt_tokens]
                median = statistics.median_low(tokens) if tokens else None
                rows.append(
                    DatasetDifference(key[0], key[1], label, baseline, whole, subtasks, median, differ)
                )
        return sorted(rows, key=lambda row: (row.dataset, row.metric))

    def _model(self, label: str) -> str | None:
        return next((file.model for file in self.files if file.label == label), None)

    def not_comparable(self, task: str, among: Mapping[str, object]) -> str:
        """Return a sentence for the labels whose evaluation differs from that of what they are compared with."""
        pairs: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for label in among:
            baseline = self.compared_with(label, among)
            if baseline is not None and (names := self.differing(task, label, baseline)):
                pairs.setdefault((baseline, names), []).append(label)
        return " ".join(
            f"Not comparable: {listed([short_name(label) for label in labels])} and {short_name(baseline)} differ "
            f"in {listed(names)}."
            for (baseline, names), labels in pairs.items()
        )

    def rope(self, label: str) -> object:
        """Return the RoPE parameters a label was evaluated with, as recorded."""
        return next((f.header.get("model", {}).get("rope") for f in self.files if f.label == label), None)

    def trained_length(self, label: str) -> int | None:
        """Return the trained length of the model behind a label."""
        return next((f.trained_length for f in self.files if f.label == label and f.trained_length), None)

    def note(self, label: str) -> str | None:
        """Return the note that came with a label, from whichever task has one."""
        return next((f.note for f in self.files if f.label == label and f.note), None)

    def main_grids(self, task: str) -> dict[str, Grid]:
        """Return a task's grids for maps and curves: all that hold something but the controls."""
        return {
            label: grid
            for label, grid in self.grids.get(task, {}).items()
            if grid.columns and not label.startswith("ablate_")
        }


def first_with_role(role: str, labels: Iterable[str]) -> str | None:
    """Return the first label that is `role`, with or without the name of its run."""
    return next((label for label in labels if role_of(label) == role), None)


def trained_marks(ev: Evaluation, lengths: Sequence[int]) -> list[Mark]:
    """Return vertical lines at the trained lengths that lie inside the measured ones."""
    roles: dict[int, list[str]] = {}
    for label in ev.labels:
        length = ev.trained_length(label)
        if length and not label.startswith("ablate_") and min(lengths) <= length <= max(lengths):
            roles.setdefault(length, []).append(label)
    marks = []
    for length, labels in sorted(roles.items()):
        known = [role for role in ("before", "after") if first_with_role(role, labels)]
        if known == ["before", "after"] or set(labels) == set(ev.labels):
            text = "trained length"
        elif known:
            text = f"trained {known[0]}"
        else:
            text = f"trained, {short_name(labels[0])}" + (" ..." if len(labels) > 1 else "")
        marks.append(Mark(length, text))
    return marks if len(marks) <= MOST_MARKS else [Mark(mark.x, "") for mark in marks]
