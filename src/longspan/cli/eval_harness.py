"""`longspan eval harness`: published benchmarks, as lm-eval defines them or as their authors released them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from longspan.cli.eval_options import Note, Out, RetryUnscored, average_name
from longspan.cli.from_settings import Part, Used, from_settings
from longspan.cli.model_options import MODEL, PROMPTS
from longspan.cli.output import Json, example, percent, print_json, print_table

if TYPE_CHECKING:
    from longspan.eval.harness_config import HarnessConfig
    from longspan.eval.prompts import PromptConfig, PromptForm
    from longspan.eval.task import Task
    from longspan.infer.config import AnswererConfig
    from longspan.steps.opening import AskedModel

EXAMPLE = example(
    "longspan eval harness --model model --tasks long-llm:mmlu --data-root long-llm --num-fewshot 1 --out run",
    "longspan eval harness --model model --tasks long-llm:longbench --subtasks qasper --data-root long-llm "
    "--input-length 400 --out run",
)
RELEASES = {
    "long-llm": ("longbench", "infbench", "longeval", "mmlu", "needle"),
    "fu-2024": ("infbench",),
    "helmet": ("recall", "rag", "rerank", "cite", "icl", "longqa", "summ", "ruler"),
}
"""Collections that are read from their released files, and what is read of each."""

Run: TypeAlias = "Callable[[AskedModel, Path], dict[str, Any]]"
"""Asks a model and writes records to a file."""


class _Common(NamedTuple):
    """What every benchmark is run with."""

    form: PromptForm
    note: str | None
    used: Used
    retry_unscored: bool
    limit: int | None


@from_settings(settings=Part("longspan.eval.harness_config:HarnessConfig"), model=MODEL, prompts=PROMPTS)
def harness(
    settings: HarnessConfig,
    model: AnswererConfig,
    prompts: PromptConfig,
    used: Used,
    out: Out,
    retry_unscored: RetryUnscored = False,
    note: Note = None,
    as_json: Json = False,
) -> None:
    """Ask the questions of published benchmarks; a long prompt is cut as the benchmark says.

    Records go to one file for each of the tasks. What is recorded is not asked again.
    """
    from longspan.steps.opening import form_of, opened

    if settings.exact:
        _check_exact(settings.tasks, remote=model.is_remote)
    common = _Common(form_of(model, prompts), note, used, retry_unscored, settings.limit)
    runs: dict[str, Run] = {
        name: (_released if ":" in name else _lm_eval)(name, settings, common) for name in settings.tasks
    }
    with opened(model, prompts, tokenizer=common.form.tokenizer) as asked:
        summaries = {
            name: run(asked, asked.records(out, f"harness-{name.replace(':', '-')}"))
            for name, run in runs.items()
        }
    if as_json:
        print_json(summaries)
        return
    for name, summary in summaries.items():
        _print(name, summary)


def _check_exact(tasks: Sequence[str], *, remote: bool) -> None:
    from longspan.core.errors import ArgumentError

    others = set(tasks) - {"long-llm:longbench", "long-llm:needle"}
    if others:
        raise ArgumentError(
            "these tasks have no exact form",
            found=", ".join(sorted(others)),
            allowed="--exact with long-llm:longbench, long-llm:needle",
        )
    if remote and "long-llm:longbench" in tasks:
        raise ArgumentError(
            "a server cannot be told the token that ends an answer",
            fix="leave out --exact, or ask the model here",
        )


def _lm_eval(name: str, settings: HarnessConfig, common: _Common) -> Run:
    from longspan.core.optional import require

    require("lm_eval", extra="harness", feature=f"the task {name} of lm-eval")
    # It remarks on every task that is loaded; what goes wrong is raised.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from longspan.eval.harness import run_harness
    from longspan.eval.harness_data import load_tasks

    loaded = load_tasks(
        [name],
        data_root=settings.data_root,
        num_fewshot=settings.num_fewshot,
        max_seq_lengths=settings.max_seq_lengths,
        include_path=settings.include_path,
    )
    chat = common.form.params()["chat_template"] is not None
    length = settings.input_length
    return lambda asked, out: run_harness(
        loaded, asked.answerer, label=asked.label, out=out, chat=chat, max_length=length, **common._asdict()
    )


def _released(name: str, settings: HarnessConfig, common: _Common) -> Run:
    from longspan.core.errors import ArgumentError

    release, _, part = name.partition(":")
    if part not in RELEASES.get(release, ()):
        raise ArgumentError(
            "there is no such released set",
            found=repr(name),
            allowed=[f"{release}:{part}" for release, parts in RELEASES.items() for part in parts],
        )
    if settings.data_root is None:
        raise ArgumentError(f"{name} is read from files", fix="name their folder with --data-root")
    root = Path(settings.data_root)
    if name == "long-llm:mmlu":
        from longspan.eval.released.mmlu import run_mmlu

        return lambda asked, out: run_mmlu(
            root,
            asked.answerer,
            label=asked.label,
            out=out,
            num_fewshot=settings.num_fewshot or 0,
            subjects=list(settings.subtasks),
            **common._asdict(),
        )
    task = _task(release, part, root, settings, common.form)
    return lambda asked, out: _run(task, asked, out, common)


def _run(task: Task, asked: AskedModel, out: Path, common: _Common) -> dict[str, Any]:
    from longspan.eval.runner import run_task

    if task.name != "harness":
        out = out.with_name(out.name.replace("harness-long-llm-", ""))
    return run_task(
        task,
        asked.answerer,
        tokenizer=asked.tokenizer,
        label=asked.label,
        out=out,
        note=common.note,
        used=common.used,
        retry_unscored=common.retry_unscored,
    )


def _task(release: str, part: str, root: Path, settings: HarnessConfig, form: PromptForm) -> Task:
    from longspan.eval.released import helmet, longllm
    from longspan.eval.released.sets import ReleasedSet, ReleasedTask

    if part == "needle":
        return _needle(root, form, exact=settings.exact)
    names, sets = list(settings.subtasks), list[ReleasedSet]()
    if release == "helmet":
        length = settings.input_length or helmet.LENGTHS[-1]
        sets += helmet.open_sets(root, part, names, length=length, tokenizer=form.tokenizer)
    else:
        sets += longllm.open_sets(
            root,
            release if release == "fu-2024" else part,
            names,
            max_length=settings.input_length,
            exact=settings.exact,
        )
    return ReleasedTask(sets, form, max_length=settings.max_length, limit=settings.limit)


def _needle(root: Path, form: PromptForm, *, exact: bool) -> Task:
    """Return the needle grid of the release's README on its essays."""
    from longspan.eval.held_out import read_held_out
    from longspan.eval.needle import NeedleTask
    from longspan.eval.needle_config import NeedleConfig
    from longspan.eval.needle_presets import preset_named

    essays = read_held_out([str(root / "needle" / "PaulGrahamEssays")])
    settings = NeedleConfig.from_dict(preset_named("longllm", exact=exact), where="the preset longllm")
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
