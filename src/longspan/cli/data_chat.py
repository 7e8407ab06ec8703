"""`longspan data chat`: what is in files of conversations, before they are tokenized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.from_settings import Part, from_settings
from longspan.cli.output import Json, example, percent, print_json, print_table

if TYPE_CHECKING:
    from longspan.data.chat.chat_config import ChatConfig

EXAMPLE = example(
    "longspan data chat chats.jsonl",
    "longspan data chat chats.jsonl --tokenizer tokenizer --chat-template qwen-3 --page chats.html",
)
_SHOWN_FAULTS = 20
_SHOWN = 6


@from_settings(settings=Part("longspan.data.chat.chat_config:ChatConfig"))
def chat(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Files, folders or glob patterns of conversations.")
    ],
    settings: ChatConfig,
    messages_field: Annotated[str, typer.Option(help="Field that holds a conversation.")] = "messages",
    tokenizer: Annotated[
        str | None, typer.Option(help="Counts tokens. Without it characters are counted.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="own: the tokenizer's; else a shipped name or a Jinja file. Says what would be learnt."
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="Also write an HTML page: tables, histograms, and a few conversations with what is learnt."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is in conversations: turns, calls, thoughts, lengths by role, what is learnt, and faults."""
    from longspan.core.errors import ArgumentError
    from longspan.data.chat import load_chat_format
    from longspan.data.chat.chat_config import ChatConfig
    from longspan.data.tokenize.chat_contents import chat_contents
    from longspan.data.tokenizer import load_tokenizer

    if page is not None:
        from longspan.report.chat_page import chat_page_file, write_chat_page

        chat_page_file(page)
    if tokenizer is None and (chat_template is not None or settings != ChatConfig()):
        raise ArgumentError("a chat template needs a tokenizer", fix="give --tokenizer")
    reader = None if tokenizer is None else load_tokenizer(tokenizer)
    form = None
    if reader is not None and chat_template is not None:
        form = load_chat_format(reader, None if chat_template == "own" else chat_template, config=settings)
    elif settings != ChatConfig():
        raise ArgumentError("what is learnt is said by a chat template", fix="give --chat-template")
    found = chat_contents(
        inputs, messages_field=messages_field, tokenizer=reader, chat=form, show=0 if page is None else _SHOWN
    )
    if page is not None:
        write_chat_page(page, inputs, found._asdict())
    if as_json:
        print_json({name: value for name, value in found._asdict().items() if name != "shown"})
        return
    print_table(", ".join(inputs), ("what", "number"), list(found.counts.items()))
    columns = ("said", "number", found.unit, "median", "p90", "longest")
    whole = [("conversations", found.counts["conversations"], None, *found.lengths.values())]
    print_table(
        f"lengths in {found.unit}", columns, [*whole, *((n, *p.values()) for n, p in found.parts.items())]
    )
    if found.learnt is not None:
        typer.echo(
            f"learnt: {found.learnt['learnt']:,} of {found.learnt['tokens']:,} tokens, {percent(found.learnt['share'])}"
        )
    for name, count in found.notes.items():
        typer.echo(f"{count} {name}")
    if found.faults:
        rows = [(count, reason, found.examples.get(reason)) for reason, count in found.faults.items()]
        print_table("conversations that cannot be used", ("number", "why", "first"), rows[:_SHOWN_FAULTS])
        if len(rows) > _SHOWN_FAULTS:
            typer.echo(f"and {len(rows) - _SHOWN_FAULTS} more reasons (--json lists all)")
    if page is not None:
        typer.echo(f"page: {page}")
