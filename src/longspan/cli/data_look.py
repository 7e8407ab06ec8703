"""`longspan data lengths`, `peek` and `verify`: what is inside, and whether it is whole."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.data_plan import print_mixture
from longspan.cli.data_stores import (
    Plot,
    Stores,
    decode,
    lengths_of,
    open_tokenizer,
    show_lengths,
    stores_of,
)
from longspan.cli.output import Json, example, print_json, print_table

if TYPE_CHECKING:
    from longspan.data.loader import PackedRow, RowSource
    from longspan.data.tokenizer import Tokenizer

LENGTHS_EXAMPLE = example("longspan data lengths store", "longspan data lengths store --plot lengths.png")
PEEK_EXAMPLE = example("longspan data peek rows --index 0 --tokenizer tokenizer")
VERIFY_EXAMPLE = example("longspan data verify store --against texts", "longspan data verify rows")

_COLORS = ("cyan", "magenta", "yellow", "green", "blue")
_HEAD_TOKENS = 160
_TAIL_TOKENS = 32


def lengths(stores: Stores, plot: Plot = None, as_json: Json = False) -> None:
    """Show documents, tokens and lengths of each source."""
    table, _ = lengths_of(stores)
    summary = table.summary("stores", ", ".join(str(store) for store in stores))
    show_lengths([summary], as_json, plot)
    if as_json:
        print_json(summary)


def peek(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="STORE|PLAN|ROWS", help="A token store, a mixture plan, a pack plan or packed rows."
        ),
    ],
    index: Annotated[int, typer.Option(min=0, help="Document of a store, or row.")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer that turns ids into text.")] = None,
    as_json: Json = False,
) -> None:
    """Show what is inside: a document, the sources of a mixture, a row with the borders of its documents."""
    from longspan.data import mixture, packing
    from longspan.data.columns import folder_kind
    from longspan.data.loader import RowLoader
    from longspan.data.packed_stores import PackedRows
    from longspan.data.store import TokenStore
    from longspan.data.verify import is_token_store

    kind = folder_kind(path)
    if kind == mixture.KIND:
        plan = mixture.MixturePlan.load(path)
        if as_json:
            print_json({"kind": kind, "spec": plan.spec.to_dict(), "report": plan.report.to_dict()})
        else:
            print_mixture(str(path), plan.report)
    elif kind == packing.KIND:
        packed = packing.PackPlan.load(path)
        stores = [TokenStore(store) for store in stores_of(packed.stores, path)]
        _peek_row(path, RowLoader(stores, packed), index, open_tokenizer(tokenizer, stores[0]), as_json)
    elif is_token_store(path):
        _peek_document(path, index, tokenizer, as_json)
    else:
        _peek_row(path, PackedRows(path), index, open_tokenizer(tokenizer, None), as_json)


def verify(
    path: Annotated[
        Path,
        typer.Argument(metavar="STORE|PLAN|ROWS", help="A token store, plan, packed rows or MDS folder."),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Input of the store; documents that are not in it yet are listed. May be repeated."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every byte: structure, counts, fingerprint, range of ids. Exit code 2 when something is wrong."""
    from longspan.data.verify import verify as check

    report = check(path, against=against or ())
    if as_json:
        print_json(report._asdict() | {"is_whole": report.is_whole})
    else:
        print_table(f"{report.kind} {path}", ("what", "count"), list(report.counts.items()))
        for problem in report.problems:
            typer.echo(f"problem: {problem}")
        for place in report.missing or ():
            typer.echo(f"not in the store: {place}")
        if report.missing is not None:
            typer.echo(f"documents of the input that are not in the store: {len(report.missing)}")
        typer.echo("whole" if report.is_whole else f"problems: {len(report.problems)}")
    if not report.is_whole:
        raise typer.Exit(2)


def _peek_document(path: Path, index: int, tokenizer: str | None, as_json: bool) -> None:
    from longspan.core.errors import ArgumentError
    from longspan.data.store import TokenStore

    store = TokenStore(path)
    if index >= len(store):
        raise ArgumentError("there is no such document", found=index, allowed=f"0 to {len(store) - 1}")
    ids, mask = store.tokens(index), store.mask(index)
    found = {
        "store": str(path),
        "documents": len(store),
        "document": index,
        "source": store.source(index),
        "key": f"{int(store.lengths.key[index]):016x}",
        "tokens": len(ids),
        "weighted_tokens": None if mask is None else int((mask != 1).sum()),
        "ids": ids[:32].tolist(),
        "text": decode(open_tokenizer(tokenizer, store), ids[:256]),
    }
    if as_json:
        print_json(found)
    else:
        print_table(f"document {index} of {path}", ("what", "found"), list(found.items())[1:])


def _peek_row(path: Path, rows: RowSource, index: int, tokenizer: Tokenizer | None, as_json: bool) -> None:
    row = rows.row(index)
    spans = _spans(row, tokenizer)
    if as_json:
        print_json({"plan": str(path), "rows": rows.num_rows, "row": index, "spans": spans})
        return
    columns = [name for name in spans[0] if name != "text"]
    title = f"row {index} of {rows.num_rows} in {path}, {rows.length} tokens"
    print_table(title, columns, [[span[name] for name in columns] for span in spans])
    if tokenizer is not None:
        _print_text(row, spans, tokenizer)


def _spans(row: PackedRow, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    spans = []
    for number, source in enumerate(row.sources.tolist()):
        start, end = int(row.cu_seqlens[number]), int(row.cu_seqlens[number + 1])
        spans.append({
            "start": start,
            "tokens": end - start,
            "source": row.source_names[source],
            "document": int(row.documents[number]),
            "continues": bool(row.continuation[number]),
            "loss_weight": int(row.weights[start:end].sum()),
            "text": decode(tokenizer, row.input_ids[start : min(end, start + 16)]),
        })  # fmt: skip
    return spans


def _print_text(row: PackedRow, spans: list[dict[str, Any]], tokenizer: Tokenizer) -> None:
    """Print the text of a row, each document in a colour of its own behind a line that names it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    for number, span in enumerate(spans):
        color = _COLORS[number % len(_COLORS)]
        start, end = span["start"], span["start"] + span["tokens"]
        again = ", continues" if span["continues"] else ""
        title = f" {start}..{end} {span['source']}, document {span['document']}{again} "
        console.rule(Text(title, style=f"bold {color}"), align="left", characters="-", style=color)
        ids = row.input_ids[start:end]
        if len(ids) <= _HEAD_TOKENS + _TAIL_TOKENS:
            text = tokenizer.decode(ids.tolist())
        else:
            left_out = len(ids) - _HEAD_TOKENS - _TAIL_TOKENS
            head, tail = ids[:_HEAD_TOKENS].tolist(), ids[-_TAIL_TOKENS:].tolist()
            text = f"{tokenizer.decode(head)}\n[... {left_out:,} tokens ...]\n{tokenizer.decode(tail)}"
        console.print(Text(text, style=color))
