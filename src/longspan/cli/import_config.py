"""`longspan import-config`: a config of another trainer to a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.output import Json, example, print_json, print_table

if TYPE_CHECKING:
    from longspan.train.translate import Translation

EXAMPLE = example(
    "longspan import-config axolotl.yaml --processes 8 --out translated.yaml",
    "longspan import-config sft.sh --set model.path=models/qwen --json",
)


def import_config(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="YAML or JSON of a tool, or a shell script with its command line."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Recipe to write. Default: it is printed.")] = None,
    tool: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TOOL",
            help="axolotl, llama-factory, trl, ms-swift or torchtune. Default: the one that knows most of the keys.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="GPUs that it ran on, which make the batch. Default: what the file says."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE changes a setting of the recipe; many times.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a recipe of a config of axolotl, LLaMA-Factory, TRL, ms-swift or torchtune, with a note for every key."""
    from longspan.core.config import yaml_text
    from longspan.core.files import atomic_write
    from longspan.train.translate import translate

    made = translate(file, tool=tool, processes=processes, overrides=settings or [])
    text = f"{_head(made, file)}{yaml_text(made.recipe)}"
    if out is not None:
        with atomic_write(out, "w") as opened:
            opened.write(text)
    if as_json:
        notes = [note._asdict() for note in made.notes]
        print_json({**made._asdict(), "notes": notes})
    elif out is None:
        typer.echo(text, nl=False)
    else:
        _print(made, file, out)


def _rows(made: Translation, *kinds: str) -> list[tuple[str, str, str]]:
    return [(note.key, _short(note.value), note.words) for note in made.notes if note.kind in kinds]


def _head(made: Translation, file: Path) -> str:
    """Return the comment above a recipe: what is to be looked at, and what is not in it."""
    lines = [f"Made of {file.name}, a config of {made.tool}, by `longspan import-config`."]
    parts = {
        "Before training": made.before,
        "To look at": made.remarks,
        "Not carried over": [
            f"{key}: {value}: {words}" for key, value, words in _rows(made, "not carried over")
        ],
        "Left out there, so by its default": [
            f"{key}: {value}" for key, value, _ in _rows(made, "left out there")
        ],
        "Without effect here": [f"{key}: {words}" for key, _, words in _rows(made, "without effect")],
    }
    for title, entries in parts.items():
        lines += [f"{title}:", *(f"- {entry}" for entry in entries)] if entries else []
    # A value may hold any text: only what stands in one line is a comment.
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _print(made: Translation, file: Path, out: Path) -> None:
    head = ("key", "value", "")
    print_table(f"{file} of {made.tool}: translated", ("key", "value", "setting"), _rows(made, "translated"))
    for title, kind in (
        ("left out there, so by its default", "left out there"),
        ("without effect here", "without effect"),
        ("NOT carried over", "not carried over"),
    ):
        if rows := _rows(made, kind):
            print_table(title, head, rows)
    for title, entries in (("to look at", made.remarks), ("before training", made.before)):
        if entries:
            typer.echo(f"{title}:")
            for entry in entries:
                typer.echo(f"- {entry}")
    typer.echo(f"{out} is written; `longspan train {out} --dry-run` checks it")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
