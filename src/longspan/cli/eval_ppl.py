"""`longspan eval ppl`: perplexity of unseen text, as records, a table, a CSV file and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.counts import count_option
from longspan.cli.eval_options import Bos, Note, Out, SourceField, TextField
from longspan.cli.model_options import ModelOptions, opened, takes_model
from longspan.cli.output import Json, Plot, Seed, example, print_json, print_table
from longspan.core.log import log_once

if TYPE_CHECKING:
    from longspan.data.exchange.token_documents import TokenDocuments
    from longspan.eval.held_out import HeldOutDocument
    from longspan.eval.ppl import PplConfig

EXAMPLE = example(
    "longspan eval ppl --model model --data texts --lengths 64,256 --out run",
    "longspan eval ppl --model model --data texts --lengths 256 --stride 64 --label sliding --out run",
)


@takes_model
def ppl(
    model: ModelOptions,
    data: Annotated[
        list[str],
        typer.Option(
            help="Documents that training did not see: texts, or token stores and other tokenised sets; many times."
        ),
    ],
    out: Out,
    lengths: Annotated[
        str | None, typer.Option(help="Window lengths in tokens, such as 1k,4k,32k; none with --full.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Slide over whole documents, so many tokens further each time; all of them are measured.",
        ),
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Measure the first tokens of each document, up to each length.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Measure each document as one window.")] = False,
    spans: Annotated[
        int,
        typer.Option(
            min=1, help="Without these: spans of the longest length for each source, cut to each length."
        ),
    ] = 16,
    num_documents: Annotated[
        int | None, count_option(help="Documents of each source, drawn by the seed. Default: all.", min=1)
    ] = None,
    first: Annotated[
        bool, typer.Option("--first", help="Take the first --num-documents of each source, not a draw.")
    ] = False,
    min_tokens: Annotated[int, count_option(help="Leave out shorter documents.")] = 0,
    max_tokens: Annotated[int | None, count_option(help="Leave out longer documents.", min=1)] = None,
    bos: Annotated[
        Bos,
        typer.Option(
            help="Whether each window begins with the begin-of-text token, as one of its tokens. auto: as the "
            "tokenizer itself would have it. Without, a first token is context only."
        ),
    ] = "auto",
    buckets: Annotated[int, typer.Option(min=1, help="Points of the curve over positions.")] = 16,
    csv: Annotated[
        Path | None, typer.Option(help="Write perplexity by length of all models in --out: a line each.")
    ] = None,
    plot: Plot = None,
    xmin: Annotated[float | None, typer.Option(help="Of the figure: shortest length.")] = None,
    xmax: Annotated[float | None, typer.Option(help="Of the figure: longest length.")] = None,
    ymin: Annotated[float | None, typer.Option(help="Of the figure: lowest perplexity.")] = None,
    ymax: Annotated[float | None, typer.Option(help="Of the figure: highest perplexity.")] = None,
    text_field: TextField = "text",
    source_field: SourceField = None,
    note: Note = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure perplexity of unseen text by context length and by position, each token weighted alike."""
    settings = {
        "lengths": lengths.split(",") if lengths else [],
        "cut": _cut(stride=stride is not None, truncate=truncate, full=full),
        "stride": stride,
        "num_spans": spans,
        "num_buckets": buckets,
        "num_documents": num_documents,
        "first": first,
        "min_tokens": min_tokens,
        "max_tokens": max_tokens,
        "bos": bos,
        "seed": seed,
    }
    from longspan.eval.ppl import PplConfig

    task = PplConfig.from_dict(settings, where="the command line")
    _check_limits("--xmin", xmin, "--xmax", xmax)
    _check_limits("--ymin", ymin, "--ymax", ymax)
    documents = _open(data, text_field, source_field)
    summary = _measure(model, task, documents, out, note)
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


def _measure(
    model: ModelOptions,
    task: PplConfig,
    documents: Sequence[HeldOutDocument] | TokenDocuments,
    out: Path,
    note: str | None,
) -> dict[str, Any]:
    from longspan.core.errors import ArgumentError

    if model.is_remote:
        raise ArgumentError(
            "servers do not say how likely a text is",
            found=model.model,
            allowed="models that are run here, with --cp or --tp where they are large",
        )
    if model.chat_template is not None:
        raise ArgumentError("perplexity is that of the text itself", fix="leave out --chat-template")
    from longspan.eval.ppl_run import run_ppl
    from longspan.infer.distributed import GivesLosses
    from longspan.infer.requests import copies_of

    with opened(model) as asked:
        assert isinstance(asked.answerer, GivesLosses)
        most = asked.answerer.max_length
        if most is not None and not task.lengths:
            raise ArgumentError(
                "--full measures each document as a whole",
                found=f"--max-length {most}",
                fix=f"leave longer ones out with --max-tokens {most}, or cut them with --truncate",
            )
        if most is not None and max(task.lengths) > most:
            raise ArgumentError(
                "windows are longer than the model is to be given",
                found=f"{max(task.lengths)} tokens",
                allowed=f"--max-length {most}",
            )
        return run_ppl(
            asked.answerer.token_nll,
            asked.tokenizer,
            task,
            documents=documents,
            label=asked.label,
            out=asked.records(out, "ppl"),
            model_info=asked.answerer.identity,
            note=note,
            batch_tokens=model.batch_tokens,
            copies=copies_of(asked.answerer),
        )


def _cut(**given: bool) -> str:
    """Return how documents are cut: what was asked for, else spans."""
    from longspan.core.errors import ArgumentError

    asked = [name for name, value in given.items() if value]
    if len(asked) > 1:
        raise ArgumentError(
            "documents are cut in one way at a time", found=" ".join(f"--{name}" for name in asked)
        )
    return {"stride": "sliding"}.get(asked[0], asked[0]) if asked else "spans"


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


def _open(
    data: Sequence[str], text_field: str, source_field: str | None
) -> Sequence[HeldOutDocument] | TokenDocuments:
    from longspan.core.errors import DataError
    from longspan.eval.held_out import read_held_out
    from longspan.eval.ppl_documents import is_tokenised, open_tokenised

    tokenised = [is_tokenised(Path(each)) for each in data]
    if all(tokenised):
        return open_tokenised([Path(each) for each in data])
    if any(tokenised):
        raise DataError("some inputs are tokenised and some are texts", fix="give one kind at a time")
    return read_held_out(data, text_field=text_field, source_field=source_field)


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
