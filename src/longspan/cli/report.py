"""`longspan report`: run folders to one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.output import Json, example, print_json, print_table

EXAMPLE = example("longspan report run --out report.html")


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders that training or evaluation wrote.")
    ],
    out: Annotated[Path, typer.Option(help="HTML file; figures/ and tables/ are written beside it.")] = Path(
        "report.html"
    ),
    group: Annotated[
        bool,
        typer.Option(
            "--group",
            help="Sum up runs that differ in their seed alone: mean, spread, and what is inside training noise.",
        ),
    ] = False,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    as_json: Json = False,
) -> None:
    """Make one self-contained HTML page, with its figures and tables as files beside it."""
    from longspan.report import write_report

    result = write_report(runs, out, title=title, group=group)
    if as_json:
        written = {name: list(map(str, getattr(result, name))) for name in ("figures", "tables", "shown")}
        print_json({"page": str(result.page), **written, "results": result.results})
    else:
        folders = [
            (paths[0].parent, f"{len(paths)} files, {what}")
            for paths, what in (
                (result.figures, "each figure as PNG, SVG and PDF"),
                (result.tables, "numbers as they were measured"),
                (result.shown, "the tables of the page as CSV and LaTeX"),
            )
            if paths
        ]
        print_table("written", ("file", "what"), [[result.page, "the page"], *map(list, folders)])
