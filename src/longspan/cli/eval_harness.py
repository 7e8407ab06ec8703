"""`longspan eval harness`: published benchmarks, as lm-eval defines them or as their authors released them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.counts import count_option
from longspan.cli.eval_options import Note, Out, RetryUnscored, average_name
from longspan.cli.model_options import AskedModel, ModelOptions, PromptOptions, form_of, opened, takes_model
from longspan.cli.output import Json, example, percent, print_json, print_table

if TYPE_CHECKING:
    from longspan.eval.prompts import PromptForm
    from longspan.eval.task import Task

EXAMPLE = example(
    "longspan eval harness --model model --tasks long-llm:mmlu --data-root long-llm --num-fewshot 1 --out run",
    "longspan eval harness --model model --tasks long-llm:longbench --subtasks qasper --data-root long-llm "
    "--input-length 400 --out run",
)
RELEASES = {
    "long-llm": ("longbench", "infbench", "longeval", "mmlu", "needle"),
    "fu-2024": ("infbench",),
    "helmet": ("recall", "rag", "icl", "longqa", "ruler"),
}
"""Collections that are read from their released files, and what is read of each."""

Run = Callable[[AskedModel, Path], dict[str, Any]]
"""Asks a model and writes records to a file."""


@takes_model
def harness(
    model: ModelOptions,
    prompts: PromptOptions,
    out: Out,
    tasks: Annotated[
        str,
        typer.Option(
            help="Of lm-eval: longbench, longbench2, infinitebench, babilong, mmlu, or one of their tasks. "
            "Released files: long-llm:longbench, :infbench, :longeval, :mmlu, :needle; fu-2024:infbench; "
            "helmet:recall, :rag, :icl, :longqa, :ruler. Several with commas."
        ),
    ],
    data_root: Annotated[
        Path | None,
        typer.Option(help="Folder of the data. Default: lm-eval fetches its own from the hub."),
    ] = None,
    subtasks: Annotated[
        str | None,
        typer.Option(
            help="Of released files, the sets or subjects, with commas; `all`. Default: as published."
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. Default: as published.")
    ] = None,
    limit: Annotated[int | None, count_option(help="The first so many questions of each set.", min=1)] = None,
    input_length: Annotated[
        str | None,
        typer.Option(help="Tokens of a prompt at most, such as 31500 or 128k; the rest is cut out of it."),
    ] = None,
    max_seq_lengths: Annotated[
        str | None, typer.Option(help="BABILong's length, such as 0k, 4k or 128k.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with further lm-eval task definitions.")
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="long-llm:longbench and :needle to the letter: what ends an answer; places and score.",
        ),
    ] = False,
    retry_unscored: RetryUnscored = False,
    note: Note = None,
    as_json: Json = False,
) -> None:
    """Ask the questions of published benchmarks; a long prompt is cut as the benchmark says.

    Records go to one file for each of the tasks. What is recorded is not asked again.
    """
    from longspan.core.units import parse_length

    if exact:
        _check_exact(tasks, remote=model.is_remote)
    form = form_of(model, prompts)
    common = {"form": form, "note": note, "retry_unscored": retry_unscored, "limit": limit}
    options = {
        "root": data_root,
        "subtasks": [] if subtasks is None else subtasks.split(","),
        "num_fewshot": num_fewshot,
        "exact": exact,
        "length": None if input_length is None else parse_length(input_length),
        "max_length": None if model.max_length is None else parse_length(model.max_length),
    }
    runs: dict[str, Run] = {}
    for name in tasks.split(","):
        if ":" in name:
            runs[name] = _released(name, options, common)
        else:
            runs[name] = _lm_eval(name, options, common, max_seq_lengths, include_path)
    with opened(model, prompts) as asked:
        summaries = {
            name: run(asked, asked.records(out, f"harness-{name.replace(':', '-')}"))
            for name, run in runs.items()
        }
    if as_json:
        print_json(summaries)
        return
    for name, summary in summaries.items():
        _print(name, summary)


def _check_exact(tasks: str, *, remote: bool) -> None:
    from longspan.core.errors import ArgumentError

    others = set(tasks.split(",")) - {"long-llm:longbench", "long-llm:needle"}
    if others:
        raise ArgumentError(
            "these tasks have no exact form",
            found=", ".join(sorted(others)),
            allowed="--exact with long-llm:longbench, long-llm:needle",
        )
    if remote and "long-llm:longbench" in tasks.split(","):
        raise ArgumentError(
            "a server cannot be told the token that ends an answer",
            fix="leave out --exact, or ask the model here",
        )


def _lm_eval(
    name: str,
    options: dict[str, Any],
    common: dict[str, Any],
    max_seq_lengths: str | None,
    include_path: Path | None,
) -> Run:
    from longspan.core.optional import require

    require("lm_eval", extra="harness", feature=f"the task {name} of lm-eval")
    # It remarks on every task that is loaded; what goes wrong is raised.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from longspan.eval.harness import run_harness
    from longspan.eval.harness_data import load_tasks

    loaded = load_tasks(
        [name],
        data_root=options["root"],
        num_fewshot=options["num_fewshot"],
        max_seq_lengths=max_seq_lengths,
        include_path=include_path,
    )
    chat = common["form"].params()["chat_template"] is not None
    return lambda asked, out: run_harness(
        loaded, asked.answerer, label=asked.label, out=out, chat=chat, max_length=options["length"], **common
    )


def _released(name: str, options: dict[str, Any], common: dict[str, Any]) -> Run:
    from longspan.core.errors import ArgumentError

    release, _, part = name.partition(":")
    if part not in RELEASES.get(release, ()):
        raise ArgumentError(
            "there is no such released set",
            found=repr(name),
            allowed=[f"{release}:{part}" for release, parts in RELEASES.items() for part in parts],
        )
    if options["root"] is None:
        raise ArgumentError(f"{name} is read from files", fix="name their folder with --data-root")
    if name == "long-llm:mmlu":
        from longspan.eval.released.mmlu import run_mmlu

        return lambda asked, out: run_mmlu(
            options["root"],
            asked.answerer,
            label=asked.label,
            out=out,
            num_fewshot=options["num_fewshot"] or 0,
            subjects=options["subtasks"],
            **common,
        )
    task = _task(release, part, options, common["form"], common["limit"])
    return lambda asked, out: _run(task, asked, out, common)


def _run(task: Task, asked: AskedModel, out: Path, common: dict[str, Any]) -> dict[str, Any]:
    from longspan.eval.runner import run_task

    if task.name != "harness":
        out = out.with_name(out.name.replace("harness-long-llm-", ""))
    return run_task(
        task,
        asked.answerer,
        tokenizer=asked.tokenizer,
        label=asked.label,
        out=out,
        note=common["note"],
        retry_unscored=common["retry_unscored"],
    )


def _task(release: str, part: str, options: dict[str, Any], form: PromptForm, limit: int | None) -> Task:
    from longspan.eval.released import helmet, longllm
    from longspan.eval.released.sets import ReleasedSet, ReleasedTask

    if part == "needle":
        return _needle(options, form)
    sets: list[ReleasedSet]
    if release == "helmet":
        length = options["length"] or helmet.LENGTHS[-1]
        sets = [
            *helmet.open_sets(
                options["root"], part, options["subtasks"], length=length, tokenizer=form.tokenizer
            )
        ]
    else:
        sets = [
            *longllm.open_sets(
                options["root"],
                release if release == "fu-2024" else part,
                options["subtasks"],
                max_length=options["length"],
                exact=options["exact"],
            )
        ]
    return ReleasedTask(sets, form, max_length=options["max_length"], limit=limit)


def _needle(options: dict[str, Any], form: PromptForm) -> Task:
    """Return the needle grid of the release's README on its essays."""
    from longspan.eval.held_out import read_held_out
    from longspan.eval.needle import NeedleTask
    from longspan.eval.needle_config import NeedleConfig
    from longspan.eval.needle_presets import preset_named

    essays = read_held_out([str(options["root"] / "needle" / "PaulGrahamEssays")])
    settings = NeedleConfig.from_dict(
        preset_named("longllm", exact=options["exact"]), where="the preset longllm"
    )
    return NeedleTask(settings, essays, form)


def _print(name: str, summary: dict[str, Any]) -> None:
    cut = summary.get("truncated", 0)
    title = f"{name}, {summary['label']}: {summary['scored']} of {summary['samples']} questions scored"
    title += f", {cut} cut to fit" if cut else ""
    title += "".join(f", {count} {reason}" for reason, count in summary["no_answer"].items())
    rows = [
        [row["dataset"], row["subtask"], row["scored"], row["samples"] - row["scored"], percent(row["mean"])]
        for row in summary.get("by_subtask", [])
    ]
    categories = summary.get("by_category") or {}
    rows += [[category, "", "", "", percent(mean)] for category, mean in categories.items()]
    for row in summary.get("averages") or []:
        rows.append([row["dataset"], average_name(row), "", "", percent(row["mean"])])
    if not rows:
        rows = [
            [
                summary["task"],
                "",
                summary["scored"],
                summary["samples"] - summary["scored"],
                percent(summary["mean"]),
            ]
        ]
    print_table(title, ("set", "part", "scored", "unscored", "mean"), rows)
    if by_topics := summary.get("by_topics"):
        print_table(
            f"{name}, {summary['label']}: by number of topics",
            ("topics", "scored", "unscored", "mean"),
            [
                [row["num_topics"], row["scored"], row["samples"] - row["scored"], percent(row["mean"])]
                for row in by_topics
            ],
        )
