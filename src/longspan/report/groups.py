"""The same training with several seeds: mean and spread of everything measured, and which changes are more than that.

Equal trainings differ: a change that is smaller than what another seed changes says nothing about the training. Runs
are one group where their config.yaml says the same but for seeds and places. A change is the mean over the runs, its
interval Student's t: over the changes of each run where both models are in all of the runs, and by Welch (1947) where
two groups are compared.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from longspan.core.errors import ArgumentError
from longspan.core.intervals import t_95
from longspan.report.csv_files import csv_text
from longspan.report.layouts import length_text
from longspan.report.load import LoadedRun
from longspan.report.view import order_of

_ASIDE = frozenset({"seed", "out", "name", "data_root", "title"})


class Quantity(NamedTuple):
    """Something that was measured of a model."""

    task: str
    measure: str
    """A length or another column, a data set, or "mean"."""
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
        return "inside training noise" if self.is_noise else "beyond training noise"

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 0."""
        return self.interval is not None and self.interval[0] <= 0 <= self.interval[1]


Results = Mapping[str, Mapping[str, Any]]
"""What `summarise` says of each run, by its name."""


class RunGroup(NamedTuple):
    """Runs of one training, and what was measured in each: values[label][quantity] = one number a run that has it."""

    name: str
    runs: list[LoadedRun]
    values: dict[str, dict[Quantity, dict[str, float]]]
    results: Results


def group_runs(runs: Sequence[LoadedRun], results: Results) -> list[RunGroup]:
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
        groups.append(
            RunGroup(_name([run.name for run in members]), members, _values(members, results), results)
        )
    names = [group.name for group in groups]
    return [
        group._replace(name=group.name if names.count(group.name) == 1 else f"{group.name} {number}")
        for number, group in enumerate(groups, 1)
    ]


def groups_csv(groups: Sequence[RunGroup]) -> dict[str, str]:
    """Return every value and every change as CSV; nothing without groups."""
    if not groups:
        return {}
    values = [
        [*place, quantity.task, quantity.measure, run, value]
        for place, quantity, found in all_values(groups)
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
    half = t_95(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
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
    half = t_95(freedom) * math.sqrt(variance)
    return Change(mean, (mean - half, mean + half))


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
    common = re.sub(r"\d+$", "", common).rstrip("-_ /")
    for ending in ("seed", "-s", "_s"):
        common = common.removesuffix(ending).rstrip("-_ /")
    return common or " + ".join(names)


def _values(runs: Sequence[LoadedRun], results: Results) -> dict[str, dict[Quantity, dict[str, float]]]:
    values: dict[str, dict[Quantity, dict[str, float]]] = {}
    for run in runs:
        for task, by_label in results[run.name].items():
            for label, summary in by_label.items():
                for quantity, value in _quantities(task, summary):
                    values.setdefault(label, {}).setdefault(quantity, {})[run.name] = value
    return values


def _quantities(task: str, summary: Mapping[str, Any]) -> list[tuple[Quantity, float]]:
    """Return what a summary says of a label: by length or column where it has such, else by data set."""
    found: list[tuple[Quantity, float | None]] = []
    if task == "ppl":
        found = [
            (Quantity(task, length_text(int(length)), False), value)
            for length, value in summary["by_length"].items()
        ]
    elif "mean" in summary:
        share = _is_share(summary)
        found = [(Quantity(task, "mean", share), summary["mean"])]
        for length, value in summary.get("by_length", {}).items():
            found.append((Quantity(task, length_text(int(length)), share), value))
        found += [
            (Quantity(task, name, share), value) for name, value in summary.get("by_column", {}).items()
        ]
    else:
        for name, inner in summary.items():
            if isinstance(inner, dict):
                measure = f"{name} distractors" if task == "needle_distractors" else name
                found.append((Quantity(task, measure, _is_share(inner)), inner.get("mean")))
    return [(quantity, value) for quantity, value in found if value is not None]


def _is_share(summary: Mapping[str, Any]) -> bool:
    """Whether scores are shares of 1: others have no interval."""
    return summary.get("confidence") is not None


def all_values(groups: Sequence[RunGroup]) -> list[tuple[tuple[str, str], Quantity, dict[str, float]]]:
    """Return everything that was measured with its place: (group, label)."""
    return [
        ((group.name, label), quantity, found)
        for group in groups
        for label in sorted(group.values, key=order_of)
        for quantity, found in group.values[label].items()
    ]
