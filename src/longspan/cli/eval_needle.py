"""`longspan eval needle`: what a model finds at each context length and depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.eval_options import (
    Note,
    Out,
    RetryUnscored,
    TooLongOption,
    UntilWidth,
    print_prompt,
    share_of,
    shown_prompt,
)
from longspan.cli.eval_tasks import data_part, print_scores
from longspan.cli.from_settings import Part, Used, from_settings
from longspan.cli.model_options import MODEL, PROMPTS
from longspan.cli.output import Json, example, percent, print_json, print_table
from longspan.core.log import log_once
from longspan.eval.registry import built_in

if TYPE_CHECKING:
    from longspan.eval.held_out import TaskDataConfig
    from longspan.eval.needle_config import NeedleConfig
    from longspan.eval.prompts import PromptConfig, PromptForm
    from longspan.infer.config import AnswererConfig

EXAMPLE = example(
    "longspan eval needle --model model --data texts --lengths 128,256 --samples 2 --out run",
    "longspan eval needle --model model --lengths 256,384 --depths 0:1:3 --samples 1 --multi-key --out run",
)


def _usual(given: dict[str, Any]) -> dict[str, Any]:
    """Return what is usual where nothing is said: the preset; in a chat answers are generated, behind a beginning."""
    from longspan.api import remote_model
    from longspan.core.errors import ArgumentError
    from longspan.core.log import get_logger
    from longspan.eval.needle_config import CHAT
    from longspan.eval.needle_presets import preset_named

    preset, exact = given["preset"], given["exact"]
    if exact and not preset:
        raise ArgumentError(
            "--exact says how a preset is meant", fix="name it with --preset, or leave --exact out"
        )
    values = dict(preset_named(preset, exact=exact)) if preset else {}
    if "lengths" not in {*values, *given}:
        raise ArgumentError(
            "no context lengths are given", fix="name them with --lengths, or take a --preset"
        )
    remote = remote_model(given.get("model", ""))
    if given.get("chat_template") is None and (remote is None or remote.provider == "completions"):
        return values if remote is None or preset else {"mode": "generate"}
    if given.get("mode") == "teacher_forced":
        return values
    own_words = preset or any(
        given.get(name) for name in ("needle", "question", "answer", "num_needles", "prompt")
    )
    get_logger("eval").info(
        "needle: in a chat answers are generated%s; --mode teacher_forced measures given ones",
        "" if own_words else f", and begin with {CHAT['answer_prefix']!r}",
    )
    return {**values, "mode": CHAT["mode"]} if own_words else {**values, **CHAT}


SETTINGS = Part(
    "longspan.eval.needle_config:NeedleConfig",
    without=["max_new_tokens", "original", "key_split", "split"],
    names={"distractors": "--distractor", "keys": "--key"},
    old={
        "--needles": "num_needles",
        "--distractors": "num_distractors",
        "--digits": "answer_digits",
        "--repeat-haystack": "repeat",
    },
    under=_usual,
)


@from_settings(settings=SETTINGS, data=data_part(built_in()["needle"]), model=MODEL, prompts=PROMPTS)
def needle(
    settings: NeedleConfig,
    data: TaskDataConfig,
    model: AnswererConfig,
    prompts: PromptConfig,
    used: Used,
    out: Out,
    preset: Annotated[
        str | None, typer.Option(help="Settings of a published test; see `eval list`. Options outrank it.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="The preset to the letter: its cut, places, spelling and score.")
    ] = False,
    multi_key: Annotated[
        bool, typer.Option("--multi-key", help="A needle at every depth of one context, each asked for.")
    ] = False,
    too_long: TooLongOption = "refuse",
    retry_unscored: RetryUnscored = False,
    until_width: UntilWidth = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Mean that the effective context has to keep.")
    ] = 0.8,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the grid, its cost and one whole prompt; run nothing.")
    ] = False,
    note: Note = None,
    as_json: Json = False,
) -> None:
    """Ask for facts planted in text that the model has not seen, at each length and depth.

    By default a sample is right when the model's first choices, token by token, spell the answer.
    """
    from longspan.eval.needle import effective_of
    from longspan.steps.evaluate import evaluate_model, task_of
    from longspan.steps.opening import form_of

    entry = built_in()["needle_multikey" if multi_key else "needle"]
    if dry_run:
        shortest = settings.model_copy(update={"lengths": (min(settings.lengths),)})
        form = form_of(model, prompts)
        example = task_of(entry, shortest, data, form)
        shown = shown_prompt(example, example.plan())
        _show_grid(settings, form, shown, multi_key=multi_key, threshold=threshold, as_json=as_json)
        return
    if too_few := _too_few(settings, threshold):
        log_once("eval", too_few)
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
    summary |= effective_of(summary["by_length"], threshold=threshold)
    if as_json:
        print_json(summary)
    else:
        _print(summary)


def _print(summary: dict[str, Any]) -> None:
    """Print the grid, and the effective context."""
    print_scores(summary)
    unit = "" if summary["effective_context"] is None else " tokens"
    reasons = ", ".join(f"{reason} ({count})" for reason, count in summary["unscored"].items())
    remarks = [summary["effective_note"]] if summary["effective_note"] else []
    remarks += [f"unscored: {reasons}"] if reasons and summary["effective_context"] is None else []
    typer.echo(
        f"effective context: {': '.join([summary['effective_text'] + unit, *remarks])} "
        f"(the lower bound of the interval is above {percent(summary['effective_threshold'])} there and at "
        "every shorter length)"
    )


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
