"""What changed between the runs of a page: every setting that differs, as the runs recorded it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from longspan.report.charts import cut_names
from longspan.report.load import LoadedRun, RecordFile
from longspan.report.view import MISSING, Section, Table, TableCell

_CHARACTERS = 48
_ASIDE = ("created", "fingerprint", "kind", "label", "settings", "note")
"""What an evaluation's header says beside its settings; `settings` are those of the command, which `params` hold."""

Settings = Mapping[str, str]


def changes_section(runs: Sequence[LoadedRun]) -> Section:
    """Return one row for every setting in which the runs differ: of the recipe, the machine, the evaluations."""
    section = Section("changes", "What changed between these runs", "long tables", "What changed")
    if len(runs) < 2:
        return section
    recipes = {run.name: _recipe(run) for run in runs}
    machines = {run.name: _flat(run.env) if run.env else None for run in runs}
    tables = [
        _table("Recipe: settings that differ (config.yaml)", recipes),
        _table("Machine and versions that differ (env.json)", machines),
        _table("Evaluations: settings that differ, of those that several runs have", _evaluations(runs)),
    ]
    section.parts["tables"] = [table for table in tables if table is not None]
    section.intro = (
        "Every setting that is not the same in all of the runs, as they recorded it; a change of a result may come "
        "from any of them. A dash is a setting that a run does not have."
    )
    if not section.parts["tables"]:
        section.intro = "Nothing that the runs recorded of their settings differs."
    for file, known in (("config.yaml", recipes), ("env.json", machines)):
        without = [name for name, settings in known.items() if settings is None]
        if without:
            section.missing.append(f"What changed is not known of {', '.join(without)}: no {file}.")
    return section


def _recipe(run: LoadedRun) -> Settings | None:
    if run.settings is not None:
        return _flat(run.settings)
    return None if run.config is None else {"config.yaml": run.config}


def _evaluations(runs: Sequence[LoadedRun]) -> dict[str, Settings | None]:
    """Return the settings of the evaluations (task and label) that several runs have, each run's under its name."""
    found: dict[str, dict[tuple[str, str], RecordFile]] = {}
    for run in runs:
        for file in run.records:
            found.setdefault(run.name, {}).setdefault((file.task, file.label), file)
    shared = [
        key
        for key in {key for files in found.values() for key in files}
        if sum(key in f for f in found.values()) > 1
    ]
    settings: dict[str, dict[str, str]] = {name: {} for name in found}
    for task, label in sorted(shared):
        for name, files in found.items():
            if (task, label) in files:
                header = {k: v for k, v in files[task, label].header.items() if k not in _ASIDE}
                settings[name] |= {f"{task}, {label}: {key}": value for key, value in _flat(header).items()}
    return _joined(settings)


def _joined(settings: dict[str, dict[str, str]]) -> dict[str, Settings | None]:
    """Say once what differs alike in several evaluations: `(3 evaluations): model.rope.rope_theta`."""
    alike: dict[tuple[str, tuple[str | None, ...]], list[str]] = {}
    for name in dict.fromkeys(name for of_run in settings.values() for name in of_run):
        values = tuple(of_run.get(name) for of_run in settings.values())
        if len(set(values)) > 1:
            alike.setdefault((name.partition(": ")[2], values), []).append(name)
    joined: dict[str, dict[str, str]] = {run: {} for run in settings}
    for (key, values), names in alike.items():
        words = (
            names[0] if len(names) == 1 else f"{key} ({'; '.join(name.partition(': ')[0] for name in names)})"
        )
        for run, value in zip(settings, values):
            if value is not None:
                joined[run][words] = value
    return dict(joined)


def _table(title: str, settings: Mapping[str, Settings | None]) -> Table | None:
    """Return the rows that differ between the runs whose settings are known; None where all are alike."""
    known = {name: each for name, each in settings.items() if each is not None}
    rows: list[list[str | TableCell]] = []
    for name in dict.fromkeys(name for each in known.values() for name in each):
        values = [each.get(name) for each in known.values()]
        if len(set(values)) > 1:
            cut = cut_names([value for value in values if value is not None], _CHARACTERS)
            cells = [
                TableCell(MISSING, "left muted")
                if value is None
                else TableCell(cut[value], "left", "" if cut[value] == value else value)
                for value in values
            ]
            rows.append([name, *cells])
    return Table(title, ["setting", *known], rows) if rows and len(known) > 1 else None


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Return settings by dotted name; parts of a list go by their `name` where they have one, else by number."""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        value = {str(each.get("name", number)): each for number, each in enumerate(value, 1)}
    if isinstance(value, Mapping):
        rows: dict[str, str] = {}
        for key, item in value.items():
            rows |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return rows
    return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)}
