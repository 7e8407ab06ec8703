"""`longspan data`: from raw text to rows for training, and back to what other tools read."""

from __future__ import annotations

import typer

from longspan.cli import data_audit, data_chat, data_convert, data_fetch, data_look, data_plan, data_tokenize

app = typer.Typer(
    help="Tokenize text once, choose documents, place them in rows.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command(epilog=data_tokenize.EXAMPLE)(data_tokenize.tokenize)
app.command(epilog=data_fetch.EXAMPLE)(data_fetch.fetch)
app.command(epilog=data_look.LENGTHS_EXAMPLE)(data_look.lengths)
app.command(epilog=data_audit.EXAMPLE)(data_audit.audit)
app.command(epilog=data_chat.EXAMPLE)(data_chat.chat)
app.command(epilog=data_plan.MIX_EXAMPLE)(data_plan.mix)
app.command(epilog=data_plan.PACK_EXAMPLE)(data_plan.pack)
app.command(epilog=data_look.PEEK_EXAMPLE)(data_look.peek)
app.command(epilog=data_look.VERIFY_EXAMPLE)(data_look.verify)
app.command(epilog=data_convert.CONVERT_EXAMPLE)(data_convert.convert)
app.command(epilog=data_convert.MERGE_EXAMPLE)(data_convert.merge)
app.command(epilog=data_convert.SPLIT_EXAMPLE)(data_convert.split)
