"""`longspan eval needle`: what a model finds at each context length and depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longspan.cli.counts import count_option
from longspan.cli.eval_options import (
    Note,
    Out,
    RetryUnscored,
    SourceField,
    TextField,
    TooLongOption,
    print_prompt,
    shown_prompt,
    title_of,
)
from longspan.cli.model_options import ModelOptions, PromptOptions, form_of, opened, takes_model
from longspan.cli.output import Json, example, percent, print_json, print_table
from longspan.core.log import log_once

if TYPE_CHECKING:
    from longspan.eval.needle_config import NeedleConfig
    from longspan.eval.prompts import PromptForm
    from longspan.eval.task import Task

EXAMPLE = example(
    "longspan eval needle --model model --data texts --lengths 128,256 --samples 2 --out run",
    "longspan eval needle --model model --lengths 256,384 --depths 0:1:3 --samples 1 --multi-key --out run",
)

Mode = Literal["teacher_forced", "generate"]
Order = Literal["random", "given"]


@takes_model
def needle(
    model: ModelOptions,
    prompts: PromptOptions,
    out: Out,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Haystack: files, folders, patterns; many times. Default: Python's reference prose."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings of a published test; see `eval list`. Options outrank it.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="The preset to the letter: its cut, places, spelling and score.")
    ] = False,
    lengths: Annotated[
        str | None, typer.Option(help="Context lengths in tokens, such as 1k,4k,32k or 1k:8k:8.")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="0: start of the text, 1: its end; such as 0,0.5,1 or 0:1:11.")
    ] = None,
    samples: Annotated[int | None, count_option(help="Samples of each length and depth.", min=1)] = None,
    needles: Annotated[int | None, typer.Option(min=1, help="Needles in one context, all asked for.")] = None,
    distractors: Annotated[
        int | None, typer.Option(min=0, help="Other planted facts in the same text.")
    ] = None,
    multi_key: Annotated[
        bool, typer.Option("--multi-key", help="A needle at every depth of one context, each asked for.")
    ] = False,
    needle: Annotated[str | None, typer.Option(help="Planted text; {key} and {number} are drawn.")] = None,
    question: Annotated[str | None, typer.Option(help="What is asked at the end.")] = None,
    answer: Annotated[str | None, typer.Option(help="The right answer.")] = None,
    answer_prefix: Annotated[
        str | None,
        typer.Option(
            help="How a generated answer begins: the assistant's words in a chat. Default: none; in a chat a sentence."
        ),
    ] = None,
    distractor: Annotated[
        list[str] | None, typer.Option(help="Text of a planted fact that is not asked for; many times.")
    ] = None,
    key: Annotated[list[str] | None, typer.Option(help="A word that may be {key}; many times.")] = None,
    digits: Annotated[int | None, typer.Option(min=1, max=18, help="Digits of {number}.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The whole, with {context} and {question}.")] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="Most likely tokens along the answer, or free ones. Default: free ones in a chat, else as the preset "
            "says, or along the answer."
        ),
    ] = None,
    scorer: Annotated[str | None, typer.Option(help="Scoring rule; see `eval list`.")] = None,
    order: Annotated[Order | None, typer.Option(help="Order of the documents in a haystack.")] = None,
    repeat_haystack: Annotated[
        bool, typer.Option("--repeat-haystack", help="Repeat documents that are shorter than the context.")
    ] = False,
    too_long: TooLongOption = "refuse",
    retry_unscored: RetryUnscored = False,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Mean that the effective context has to keep.")
    ] = 0.8,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the grid, its cost and one whole prompt; run nothing.")
    ] = False,
    text_field: TextField = "text",
    source_field: SourceField = None,
    note: Note = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice. Default: 0.")] = None,
    as_json: Json = False,
) -> None:
    """Ask for facts planted in text that the model has not seen, at each length and depth.

    By default a sample is right when the model's first choices, token by token, spell the answer.
    """
    given = {
        "lengths": lengths,
        "depths": depths,
        "samples": samples,
        "num_needles": needles,
        "num_distractors": distractors,
        "needle": needle,
        "question": question,
        "answer": answer,
        "distractors": distractor,
        "keys": key,
        "answer_digits": digits,
        "prompt": prompt,
        "mode": mode,
        "answer_prefix": answer_prefix,
        "scorer": scorer,
        "order": order,
        "repeat": (repeat_haystack or not data) or None,
        "seed": seed,
    }
    given = _usual(model, preset, given) | {name: value for name, value in given.items() if value is not None}
    settings = _settings(preset, given, exact=exact)
    from longspan.eval.held_out import TaskData

    form = form_of(model, prompts)
    documents = TaskData(tuple(data or ()), text_field, source_field).documents()
    make = _task_kind(multi_key)
    if dry_run:
        shortest = settings.model_copy(update={"lengths": (min(settings.lengths),)})
        example = make(shortest, documents, form)
        shown = shown_prompt(example, example.plan())
        _show_grid(settings, form, shown, multi_key=multi_key, threshold=threshold, as_json=as_json)
        return
    if too_few := _too_few(settings, threshold):
        log_once("eval", too_few)
    task = make(settings, documents, form)
    from longspan.eval.runner import run_task

    with opened(model, prompts) as asked:
        summary = run_task(
            task,
            asked.answerer,
            tokenizer=asked.tokenizer,
            label=asked.label,
            out=asked.records(out, task.name),
            note=note,
            retry_unscored=retry_unscored,
            too_long=too_long,
        )
    from longspan.eval.needle import effective_of

    summary |= effective_of(summary["by_length"], threshold=threshold)
    if as_json:
        print_json(summary)
    else:
        print_grid(summary)


def print_grid(summary: dict[str, Any]) -> None:
    """Print means by depth and length with intervals, counts, and the effective context."""
    cells = {(cell["length"], cell["depth"]): percent(cell["mean"]) for cell in summary["cells"]}
    lengths = [row["length"] for row in summary["by_length"]]
    depths = sorted({cell["depth"] for cell in summary["cells"]})
    rows: list[list[object]] = [
        [f"{depth:g}", *(cells.get((length, depth)) for length in lengths)] for depth in depths
    ]
    rows.append(["all depths", *(percent(row["mean"]) for row in summary["by_length"])])
    rows.append(["95% interval", *(_interval(row["interval"]) for row in summary["by_length"])])
    rows.append(["unscored", *(row["samples"] - row["scored"] for row in summary["by_length"])])
    print_table(title_of(summary), ("depth", *(f"{length:,}" for length in lengths)), rows)
    unit = "" if summary["effective_context"] is None else " tokens"
    reasons = ", ".join(f"{reason} ({count})" for reason, count in summary["unscored"].items())
    remarks = [summary["effective_note"]] if summary["effective_note"] else []
    remarks += [f"unscored: {reasons}"] if reasons and summary["effective_context"] is None else []
    typer.echo(
        f"effective context: {': '.join([summary['effective_text'] + unit, *remarks])} "
        f"(the lower bound of the interval is above {percent(summary['effective_threshold'])} there and at "
        "every shorter length)"
    )


def _interval(interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else f"{100 * interval[0]:.0f}-{100 * interval[1]:.0f}%"


def _settings(preset: str | None, given: dict[str, Any], *, exact: bool) -> NeedleConfig:
    from longspan.core.errors import ArgumentError
    from longspan.eval.needle_config import NeedleConfig
    from longspan.eval.needle_presets import preset_named

    if exact and not preset:
        raise ArgumentError(
            "--exact says how a preset is meant", fix="name it with --preset, or leave --exact out"
        )
    values = {**(preset_named(preset, exact=exact) if preset else {}), **given}
    if "lengths" not in values:
        raise ArgumentError(
            "no context lengths are given", fix="name them with --lengths, or take a --preset"
        )
    return NeedleConfig.from_dict(values, where="the command line")


def _task_kind(multi_key: bool) -> Callable[..., Task]:
    from longspan.eval.needle import NeedleTask
    from longspan.eval.needle_multikey import MultiKeyTask

    return MultiKeyTask if multi_key else NeedleTask


def _usual(model: ModelOptions, preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are usual where nothing is said: in a chat answers are generated, behind a beginning."""
    from longspan.core.log import get_logger
    from longspan.eval.needle_config import CHAT

    if model.chat_template is None and not model.is_chat_server:
        return {"mode": "generate"} if model.is_remote and preset is None else {}
    if given["mode"] == "teacher_forced":
        return {}
    own_words = preset or any(
        given[name] for name in ("needle", "question", "answer", "num_needles", "prompt")
    )
    usual = {"mode": CHAT["mode"]} if own_words else dict(CHAT)
    get_logger("eval").info(
        "needle: in a chat answers are generated%s; --mode teacher_forced measures given ones",
        "" if own_words else f", and begin with {CHAT['answer_prefix']!r}",
    )
    return usual


def _too_few(settings: NeedleConfig, threshold: float) -> str:
    """Return a remark where no answers could show an effective context; empty where they can."""
    from longspan.core.intervals import samples_needed

    count, needed = len(settings.depths) * settings.samples, samples_needed(threshold)
    if needed is not None and count >= needed:
        return ""
    enough = "no number is enough" if needed is None else f"at least {needed} are needed (--samples)"
    return (
        f"{count} sample{'' if count == 1 else 's'} a length cannot show an effective context above "
        f"{percent(threshold)}, even if all are right: {enough}"
    )


def _show_grid(
    settings: NeedleConfig,
    form: PromptForm,
    prompt: dict[str, Any],
    *,
    multi_key: bool,
    threshold: float,
    as_json: bool,
) -> None:
    """Print what would be run: cells, prompts, tokens, how much a shared prefix saves, and one prompt."""
    from longspan.core.units import format_count
    from longspan.eval.needle_cost import grid_cost

    cost = grid_cost(settings, form, multi_key=multi_key)
    if as_json:
        print_json({**cost._asdict(), "prompt": prompt})
        return
    each = len(settings.depths) * settings.samples
    rows = [
        [f"{length:,}", len(settings.depths), settings.samples, f"{length * each:,}"]
        for length in settings.lengths
    ]
    print_table(
        "1 cell" if cost.cells == 1 else f"{cost.cells} cells",
        ("length", "depths", "samples", "tokens"),
        rows,
    )
    typer.echo(f"depths: {', '.join(f'{depth:g}' for depth in settings.depths)}")
    if too_few := _too_few(settings, threshold):
        typer.echo(too_few)
    typer.echo(
        f"{cost.prompts:,} prompts of {format_count(cost.prompt_tokens)} tokens; mode {settings.mode}, "
        f"scorer {settings.scorer_name}"
    )
    typer.echo(
        f"with prefix reuse about {format_count(cost.tokens_read)} tokens are read: {cost.factor_linear:.2f} "
        f"times fewer in the linear layers, {cost.factor_attention:.2f} times fewer pairs in attention"
    )
    print_prompt(prompt)
