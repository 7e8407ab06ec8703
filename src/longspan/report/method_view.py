"""What is needed to do it again and what it took: provenance of every evaluation, recipes, machines, time, cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from longspan.core.units import format_count, format_seconds
from longspan.report.layouts import length_text
from longspan.report.load import LoadedRun, RecordFile
from longspan.report.maps_view import rope_words
from longspan.report.samples import is_number
from longspan.report.view import MISSING, Section, Table, TableCell, cells, short_name


def cost_section(records: Sequence[RecordFile]) -> Section:
    """Return seconds, tokens, rate and price of every evaluation that recorded them."""
    section = Section("cost", "Cost and time", nav="Cost")
    # Scoring again asks no model: what the answers took stands with the file they were made from.
    timed = [(file, _spent(file)) for file in records if not file.rescored]
    timed = [(file, spent) for file, spent in timed if any(value is not None for value in spent.values())]
    if not timed:
        return section
    section.intro = (
        "What each evaluation took, as recorded sample by sample. Samples that share a forward pass share its "
        "time, so the seconds add up to that of the model."
    )
    by_label: dict[str, list[tuple[RecordFile, Spent]]] = {}
    by_task: dict[str, list[tuple[RecordFile, Spent]]] = {}
    for file, spent in timed:
        by_label.setdefault(short_name(file.label), []).append((file, spent))
        by_task.setdefault(f"{file.task}, {short_name(file.label)}", []).append((file, spent))
    single = _cost_table("evaluation", by_task)
    many = len(timed) > _MOST_EVALUATIONS
    section.parts["table"] = _cost_table("model", by_label) if many else single
    section.parts["detail"] = single if many else None
    return section


Spent = dict[str, float | None]


def _cost_table(by: str, groups: Mapping[str, Sequence[tuple[RecordFile, Spent]]]) -> Table:
    """Return the sums of groups of evaluations and of them all."""
    timed = [each for group in groups.values() for each in group]
    priced = any(spent["cost"] is not None for _, spent in timed)

    def cells_of(group: Sequence[tuple[RecordFile, Spent]], cls: str = "num") -> list[TableCell]:
        whole = {name: _sum([spent[name] for _, spent in group]) for name in _SPENT}
        return _cost_cells(sum(len(file.samples) for file, _ in group), whole, priced, cls=cls)

    rows: list[list[str | TableCell]] = [[name, *cells_of(group)] for name, group in groups.items()]
    if len(groups) > 1:
        rows.append([TableCell("all", "reference"), *cells_of(timed, "num strong")])
    columns = [by, "samples", "time", "samples/s", "prompt tokens", "completion tokens", "tokens/s"]
    columns += ["API cost, USD"] if priced else []
    return Table(f"Cost and time by {by}", columns, rows)


_MOST_EVALUATIONS = 24
"""Rows of the table of costs; of more evaluations the models have a row each, and these are folded away."""
_SPENT = ("seconds", "prompt_tokens", "completion_tokens", "cost")


def _spent(file: RecordFile) -> Spent:
    """Return sums over the samples that recorded them, else what the footer says; None where neither does."""
    spent: Spent = {}
    for name in _SPENT:
        footer = file.footer.get(name)
        known = _sum([getattr(sample, name, None) for sample in file.samples])
        spent[name] = float(footer) if known is None and is_number(footer) else known  # type: ignore[arg-type]
    return spent


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _cost_cells(count: int, spent: Spent, priced: bool, *, cls: str = "num") -> list[TableCell]:
    seconds, prompt, completion = spent["seconds"], spent["prompt_tokens"], spent["completion_tokens"]
    tokens = (prompt or 0) + (completion or 0)
    cells = [
        f"{count:,}",
        MISSING if seconds is None else format_seconds(seconds),
        f"{count / seconds:,.3g}" if seconds else MISSING,
        _count_text(prompt),
        _count_text(completion),
        f"{tokens / seconds:,.0f}" if seconds and tokens else MISSING,
    ]
    if priced:
        cells.append(MISSING if spent["cost"] is None else f"{spent['cost']:,.4f}")
    return [TableCell(text, cls) for text in cells]


def _count_text(value: float | None) -> str:
    return MISSING if value is None else format_count(value)


def two_models(records: Sequence[RecordFile]) -> list[str]:
    """Return one line for every label that stands for different models in different tasks."""
    models: dict[str, dict[str, str]] = {}
    for file in records:
        if file.model:
            models.setdefault(file.label, {}).setdefault(file.model, file.task)
    return [
        f"{short_name(label)} is not one model: "
        + ", ".join(f"{task} {fingerprint[:16]}" for fingerprint, task in by_model.items())
        + "."
        for label, by_model in models.items()
        if len(by_model) > 1
    ]


_GRID_SETTINGS = frozenset(
    [
        "lengths",
        "depths",
        "samples",
        "seed",
        "documents",
        "note",
        "num_distractors",
        "counts",
        "limit",
        "subtasks",
    ]
)


def mixed_settings(records: Sequence[RecordFile]) -> list[str]:
    """Return one line for every task and label whose files differ in more than their grid and their texts."""
    first: dict[tuple[str, str], RecordFile] = {}
    lines = []
    for file in records:
        other = first.setdefault((file.task, file.label), file)
        one, two = (f.params for f in (other, file))
        differing = [key for key in sorted({*one, *two} - _GRID_SETTINGS) if one.get(key) != two.get(key)]
        if differing:
            lines.append(
                f"{file.task}, {short_name(file.label)}, takes {other.path.name} and {file.path.name} together, "
                f"which differ in {', '.join(differing)}."
            )
    return lines


def method_section(runs: Sequence[LoadedRun], records: Sequence[RecordFile]) -> Section:
    """Return what is needed to run it again: timings, recipe, environment, evaluated models."""
    section = Section("method", "Recipe and environment", "method", "Method")
    section.parts["timings"] = [timing for run in runs if (timing := _timings(run, len(runs) > 1))]
    section.parts["configs"] = [(run.name, run.config) for run in runs if run.config]
    section.parts["environments"] = [(run.name, _flat(run.env)) for run in runs if run.env]
    section.parts["models"] = [_models_table(records), _evaluations_table(records)] if records else None
    settings: dict[str, list[str]] = {}
    for file in records:
        if file.params:
            text = json.dumps(file.params, indent=2, ensure_ascii=False)
            settings.setdefault(text, []).append(f"{file.task}, {short_name(file.label)}")
    section.parts["tasks"] = [("; ".join(names), text) for text, names in settings.items()]
    for part, source in (
        ("timings", "phases in events.jsonl"),
        ("configs", "config.yaml"),
        ("environments", "env.json"),
    ):
        if not section.parts[part]:
            section.missing.append(f"{part.capitalize()} were not recorded: no {source}.")
    return section


def _timings(run: LoadedRun, several: bool) -> dict[str, Any] | None:
    totals: dict[str, float] = {}
    for event in run.events:
        if event.get("event") == "phase" and isinstance(event.get("seconds"), (int, float)):
            phase = str(event.get("phase", ""))
            totals[phase] = totals.get(phase, 0.0) + event["seconds"]
    whole, longest = sum(totals.values()), max(totals.values(), default=0)
    if not longest:
        return None
    rows = [
        {
            "phase": phase,
            "seconds": format_seconds(value),
            "share": f"{value / whole:.0%}",
            "width": f"{100 * value / longest:.1f}",
        }
        for phase, value in totals.items()
    ]
    return {"name": run.name if several else "", "total": format_seconds(whole), "rows": rows}


def _models_table(records: Sequence[RecordFile]) -> Table:
    """Return every model with the RoPE it was evaluated with."""
    rows: dict[tuple[str | TableCell, ...], None] = {}
    for file in records:
        model = file.header.get("model", {})
        fingerprint, tokenizer = (
            str(digest or MISSING) for digest in (model.get("fingerprint"), file.header.get("tokenizer"))
        )
        row = (
            short_name(file.label),
            TableCell(file.run or MISSING, "left"),
            TableCell(str(model.get("path") or MISSING), "left wrap"),
            TableCell(fingerprint[:16], "mono", fingerprint),
            TableCell(rope_words(model.get("rope")) or MISSING, "left"),
            TableCell(length_text(file.trained_length) if file.trained_length else MISSING, "num"),
            TableCell(str(model.get("backend") or MISSING), "left wrap"),
            TableCell(tokenizer[:16], "mono", tokenizer),
        )
        rows.setdefault(row)
    return Table(
        "Models as evaluated",
        ["model", "run", "path", "fingerprint", "RoPE", "trained length", "backend", "tokenizer"],
        list(rows),
    )


def _evaluations_table(records: Sequence[RecordFile]) -> Table:
    """Return how every evaluation was scored and when."""
    rows: list[list[str | TableCell]] = []
    for file in records:
        versions = file.header.get("versions")
        words = [f"{k} {v}" for k, v in versions.items()] if isinstance(versions, dict) else []
        version = file.header.get("prompt_version", file.params.get("prompt_version"))
        rows.append(
            [
                f"{file.task}, {short_name(file.label)}",
                *cells(file.scorer or MISSING, file.mode or MISSING, cls="left"),
                *cells(MISSING if version is None else str(version), str(file.header.get("seed", MISSING))),
                *cells(f"{len(file.samples):,}", f"{sum(s.unscored is not None for s in file.samples):,}"),
                TableCell(", ".join(words) or MISSING, "left wrap"),
                *cells(str(file.header.get("created", MISSING)), cls="left"),
            ]
        )
    return Table(
        "Evaluations",
        [
            "evaluation",
            "scorer",
            "mode",
            "prompt version",
            "seed",
            "samples",
            "not scored",
            "versions",
            "created",
        ],
        rows,
    )


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested JSON to (dotted key, text) rows; lists are joined by spaces."""
    if isinstance(value, dict):
        return [
            row
            for key, item in value.items()
            for row in _flat(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list):
        return [(prefix, " ".join(str(item) for item in value))]
    return [(prefix, "not installed" if value is None else str(value))]
