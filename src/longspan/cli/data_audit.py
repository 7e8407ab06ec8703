"""`longspan data audit`: what is in token stores or raw input, before weeks of training go into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.data_stores import open_tokenizer
from longspan.cli.from_settings import Part, Used, from_settings, write_used
from longspan.cli.output import Json, Plot, example, percent, print_json, print_table

if TYPE_CHECKING:
    from longspan.annotate.long_range import LongRangeConfig
    from longspan.data.audit.audit_config import AuditConfig
    from longspan.data.store import TokenStore
    from longspan.data.store.measures import Measures
    from longspan.data.tokenize import TokenizeConfig

EXAMPLE = example(
    "longspan data audit store --tokenizer tokenizer --out audit",
    "longspan data audit texts --tokenizer tokenizer --out audit",
    "longspan data mix store --mode none --where 'near_duplicate == 0' --audit audit --out distinct",
)
_SHARES = ("exact_duplicate", "near_duplicate", "repeated", "repeated_lines", "boilerplate", "symbols")


@from_settings(
    settings=Part("longspan.data.audit.audit_config:AuditConfig"),
    far=Part(
        "longspan.annotate.long_range:LongRangeConfig",
        names={"documents": "--long-range-documents"},
        help={
            "context": "With --model: tokens that it reads with far context; shorter documents are not measured.",
            "scored": "With --model: tokens whose losses are compared, with far context and with as many before.",
            "documents": "With --model: documents of each source that it reads.",
        },
    ),
    reading=Part(
        "longspan.data.tokenize.tokenize_config:TokenizeConfig",
        without=["shard_bytes", "begin_with_user", "conversations", "mix", "seed"],
    ),
)
def audit(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="STORE|INPUT",
            help="Token stores; or what `data tokenize` takes: files, folders, patterns, addresses, @LIST. Raw input "
            "is tokenized beside the result for as long as it takes.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; an audit there is replaced.")],
    settings: AuditConfig,
    far: LongRangeConfig,
    reading: TokenizeConfig,
    used: Used,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer of the stores, without which lines, symbols and languages are left out; raw input needs "
            "one, best that of the model to train."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model of the stores' tokenizer, which tells how much far context helps: long_range."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the result does not depend on it.")] = 1,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Find duplicates, repetition, boilerplate, languages, and whether far context helps in long documents.

    Nothing is rewritten: the audit is a folder of columns by which `data mix --where` chooses.
    """
    from contextlib import ExitStack

    from longspan.core.errors import ArgumentError
    from longspan.data.audit.inputs import are_stores, store_of_input
    from longspan.data.audit.job import audit as run
    from longspan.data.audit.summary import measures_of, summarize
    from longspan.data.jobs import LocalExecutor
    from longspan.data.store.lengths import LengthTable
    from longspan.data.tokenize import TokenizeConfig
    from longspan.steps.stores import open_alike

    places = [os.path.abspath(place) if os.path.exists(place) else place for place in data]
    with ExitStack() as stack:
        executor = stack.enter_context(LocalExecutor(workers))
        if are_stores(data):
            if reading != TokenizeConfig():
                raise ArgumentError(
                    "how texts are read has no effect on token stores, which are read already"
                )
            opened, name = open_alike(data), None
            reader = open_tokenizer(tokenizer, opened[0])
        else:
            reader, name = open_tokenizer(tokenizer, None), ", ".join(places)
            opened = [stack.enter_context(store_of_input(data, reader, out, reading, executor))]
        table = LengthTable.concatenate([store.lengths for store in opened])
        measures = run(opened, out, settings, tokenizer=reader, executor=executor, name=name)
        if model is not None:
            measures = _with_long_range(measures, opened, model, far)
            measures.save(out)
        rows = summarize(measures.of(table), table)
    write_used({**used, "data": places}, out)
    names = measures_of(rows)
    if plot is not None:
        from longspan.report.figures import audit_figure, write_figure

        write_figure(audit_figure(rows, names), plot)
    if as_json:
        print_json({"audit": str(out), "documents": len(table), "rows": rows})
    else:
        _print(str(out), rows, names)


def _with_long_range(
    measures: Measures, stores: list[TokenStore], model: str, far: LongRangeConfig
) -> Measures:
    from dataclasses import replace

    from longspan.annotate.long_range import measure_long_range
    from longspan.core.errors import DataError
    from longspan.infer.config import AnswererConfig
    from longspan.infer.distributed import GivesLosses
    from longspan.steps.opening import opened

    with opened(AnswererConfig(model=model)) as asked:
        assert isinstance(asked.answerer, GivesLosses)
        if asked.tokenizer.fingerprint != stores[0].manifest.tokenizer["fingerprint"]:
            raise DataError(f"the tokenizer of {model} is not the one that made {stores[0].path}")
        column = measure_long_range(stores, asked.answerer.token_nll, far)
    return replace(measures, columns={**measures.columns, "long_range": column})


def _print(title: str, rows: list[dict[str, Any]], names: list[str]) -> None:
    from longspan.core.units import format_count

    lines = [
        [row["source"], row["lengths"], format_count(row["documents"]), format_count(row["tokens"])]
        + [_cell(name, row[name]) for name in names]
        for row in rows
    ]
    columns = ("source", "length", "documents", "tokens", *(name.replace("_", " ") for name in names))
    print_table(f"audit, by tokens: {title}", columns, lines)


def _cell(name: str, found: dict[str, Any]) -> str | None:
    if "shares" in found:
        return ", ".join(f"{language or 'not known'} {percent(s)}" for language, s in found["shares"].items())
    if found["mean"] is None:
        return None
    return percent(found["mean"]) if name in _SHARES else f"{found['mean']:.3g}"
