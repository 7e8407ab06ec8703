"""`longspan eval ppl`: perplexity of unseen text, as records, a table, a CSV file and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.eval_options import Note, Out
from longspan.cli.eval_tasks import DATA, DATA_FIELDS
from longspan.cli.from_settings import Part, Used, from_settings
from longspan.cli.model_options import MODEL
from longspan.cli.output import Json, Plot, example, print_json, print_table
from longspan.core.log import log_once

if TYPE_CHECKING:
    from longspan.eval.held_out import TaskDataConfig
    from longspan.eval.ppl import PplConfig
    from longspan.infer.config import AnswererConfig

EXAMPLE = example(
    "longspan eval ppl --model model --data texts --lengths 64,256 --out run",
    "longspan eval ppl --model model --data texts --lengths 256 --stride 64 --label sliding --out run",
)


def _sliding(given: dict[str, Any]) -> dict[str, Any]:
    """Return how documents are cut where a stride says it."""
    return {} if given.get("stride") is None else {"cut": "sliding"}


SETTINGS = Part(
    "longspan.eval.ppl:PplConfig",
    without=["split"],
    old={
        "--spans": "num_spans",
        "--buckets": "num_buckets",
        "--truncate": ("cut", "truncate"),
        "--full": ("cut", "full"),
    },
    under=_sliding,
)
TEXTS = Part(
    DATA,
    without=DATA_FIELDS[3:],
    names={"paths": "--data"},
    help={
        "paths": "Documents that training did not see: texts, or token stores and other tokenised sets; many times."
    },
)


@from_settings(settings=SETTINGS, data=TEXTS, model=MODEL)
def ppl(
    settings: PplConfig,
    data: TaskDataConfig,
    model: AnswererConfig,
    used: Used,
    out: Out,
    csv: Annotated[
        Path | None, typer.Option(help="Write perplexity by length of all models in --out: a line each.")
    ] = None,
    plot: Plot = None,
    xmin: Annotated[float | None, typer.Option(help="Of the figure: shortest length.")] = None,
    xmax: Annotated[float | None, typer.Option(help="Of the figure: longest length.")] = None,
    ymin: Annotated[float | None, typer.Option(help="Of the figure: lowest perplexity.")] = None,
    ymax: Annotated[float | None, typer.Option(help="Of the figure: highest perplexity.")] = None,
    note: Note = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity of unseen text by context length and by position, each token weighted alike."""
    from longspan.steps.evaluate import evaluate_model

    _check_limits("--xmin", xmin, "--xmax", xmax)
    _check_limits("--ymin", ymin, "--ymax", ymax)
    summary = evaluate_model(model, "ppl", out, settings, data=data, note=note, used=used)
    if csv is not None:
        _write_csv(out, csv)
    if plot is not None:
        _draw(out, plot, x=(xmin, xmax), y=(ymin, ymax))
    if as_json:
        print_json(summary)
        return
    rows = [
        [
            row["source"],
            f"{row['length']:,}",
            f"{row['tokens']:,}",
            *map(_decimal, (row["perplexity"], row["bits_per_byte"])),
        ]
        for row in summary["by_length"]
    ]
    title = f"perplexity, {summary['label']}: {summary['scored']} of {summary['samples']} windows scored"
    print_table(title, ("source", "length", "tokens", "perplexity", "bits per byte"), rows)


def _check_limits(low: str, least: float | None, high: str, most: float | None) -> None:
    """Raise ArgumentError where a limit of the figure, whose axes are logarithmic, is none."""
    from longspan.core.errors import ArgumentError

    for name, value in ((low, least), (high, most)):
        if value is not None and not 0 < value < float("inf"):
            raise ArgumentError(
                f"{name} is not a limit of the figure", found=value, allowed="numbers above 0"
            )
    if least is not None and most is not None and least >= most:
        raise ArgumentError(f"{low} is not below {high}", found=f"{least:g} and {most:g}")


def _write_csv(out: Path, path: Path) -> None:
    """Write `,64,256` and a line `label,perplexity,perplexity` for each model, all sources together.

    Models of several tokenizers have bits per byte instead.
    """
    import csv

    from longspan.core.files import atomic_write
    from longspan.eval.ppl import perplexities
    from longspan.eval.records import read_records

    files = [read_records(file) for file in sorted((out / "records").glob("ppl-*.jsonl"))]
    measure = "perplexity"
    if len({found.header["tokenizer"] for found in files}) > 1:
        measure = "bits_per_byte"
        log_once("eval", f"{path} holds bits per byte: perplexities of several tokenizers cannot be compared")
    table: dict[str, dict[int, float | None]] = {}
    for found in files:
        together = perplexities({**sample, "source": ""} for sample in found.samples)
        table[found.header["label"]] = {row["length"]: row[measure] for row in together}
    lengths = sorted({length for row in table.values() for length in row})
    with atomic_write(path, "w") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["", *lengths])
        for label, row in table.items():
            writer.writerow([label, *("" if (value := row.get(n)) is None else value for n in lengths)])


def _draw(
    out: Path,
    path: Path,
    *,
    x: tuple[float | None, float | None],
    y: tuple[float | None, float | None],
) -> None:
    """Draw perplexity by position and by length; the limits are those of lengths and perplexities."""
    from longspan.report.evaluation import Evaluation
    from longspan.report.figures import perplexity_figure, write_figure
    from longspan.report.load import load_run

    records = [file for file in load_run(out).records if file.task == "ppl"]
    figure = perplexity_figure(Evaluation.from_records(records))
    by_position, by_length = figure.axes
    by_length.set_xlim(*x)
    for axes in (by_position, by_length):
        axes.set_ylim(*y)
    write_figure(figure, path)


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
