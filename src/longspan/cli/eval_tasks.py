"""`longspan eval passkey | topics | ruler | longqa | rescore`: retrieval that is generated, questions from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longspan.cli.counts import count_option
from longspan.cli.eval_options import (
    DryRun,
    Lengths,
    Note,
    Out,
    RetryUnscored,
    TooLongOption,
    average_name,
    show_plan,
    title_of,
)
from longspan.cli.model_options import ModelOptions, PromptOptions, form_of, opened, takes_model
from longspan.cli.output import Json, Seed, example, percent, print_json, print_table

if TYPE_CHECKING:
    from longspan.eval.task import Task

PASSKEY_EXAMPLE = example(
    "longspan eval passkey --model model --lengths 512,640 --depths 0,1 --samples 1 --out run"
)
TOPICS_EXAMPLE = example(
    "longspan eval topics --model model --counts 2,3 --samples 1 --out run",
    "longspan eval topics --model model --kind lines --counts 4 --samples 1 --questions 2 --out run",
)
RULER_EXAMPLE = example(
    "longspan eval ruler --model model --lengths 2k --subtasks niah_single_1,niah_multikey_2,vt --samples 1 "
    "--cache cache --out run"
)
LONGQA_EXAMPLE = example("longspan eval longqa --model model --data questions.jsonl --samples 2 --out run")
RESCORE_EXAMPLE = example(
    "longspan eval rescore run/records/passkey-model.jsonl --scorer rouge_1 --out rescored/passkey-model.jsonl"
)

Kind = Literal["topics", "lines"]


@takes_model
def passkey(
    model: ModelOptions,
    prompts: PromptOptions,
    out: Out,
    lengths: Annotated[
        str, typer.Option(help="Context lengths in tokens. Default: 20 from 8192 to 131072, as LongLLM.")
    ] = "8192:131072:20",
    depths: Annotated[
        str, typer.Option(help="0: start of the text, 1: its end; such as 0,0.5,1 or 0:1:11.")
    ] = "0:1:5",
    samples: Annotated[int, count_option(help="Samples of each length and depth.", min=1)] = 10,
    digits: Annotated[int, typer.Option(min=1, max=18, help="Digits of the key.")] = 5,
    too_long: TooLongOption = "refuse",
    retry_unscored: RetryUnscored = False,
    dry_run: DryRun = False,
    note: Note = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Ask for a number hidden among a few sentences that are repeated over and over.

    The first number of the answer counts.
    """
    from longspan.eval.held_out import TaskData
    from longspan.eval.passkey import Passkey, PasskeyConfig

    values = {"lengths": lengths, "depths": depths, "samples": samples, "digits": digits, "seed": seed}
    settings = PasskeyConfig.from_dict(values, where="the command line")
    task = Passkey.from_config(settings, TaskData(), form_of(model, prompts))
    if dry_run:
        show_plan(task, as_json=as_json)
        return
    summary = _run(task, model, prompts, out, note=note, retry_unscored=retry_unscored, too_long=too_long)
    if as_json:
        print_json(summary)
        return
    cells = {(cell["length"], cell["depth"]): percent(cell["mean"]) for cell in summary["cells"]}
    rows = [
        [f"{depth:g}", *(cells.get((length, depth)) for length in settings.lengths)]
        for depth in settings.depths
    ]
    print_table(title_of(summary), ("depth", *(f"{length:,}" for length in settings.lengths)), rows)


@takes_model
def topics(
    model: ModelOptions,
    prompts: PromptOptions,
    out: Out,
    kind: Annotated[Kind, typer.Option(help="Topics of a talk, or numbered lines.")] = "topics",
    counts: Annotated[
        str | None, typer.Option(help="Topics or lines in a record. Default: 5 to 70; 200 to 680.")
    ] = None,
    samples: Annotated[int, count_option(help="Records of each count.", min=1)] = 10,
    questions: Annotated[
        int, typer.Option(min=1, max=10, help="Questions on one record: the first topic, the second, ...")
    ] = 1,
    turns: Annotated[int, typer.Option(min=1, help="Questions and answers on one topic.")] = 8,
    too_long: TooLongOption = "refuse",
    retry_unscored: RetryUnscored = False,
    dry_run: DryRun = False,
    note: Note = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Ask which topic a long talk began with, or for the number in one of many lines."""
    from longspan.eval.held_out import TaskData
    from longspan.eval.topics import Topics, TopicsConfig

    values: dict[str, Any] = {
        "kind": kind,
        "samples": samples,
        "questions": questions,
        "turns": turns,
        "seed": seed,
    }
    if counts is not None:
        values["counts"] = counts
    settings = TopicsConfig.from_dict(values, where="the command line")
    task = Topics.from_config(settings, TaskData(), form_of(model, prompts))
    if dry_run:
        show_plan(task, as_json=as_json)
        return
    summary = _run(task, model, prompts, out, note=note, retry_unscored=retry_unscored, too_long=too_long)
    if as_json:
        print_json(summary)
        return
    _print_means(summary, summary["by_count"], f"num_{kind}")


@takes_model
def ruler(
    model: ModelOptions,
    prompts: PromptOptions,
    out: Out,
    lengths: Lengths = "4k,8k,16k,32k,64k,128k",
    subtasks: Annotated[
        str | None, typer.Option(help="Such as niah_single_1,vt. Default: all for which there is material.")
    ] = None,
    samples: Annotated[int, count_option(help="Samples of each subtask and length.", min=1)] = 100,
    release: Annotated[
        Literal["2024", "2025"],
        typer.Option(
            help="RULER's generators of the paper, or those of June 2025; they differ in vt, cwe and fwe."
        ),
    ] = "2024",
    haystack: Annotated[
        list[str] | None,
        typer.Option(help="Essays: files, folders, patterns; many times. Default: Python's reference prose."),
    ] = None,
    qa_data: Annotated[
        list[Path] | None,
        typer.Option(help="SQuAD's dev-v2.0.json (qa_1), HotpotQA's hotpot_dev_distractor_v1.json (qa_2)."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of composed samples. Default: ruler-samples in the run folder.",
        ),
    ] = None,
    too_long: TooLongOption = "refuse",
    retry_unscored: RetryUnscored = False,
    dry_run: DryRun = False,
    note: Note = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run RULER: needles of many kinds, variable tracking, frequent words, questions among documents.

    Samples are composed here, as long as stated, and kept: the same samples for the next model cost nothing.
    """
    from longspan.core.log import get_logger
    from longspan.eval.held_out import TaskData
    from longspan.eval.ruler.task import Ruler, RulerConfig

    values: dict[str, Any] = {"lengths": lengths, "samples": samples, "release": release, "seed": seed}
    if subtasks is not None:
        values["subtasks"] = subtasks.split(",")
    settings = RulerConfig.from_dict(values, where="the command line")
    material = TaskData(
        tuple(haystack or ()),
        questions=tuple(qa_data or ()),
        cache=None if dry_run else cache or out / "ruler-samples",
    )
    task = Ruler.from_config(settings, material, form_of(model, prompts))
    for name, reason in task.left_out.items():
        get_logger("eval").warning("ruler: %s is left out: it %s", name, reason)
    if dry_run:
        show_plan(task, as_json=as_json)
        return
    summary = _run(task, model, prompts, out, note=note, retry_unscored=retry_unscored, too_long=too_long)
    if as_json:
        print_json(summary)
        return
    cells = {(cell["subtask"], cell["length"]): percent(cell["mean"]) for cell in summary["cells"]}
    rows: list[list[object]] = [
        [subtask.name, *(cells.get((subtask.name, length)) for length in settings.lengths)]
        for subtask in task.subtasks
    ]
    rows.append(["mean", *(percent(row["mean"]) for row in summary["by_length"])])
    print_table(title_of(summary), ("subtask", *(f"{length:,}" for length in settings.lengths)), rows)


@takes_model
def longqa(
    model: ModelOptions,
    prompts: PromptOptions,
    out: Out,
    data: Annotated[list[Path], typer.Option(help="JSON lines as LongBench's; many times.")],
    datasets: Annotated[
        str | None, typer.Option(help="Names, with commas. Default: all in the files.")
    ] = None,
    samples: Annotated[int | None, count_option(help="The first so many of each data set.", min=1)] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Stop at the first record that is not a question. Default: they are left out and counted.",
        ),
    ] = False,
    too_long: TooLongOption = "refuse",
    retry_unscored: RetryUnscored = False,
    dry_run: DryRun = False,
    note: Note = None,
    as_json: Json = False,
) -> None:
    """Ask questions on long documents by the prompts and metrics of LongBench.

    With --max-length a longer prompt loses its middle; each record says how many tokens that were.
    """
    from longspan.core.units import parse_length
    from longspan.eval.held_out import TaskData
    from longspan.eval.longqa import LongQa, LongQaConfig

    values: dict[str, Any] = {"samples": samples, "datasets": datasets.split(",") if datasets else []}
    if model.max_length is not None:
        values["max_length"] = parse_length(model.max_length)
    settings = LongQaConfig.from_dict(values, where="the command line")
    task = LongQa.from_config(
        settings, TaskData(tuple(map(str, data)), strict=strict), form_of(model, prompts)
    )
    if dry_run:
        show_plan(task, as_json=as_json)
        return
    summary = _run(task, model, prompts, out, note=note, retry_unscored=retry_unscored, too_long=too_long)
    if as_json:
        print_json(summary)
        return
    _print_means(summary, summary["by_dataset"], "dataset")


def rescore(
    records: Annotated[Path, typer.Argument(help="Records file of an evaluation.")],
    scorer: Annotated[
        str, typer.Option(help="Scoring rule (see `eval list`), or `judge`: a model rates 1-10.")
    ],
    out: Annotated[Path, typer.Option(help="Records file to write.")],
    judge: Annotated[
        str | None, typer.Option(help="Model that judges: openai:NAME or anthropic:NAME, as in --model.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Address of the judge's server, such as http://localhost:8000/v1.")
    ] = None,
    criteria: Annotated[
        Literal["answer", "kamradt"],
        typer.Option(
            help="What the judge goes by: how much of the right answer is there, or the published criteria of "
            "Kamradt's needle test."
        ),
    ] = "answer",
    cache: Annotated[
        Path | None, typer.Option(help="File of the judge's replies; what stands there is not asked again.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the judge at the same time.")] = 8,
    as_json: Json = False,
) -> None:
    """Score recorded answers by another rule, without the model that gave them.

    The key of a judge's server comes from OPENAI_API_KEY or ANTHROPIC_API_KEY.
    """
    if scorer == "judge":
        summary = _judged(
            records, out, judge, base_url, criteria=criteria, cache=cache, concurrency=concurrency
        )
    else:
        from longspan.core.errors import ArgumentError
        from longspan.eval.rescoring import rescore as score_again

        if judge is not None or base_url is not None or cache is not None or criteria != "answer":
            raise ArgumentError(
                "no judge is asked by this rule", found=f"--scorer {scorer}", fix="give --scorer judge"
            )
        summary = score_again(records, scorer, out)
    if as_json:
        print_json(summary)
        return
    row = [summary["scored"], sum(summary["unscored"].values()), _decimal(summary["mean"])]
    interval = summary["interval"]
    row.append("-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}")
    title = f"{summary['task']}, {summary['label']}, by {scorer}"
    if (rating := summary.get("mean_rating")) is not None:
        title += f", mean rating {rating:.2f} (1 to 10)"
    print_table(title, ("scored", "unscored", "mean", "95% interval"), [row])


def _judged(
    records: Path,
    out: Path,
    judge: str | None,
    base_url: str | None,
    *,
    criteria: str,
    cache: Path | None,
    concurrency: int,
) -> dict[str, Any]:
    from longspan.api import Client, Endpoint, Limits
    from longspan.core.errors import ArgumentError
    from longspan.eval.judge import CRITERIA, judge_file

    provider, _, name = (judge or "").partition(":")
    if provider not in ("openai", "anthropic") or not name:
        raise ArgumentError(
            "--scorer judge needs the model that judges",
            found=judge,
            allowed="--judge openai:NAME, --judge anthropic:NAME",
        )
    endpoint = Endpoint(
        model=name, kind="anthropic" if provider == "anthropic" else "chat", base_url=base_url or ""
    )
    with Client(endpoint, limits=Limits(concurrency=concurrency), cache=cache) as client:
        return judge_file(records, client, out, template=CRITERIA[criteria])


def _run(
    task: Task,
    model: ModelOptions,
    prompts: PromptOptions,
    out: Path,
    *,
    note: str | None,
    retry_unscored: bool,
    too_long: Literal["refuse", "skip"],
) -> dict[str, Any]:
    from longspan.eval.runner import run_task

    with opened(model, prompts) as asked:
        return run_task(
            task,
            asked.answerer,
            tokenizer=asked.tokenizer,
            label=asked.label,
            out=asked.records(out, task.name),
            note=note,
            retry_unscored=retry_unscored,
            too_long=too_long,
        )


def _print_means(summary: dict[str, Any], means: Sequence[dict[str, Any]], name: str) -> None:
    rows = [[row[name], row["scored"], row["samples"] - row["scored"], percent(row["mean"])] for row in means]
    rows += [[average_name(row), "", "", percent(row["mean"])] for row in summary.get("averages", [])]
    print_table(title_of(summary), (name, "scored", "unscored", "mean"), rows)


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
