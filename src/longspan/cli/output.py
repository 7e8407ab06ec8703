"""Results on stdout: tables for people, JSON for machines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _checked_picture(path: Path | None) -> Path | None:
    from longspan.core.errors import ArgumentError

    if path is not None and path.suffix.lower() not in PICTURES:
        raise ArgumentError("a picture is of no such kind", found=path.name, allowed=", ".join(PICTURES))
    return path


PICTURES = (".png", ".svg", ".pdf")
Plot = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False, callback=_checked_picture, help="Picture to draw: a .png, .svg or .pdf file."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]

PIPE_WIDTH = 160
"""Characters in a line when stdout is no terminal; a table is not squeezed into a window nobody has."""
_NUMBER = re.compile(r"[-+]?[\d.,]+ ?(%|[KMBT]|[KMGT]?i?B)?|-")


def example(*lines: str) -> str:
    """Return the end of a command's help: command lines that can be copied as they are."""
    # \b keeps the line breaks of a paragraph.
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def print_json(value: object) -> None:
    """Print one JSON document; what is not finite is null."""
    from longspan.core.files import finite

    typer.echo(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; None is shown as "-", columns of numbers stand right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    lines = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column, cells in zip(columns, zip(*lines) if lines else [()] * len(columns)):
        numbers = bool(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(escape, line))
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    console.print(escape(title), style="bold")
    console.print(table)


def print_lengths(summary: dict[str, Any]) -> None:
    """Print a length summary: documents, tokens and lengths of each source."""
    from longspan.core.units import format_count
    from longspan.data.store.lengths import SHARE_THRESHOLDS, summary_rows

    above = {f"above_{limit}": f"above {limit // 1024}K" for limit in SHARE_THRESHOLDS}
    quantiles = ("p50", "p90", "p99", "max")
    rows = [
        [
            row["source"],
            format_count(row["documents"]),
            format_count(row["tokens"]),
            percent(row["token_share"]),
            *(row[name] for name in quantiles),
            *(percent(row[name]) for name in above),
        ]
        for row in summary_rows(summary)
    ]
    columns = ("source", "documents", "tokens", "share", *quantiles, *above.values())
    print_table(f"lengths in tokens: {summary['title']}", columns, rows)


def percent(share: float | None) -> str | None:
    """Write a share for people: 0.125 is `12.5%`."""
    return None if share is None else f"{100 * share:.1f}%"


def command_line(*without: str) -> list[str]:
    """Return the words of this command line, less --print-sbatch and some options with their values."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word.partition("=")[0] not in ("--print-sbatch", *without):
            words.append(word)
        skip = not skip and word in without
    return words
