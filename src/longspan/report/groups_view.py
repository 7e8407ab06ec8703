"""The same training with several seeds: mean and spread of everything measured, and which changes are more than that.

Equal trainings differ: a change that is smaller than what another seed changes says nothing about the training. Runs
are one group where their config.yaml says the same but for seeds and places. A change is the mean over the runs, its
interval Student's t: over the changes of each run where both models are in all of the runs, and by Welch (1947) where
two groups are compared.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from longspan.core.errors import ArgumentError
from longspan.report.csv_files import csv_text
from longspan.report.layouts import length_text
from longspan.report.load import LoadedRun
from longspan.report.summary import summarise
from longspan.report.view import (
    ARROW,
    MISSING,
    Section,
    Table,
    TableCell,
    decimal,
    order_of,
    percent,
    points,
    short_name,
)

_ASIDE = frozenset({"seed", "out", "name", "data_root", "title"})
# Student's t, 97.5 %, for 1, 2, ... 30 degrees of freedom.
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_Z_975 = 1.96


class Quantity(NamedTuple):
    """Something that was measured of a model."""

    task: str
    measure: str
    """A length, a data set, or "mean"."""
    is_share: bool


class Change(NamedTuple):
    """A change of means, with the interval that training noise gives it; None where one seed says nothing of it."""

    value: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """What may be said of it."""
        if self.interval is None:
            return "one seed: its noise is not known"
        return (
            "inside training noise" if self.interval[0] <= 0 <= self.interval[1] else "beyond training noise"
        )


class RunGroup(NamedTuple):
    """Runs of one training, and what was measured in each: values[label][quantity] = one number a run that has it."""

    name: str
    runs: list[LoadedRun]
    values: dict[str, dict[Quantity, dict[str, float]]]


def group_runs(runs: Sequence[LoadedRun]) -> list[RunGroup]:
    """Sort runs into groups of equal settings.

    Raises:
        ArgumentError: a run does not say how it was trained, or two runs of a group have the same seed.
    """
    by_settings: dict[str, list[tuple[LoadedRun, str]]] = {}
    for run in runs:
        settings = _settings(run)
        same = json.dumps(_without(settings), sort_keys=True, default=str)
        seed = str(settings.get("seed", (run.env or {}).get("seed")))
        by_settings.setdefault(same, []).append((run, seed))
    groups = []
    for of_runs in by_settings.values():
        members, seeds = [run for run, _ in of_runs], [seed for _, seed in of_runs]
        if len(set(seeds)) < len(seeds):
            raise ArgumentError(
                "two runs are one training with one seed",
                found=", ".join(f"{run.name}: seed {seed}" for run, seed in zip(members, seeds)),
                fix="name runs with different seeds",
            )
        groups.append(RunGroup(_name([run.name for run in members]), members, _values(members)))
    names = [group.name for group in groups]
    return [
        group._replace(name=group.name if names.count(group.name) == 1 else f"{group.name} {number}")
        for number, group in enumerate(groups, 1)
    ]


def groups_sections(groups: Sequence[RunGroup]) -> list[Section]:
    """Return mean and spread of every group, and the changes beside their noise: a table for each task."""
    spread = Section("seeds", "Across seeds", "tables")
    sizes = ", ".join(f"{group.name}: {len(group.runs)}" for group in groups)
    spread.intro = (
        f"Runs whose settings differ in the seed alone ({sizes}). Beside each mean stands the standard deviation "
        "between seeds: what another seed would change."
    )
    spread.parts["tables"] = _by_task(
        [
            (f"{group}, {short_name(label)}", quantity, _spread_cell(quantity, found))
            for (group, label), quantity, found in _all_values(groups)
        ],
        "mean and standard deviation over seeds",
    )
    noise = Section("noise", "Changes and training noise", "tables")
    noise.intro = (
        "Each change with the half width of the 95% interval that the spread between seeds gives it (Student's t; "
        "Welch's between groups). Where it says noise, the interval holds 0: another seed could have made the change."
    )
    changes = [
        (
            f"{short_name(what)}: {short_name(old)} {ARROW} {short_name(new)}",
            quantity,
            _change_cell(quantity, change),
        )
        for (what, old, new), quantity, change in all_changes(groups)
    ]
    if changes:
        noise.parts["tables"] = _by_task(changes, "change and 95% interval")
    return [spread, noise]


def _by_task(entries: Sequence[tuple[str, Quantity, TableCell]], caption: str) -> list[Table]:
    """Return a table for each task: a row for each name, a column for each measure."""
    tables: dict[str, dict[str, dict[str, TableCell]]] = {}
    for name, quantity, cell in entries:
        tables.setdefault(quantity.task, {}).setdefault(name, {})[quantity.measure] = cell
    found = []
    for task, rows in tables.items():
        measures = list(dict.fromkeys(measure for row in rows.values() for measure in row))
        missing = TableCell(MISSING, "num muted")
        lines: list[list[str | TableCell]] = [
            [name, *(row.get(measure, missing) for measure in measures)] for name, row in rows.items()
        ]
        found.append(Table(f"{task.replace('_', ' ')}: {caption}", ["model", *measures], lines))
    return found


def groups_csv(groups: Sequence[RunGroup]) -> dict[str, str]:
    """Return the tables of `groups_sections` as CSV; nothing without groups."""
    if not groups:
        return {}
    values = [
        [*place, quantity.task, quantity.measure, run, value]
        for place, quantity, found in _all_values(groups)
        for run, value in sorted(found.items())
    ]
    changes = [
        [
            *place,
            quantity.task,
            quantity.measure,
            change.value,
            *(change.interval or ("", "")),
            change.verdict,
        ]
        for place, quantity, change in all_changes(groups)
    ]
    return {
        "seeds": csv_text(["group", "label", "task", "measure", "run", "value"], values),
        "noise": csv_text(
            ["what", "from", "to", "task", "measure", "change", "low95", "high95", "verdict"], changes
        ),
    }


def all_changes(groups: Sequence[RunGroup]) -> list[tuple[tuple[str, str, str], Quantity, Change]]:
    """Return every change with its place: (group, label, label) from `before`, (label, group, group) between groups."""
    found = []
    for group in groups:
        labels = sorted(group.values, key=order_of)
        for label in labels[1:] if labels[:1] == ["before"] else []:
            old, new = group.values["before"], group.values[label]
            for quantity in new:
                if common := sorted(old.get(quantity, {}).keys() & new[quantity].keys()):
                    change = paired_change([new[quantity][run] - old[quantity][run] for run in common])
                    found.append(((group.name, "before", label), quantity, change))
    first = groups[0]
    for other in groups[1:]:
        for label in sorted(first.values.keys() & other.values.keys(), key=order_of):
            for quantity, values in other.values[label].items():
                if earlier := first.values[label].get(quantity):
                    change = welch_change(list(earlier.values()), list(values.values()))
                    found.append(((label, first.name, other.name), quantity, change))
    return found


def paired_change(differences: Sequence[float]) -> Change:
    """Return the mean of one difference a seed with its t interval."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Change(mean, None)
    half = _t(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return Change(mean, (mean - half, mean + half))


def welch_change(old: Sequence[float], new: Sequence[float]) -> Change:
    """Return the difference of two means with Welch's interval; of one seed the noise is not known."""
    mean = statistics.fmean(new) - statistics.fmean(old)
    if min(len(old), len(new)) < 2:
        return Change(mean, None)
    parts = [(statistics.variance(each) / len(each), len(each) - 1) for each in (old, new)]
    variance = sum(part for part, _ in parts)
    # Without any spread the degrees of freedom are 0 / 0: those of the smaller group are the safe ones.
    freedom = min(len(old), len(new)) - 1.0
    if variance > 0:
        freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = _t(freedom) * math.sqrt(variance)
    return Change(mean, (mean - half, mean + half))


def _t(freedom: float) -> float:
    """Return the 97.5 % point of Student's t, between whole degrees of freedom linear in 1 / freedom: 0.5 % off."""
    low = min(math.floor(freedom), len(_T_975))
    below = _T_975[low - 1]
    above, inverse = (_T_975[low], 1 / (low + 1)) if low < len(_T_975) else (_Z_975, 0.0)
    return above + (below - above) * (1 / freedom - inverse) / (1 / low - inverse)


def _settings(run: LoadedRun) -> dict[str, Any]:
    """Return the settings of a run. Raises ArgumentError where it does not say them."""
    if run.settings is None:
        raise ArgumentError(
            f"the run {run.name} does not say how it was trained, so it belongs to no group",
            found=f"no settings in {run.path / 'config.yaml'}",
            fix="name run folders that training or the quickstart wrote, or leave out --group",
        )
    return run.settings


def _without(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without(each) for key, each in value.items() if key not in _ASIDE}
    return [_without(each) for each in value] if isinstance(value, list) else value


def _name(names: Sequence[str]) -> str:
    """Return what the names of runs have in common, without what counts them; else all of them."""
    if len(names) == 1:
        return names[0]
    common = names[0]
    for name in names[1:]:
        while not name.startswith(common):
            common = common[:-1]
    common = common.rstrip("-_ 0123456789/")
    for ending in ("seed", "-s", "_s"):
        common = common.removesuffix(ending).rstrip("-_ /")
    return common or " + ".join(names)


def _values(runs: Sequence[LoadedRun]) -> dict[str, dict[Quantity, dict[str, float]]]:
    values: dict[str, dict[Quantity, dict[str, float]]] = {}
    for run in runs:
        for task, by_label in summarise(run).items():
            for label, summary in by_label.items():
                for quantity, value in _quantities(task, summary):
                    values.setdefault(label, {}).setdefault(quantity, {})[run.name] = value
    return values


def _quantities(task: str, summary: dict[str, Any]) -> list[tuple[Quantity, float]]:
    """Return what a summary says of a label: by length where it has lengths, else by data set."""
    found: list[tuple[Quantity, float | None]] = []
    if task == "ppl":
        found = [
            (Quantity(task, length_text(int(length)), False), value)
            for length, value in summary["by_length"].items()
        ]
    elif "mean" in summary:
        found = [(Quantity(task, "mean", True), summary["mean"])]
        for length, value in summary.get("by_length", {}).items():
            found.append((Quantity(task, length_text(int(length)), True), value))
    else:
        for name, inner in summary.items():
            if isinstance(inner, dict):
                measure = f"{name} distractors" if task == "needle_distractors" else name
                found.append((Quantity(task, measure, True), inner.get("mean")))
    return [(quantity, value) for quantity, value in found if value is not None]


def _all_values(groups: Sequence[RunGroup]) -> list[tuple[tuple[str, str], Quantity, dict[str, float]]]:
    return [
        ((group.name, label), quantity, found)
        for group in groups
        for label in sorted(group.values, key=order_of)
        for quantity, found in group.values[label].items()
    ]


def _spread_cell(quantity: Quantity, found: Mapping[str, float]) -> TableCell:
    values = list(found.values())
    write = percent if quantity.is_share else decimal
    text = write(statistics.fmean(values))
    if len(values) > 1:
        spread = statistics.stdev(values)
        text += f" \u00b1 {100 * spread:.1f}" if quantity.is_share else f" \u00b1 {decimal(spread)}"
    hint = f"{len(values)} seed{'s' if len(values) > 1 else ''}, {write(min(values))} to {write(max(values))}"
    return TableCell(text, "num", hint)


def _change_cell(quantity: Quantity, change: Change) -> TableCell:
    text = points(change.value) if quantity.is_share else f"{change.value:+.3g}".replace("-", "\u2212")
    if change.interval is None:
        return TableCell(f"{text} (one seed)", "num muted", change.verdict)
    half = change.interval[1] - change.value
    text += f" \u00b1 {100 * half:.1f}" if quantity.is_share else f" \u00b1 {half:.2g}"
    inside = change.verdict.startswith("inside")
    return TableCell(
        text + (" noise" if inside else ""), "num muted" if inside else "num strong", change.verdict
    )
