"""Options that several evaluations share, and the documents that they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longspan.cli.output import percent, print_json

if TYPE_CHECKING:
    from longspan.eval.task import Planned, Task

TooLong = Literal["refuse", "skip"]

Out = Annotated[Path, typer.Option(file_okay=False, help="Run folder; records go to its records/.")]
TooLongOption = Annotated[
    TooLong, typer.Option(help="Contexts over --max-length: an error, or samples recorded as unscored.")
]
RetryUnscored = Annotated[
    bool, typer.Option("--retry-unscored", help="Ask again for recorded samples that have no score.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be asked, and one whole prompt; run nothing.")
]
UntilWidth = Annotated[
    str | None,
    typer.Option(
        help="Stop asking of a length (or what a task's columns are) when the 95% interval of its mean is no wider, "
        "such as 5%, from end to end. It is looked at after 20, 40, 80 ... samples.",
        show_default=False,
    ),
]
Note = Annotated[str | None, typer.Option(help="A remark for readers of the records.")]


def share_of(percent: str | None, option: str) -> float | None:
    """Return a share that is given as `5%` or `0.05`; None where nothing is. Raises ArgumentError."""
    if percent is None:
        return None
    number = percent.strip().removesuffix("%")
    try:
        return float(number) / (100 if "%" in percent else 1)
    except ValueError:
        from longspan.core.errors import ArgumentError

        raise ArgumentError(
            f"{option} is not a number", found=repr(percent), allowed="a share, such as 5% or 0.05"
        ) from None


def title_of(summary: dict[str, Any]) -> str:
    """Return the line over a table of results: mean, counts, and how many answers are empty, by reason."""
    empty = "".join(f", {count} {reason}" for reason, count in summary["no_answer"].items())
    planned = f" ({summary['planned']} planned)" if "planned" in summary else ""
    return (
        f"{summary['task']}, {summary['label']}: mean {percent(summary['mean']) or '-'}, "
        f"{summary['scored']} of {summary['samples']} samples scored{planned}{empty}"
    )


def average_name(row: dict[str, Any]) -> str:
    """Return how an average over sets is called: how many it is over, and how many have no score."""
    return f"average of {row['sets']} sets" + (f", {row['without']} have no score" if row["without"] else "")


def show_plan(task: Task, *, as_json: bool) -> None:
    """Print how many samples a task has, and one whole prompt."""
    planned = task.plan()
    prompt = shown_prompt(task, planned)
    counts = {"samples": len(planned), "tokens": sum(sample.tokens for sample in planned)}
    if as_json:
        print_json({"task": task.name, **counts, "prompt": prompt})
        return
    typer.echo(
        f"{task.name}: {counts['samples']:,} samples, about {counts['tokens']:,} tokens with their answers"
    )
    print_prompt(prompt)


def shown_prompt(task: Task, planned: Sequence[Planned]) -> dict[str, Any]:
    """Return the shortest sample of a plan as it would be asked."""
    first = min(planned, key=lambda sample: sample.tokens)
    built = task.build(first)
    request = built.request
    tokens = 0 if request.prompt_ids is None else len(request.prompt_ids)
    return {
        "sample": dict(first.fields),
        "tokens": tokens,
        "text": request.prompt,
        "messages": None if request.messages is None else [dict(message) for message in request.messages],
        "thinking": request.thinking,
        "max_new_tokens": None if request.answer_ids is not None else request.max_new_tokens,
        "stop": list(request.stop),
        "expected": built.expected,
    }


def print_prompt(prompt: dict[str, Any]) -> None:
    """Print a prompt between lines that say what it is."""
    fields = ", ".join(f"{name} {value}" for name, value in prompt["sample"].items())
    room = prompt["max_new_tokens"]
    asked = "the answer is given and measured" if room is None else f"room for {room:,} tokens of answer"
    thinks = {"expected": ", thoughts before it", "opened": ", thoughts that the prompt opens before it"}.get(
        prompt["thinking"], ""
    )
    typer.echo(f"--- prompt of {fields}: {prompt['tokens']:,} tokens, {asked}{thinks}")
    typer.echo(prompt["text"])
    typer.echo(f"--- expected: {prompt['expected']!r}")
