"""`longspan ask`: one question to a model, on long texts or none, with the answer as it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.eval_tasks import DATA, DATA_FIELDS
from longspan.cli.from_settings import Part, Used, from_settings
from longspan.cli.model_options import MODEL, PROMPTS
from longspan.cli.output import Json, example, print_json

if TYPE_CHECKING:
    from longspan.eval.ask import Composed
    from longspan.eval.held_out import TaskDataConfig
    from longspan.eval.prompts import PromptConfig
    from longspan.infer.config import AnswererConfig
    from longspan.infer.requests import Answer, Answerer, Request

EXAMPLE = example(
    'longspan ask model --data texts --needle "The magic number of glacier is 48213." --depth 0.5 '
    '--question "What is the magic number of glacier?" --length 200 --max-new-tokens 8'
)

ANSWER_TOKENS = 256
"""Room for an answer where nothing else is said."""
PROMPT = "fu-2024"


@from_settings(
    model=MODEL._replace(argument="model", without=["replicas"]),
    prompts=PROMPTS,
    texts=Part(
        DATA,
        without=DATA_FIELDS[2:],
        names={"paths": "--data"},
        help={"paths": "Texts to read first: files, folders, patterns; many times."},
        old={"--context": "paths"},
    ),
)
def ask(
    model: AnswererConfig,
    prompts: PromptConfig,
    texts: TaskDataConfig,
    used: Used,
    question: Annotated[
        str | None,
        typer.Option(help="What is asked; left out where the texts hold it, with a --prompt of {context}."),
    ] = None,
    needle: Annotated[str | None, typer.Option(help="A sentence to plant in the texts.")] = None,
    depth: Annotated[
        float | None,
        typer.Option(help="Where it lies: 0 is the start, 1 the end. Default: 0.5.", show_default=False),
    ] = None,
    length: Annotated[
        str | None, typer.Option(help="Tokens of the prompt at most, such as 80k; the texts lose their end.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="A preset's prompt (see `eval list`), or a text with {context} and {question}. Default: fu-2024.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask as a chat, by the tokenizer's own template.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask a question on texts; show where a planted sentence lies, and the answer as it comes.

    Without texts the question is all that is sent.
    """
    from longspan.core.units import parse_length
    from longspan.eval.ask import compose, template_named
    from longspan.eval.prompts import OWN_TEMPLATE
    from longspan.steps.opening import form_of, opened

    if not texts.paths:
        _refuse_unused({"--prompt": prompt, "--length": length}, "texts to read first", "--data")
    if needle is None:
        _refuse_unused({"--depth": depth}, "a sentence to plant", "--needle")
    if chat and model.chat_template is None:
        model = model.model_copy(update={"chat_template": OWN_TEMPLATE})
    form = form_of(model, prompts)
    composed = compose(
        texts.documents() if texts.paths else [],
        form,
        question=question,
        template=template_named(prompt or PROMPT),
        needle=needle,
        depth=0.5 if depth is None else depth,
        length=None if length is None else parse_length(length),
    )
    _refuse_too_long(model, composed.tokens + form.room(ANSWER_TOKENS))
    request = form.request(composed.prompt, max_new_tokens=ANSWER_TOKENS)
    if not as_json:
        _show_prompt(composed)
    with opened(model, prompts, tokenizer=form.tokenizer) as asked:
        answer = _stream(asked.answerer, request, quiet=as_json)
    if as_json:
        print_json({**_summary(composed, question, answer), "settings": used})
        return
    typer.echo(f"\n\n{answer.completion_tokens:,} tokens in {answer.seconds:.1f} s{_end_of(answer)}")


def _refuse_unused(given: dict[str, Any], needed: str, option: str) -> None:
    """Refuse options that say something of what is not there. Raises ArgumentError."""
    from longspan.core.errors import ArgumentError

    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise ArgumentError(
            f"{' and '.join(unused)} has no effect without {needed}",
            fix=f"give {option}, or leave {' and '.join(unused)} out",
        )


def _refuse_too_long(model: AnswererConfig, tokens: int) -> None:
    from longspan.core.errors import ArgumentError

    most = model.max_length
    if most is not None and tokens > most:
        raise ArgumentError(
            "the prompt and its answer are longer than the model is to be given",
            found=f"{tokens:,} tokens",
            allowed=f"--max-length {most:,}",
            fix="cut the context with --length, or shorten the answer with --max-new-tokens",
        )


def _stream(answerer: Answerer, request: Request, *, quiet: bool) -> Answer:
    """Return the answer; write it out as it comes. Raises RunError: there is none."""
    from longspan.core.errors import RunError

    def write(text: str) -> None:
        if not quiet:
            typer.echo(text, nl=False)

    if hasattr(answerer, "generate_stream"):
        answer = answerer.generate_stream(request, write)
    else:
        _, answer = next(iter(answerer.generate([request])))
        write(answer.text)
    if answer.error is not None:
        raise RunError("the model gave no answer", found=answer.error)
    return answer


def _end_of(answer: Answer) -> str:
    """Say what the text above does not show: that it is thoughts alone, or was cut."""
    from longspan.infer.requests import no_answer

    missing = no_answer(answer)
    if answer.finish == "length":
        return f"; {missing or 'the answer is cut'}: give more room with --max-new-tokens"
    return "" if missing is None else f"; {missing}"


def _show_prompt(composed: Composed) -> None:
    if composed.place is not None:
        place = composed.place
        typer.echo(f"...{place.before}>>> {place.needle} <<<{place.after}...\n")
        typer.echo(f"needle at depth {place.depth:.3f} of the context")
    cut = f" ({composed.removed:,} tokens of the context cut off)" if composed.removed else ""
    typer.echo(f"input: {composed.tokens:,} tokens{cut}\n")


def _summary(composed: Composed, question: str | None, answer: Answer) -> dict[str, Any]:
    from longspan.infer.requests import no_answer

    place = composed.place
    return {
        "question": question,
        "prompt_tokens": composed.tokens,
        "context_tokens_removed": composed.removed,
        "needle": None
        if place is None
        else {
            "depth": place.depth,
            "before": place.before,
            "text": place.needle,
            "after": place.after,
        },
        "answer": answer.text,
        "thoughts": answer.thoughts,
        "no_answer": no_answer(answer),
        "finish": answer.finish,
        "answer_tokens": answer.completion_tokens,
        "seconds": answer.seconds,
    }
