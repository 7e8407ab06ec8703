"""`longspan eval NAME`: a command for each task of the registry, its options those of the task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.cli.eval_options import (
    DryRun,
    Note,
    Out,
    RetryUnscored,
    TooLongOption,
    UntilWidth,
    average_name,
    share_of,
    show_plan,
    title_of,
)
from longspan.cli.from_settings import FromSettings, Part, Used
from longspan.cli.model_options import MODEL, PROMPTS
from longspan.cli.output import Json, percent, print_json, print_table

if TYPE_CHECKING:
    from longspan.core.config import Config
    from longspan.eval.held_out import TaskDataConfig
    from longspan.eval.prompts import PromptConfig
    from longspan.eval.registry import TaskEntry
    from longspan.infer.config import AnswererConfig

DATA = "longspan.eval.held_out:TaskDataConfig"
DATA_FIELDS = ("paths", "text_field", "source_field", "questions", "strict", "cache")
_NAMES = {"paths": "--data", "questions": "--qa-data", "cache": "--sample-cache"}
_OLD: Mapping[str, Mapping[str, str]] = {"ruler": {"--haystack": "paths", "--cache": "cache"}}


def data_part(entry: TaskEntry) -> Part:
    """Return the options that name what a task reads."""
    without = [field for field in DATA_FIELDS if not entry.data or field not in entry.reads]
    help = {"paths": entry.data}
    return Part(DATA, without=without, names=_NAMES, help=help, old=_OLD.get(entry.name, {}))


def command_of(entry: TaskEntry) -> FromSettings:
    """Return the command that runs a task of the registry."""

    def evaluate(
        settings: Config,
        data: TaskDataConfig,
        model: AnswererConfig,
        prompts: PromptConfig,
        used: Used,
        out: Out,
        too_long: TooLongOption = "refuse",
        retry_unscored: RetryUnscored = False,
        until_width: UntilWidth = None,
        dry_run: DryRun = False,
        note: Note = None,
        as_json: Json = False,
    ) -> None:
        from longspan.steps.evaluate import evaluate_model, task_of
        from longspan.steps.opening import form_of

        if dry_run:
            show_plan(task_of(entry, settings, data, form_of(model, prompts)), as_json=as_json)
            return
        summary = evaluate_model(
            model,
            entry.name,
            out,
            settings,
            data=data,
            prompts=prompts,
            note=note,
            used=used,
            retry_unscored=retry_unscored,
            too_long=too_long,
            until_width=share_of(until_width, "--until-width"),
        )
        if as_json:
            print_json(summary)
        else:
            print_scores(summary)
            if thoughts := summary.get("thoughts"):
                print_table("thoughts, which are not scored", tuple(thoughts), [list(thoughts.values())])

    evaluate.__name__, evaluate.__doc__ = entry.name, entry.title
    settings = Part(entry.config)
    parts = {"settings": settings, "data": data_part(entry), "model": MODEL, "prompts": PROMPTS}
    return FromSettings(evaluate, parts)


def print_scores(summary: dict[str, Any]) -> None:
    """Print the means of a task: along its axes, or by data set."""
    from longspan.eval.records import read_records
    from longspan.eval.registry import entry_of
    from longspan.eval.summaries import mean_by

    entry, title = entry_of(summary["task"]), title_of(summary)
    samples = read_records(Path(summary["records"])).samples
    axes = None if entry is None else entry.axes
    if axes is None or axes.rows is None:
        name = "dataset" if axes is None else axes.columns
        found = mean_by(samples, name) if all(name in sample for sample in samples) else []
        rows = [
            [row[name], row["scored"], row["samples"] - row["scored"], percent(row["mean"])] for row in found
        ]
        rows += [[average_name(row), "", "", percent(row["mean"])] for row in summary.get("averages", [])]
        print_table(title, (name, "scored", "unscored", "mean"), rows)
        return
    cells = mean_by(samples, axes.rows, axes.columns)
    means = {(cell[axes.rows], cell[axes.columns]): percent(cell["mean"]) for cell in cells}
    columns = sorted({cell[axes.columns] for cell in cells})
    grid: list[list[object]] = [
        [f"{row:g}" if isinstance(row, float) else row, *(means.get((row, column)) for column in columns)]
        for row in dict.fromkeys(cell[axes.rows] for cell in cells)
    ]
    counts = mean_by(samples, axes.columns)
    # Some tasks have a mean of their own: RULER's is over subtasks.
    means_of = summary.get(f"by_{axes.columns}") or counts
    grid.append(["mean", *(percent(row["mean"]) for row in means_of)])
    grid.append(["95% interval", *(_interval(row["interval"]) for row in counts)])
    grid.append(["unscored", *(row["samples"] - row["scored"] for row in counts)])
    names = (column if isinstance(column, str) else f"{column:,}" for column in columns)
    print_table(title, (axes.rows, *names), grid)


def _interval(interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else f"{100 * interval[0]:.0f}-{100 * interval[1]:.0f}%"
