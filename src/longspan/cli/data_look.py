"""`longspan data lengths`, `peek` and `verify`: what is inside, and whether it is whole."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.data_plan import print_mixture
from longspan.cli.data_stores import (
    Stores,
    decode,
    open_tokenizer,
    show_lengths,
)
from longspan.cli.output import Json, Plot, example, print_json, print_table

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from longspan.data.rows.loader import PackedRow, RowSource
    from longspan.data.tokenizer import Tokenizer

LENGTHS_EXAMPLE = example("longspan data lengths store", "longspan data lengths store --plot lengths.png")
PEEK_EXAMPLE = example("longspan data peek rows --index 0 --tokenizer tokenizer")
VERIFY_EXAMPLE = example("longspan data verify store --against texts", "longspan data verify rows")

_COLORS = ("cyan", "magenta", "yellow", "green", "blue")
_BRANCH = ("start", "branches off", "position")
_HEAD_TOKENS = 160
_TAIL_TOKENS = 32
_SHOWN_SPANS = 20
_SHOWN_CHARACTERS = 60


def lengths(stores: Stores, plot: Plot = None, as_json: Json = False) -> None:
    """Show documents, tokens and lengths of each source."""
    from longspan.steps.stores import lengths_of

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
    from longspan.core.columns import folder_kind
    from longspan.data.packed.manifest import is_token_store
    from longspan.data.packed.packed_rows import PackedRows
    from longspan.data.plans import mixture, packing
    from longspan.data.rows.loader import RowLoader
    from longspan.data.store import TokenStore
    from longspan.steps.stores import stores_of

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
    ids, mask, parts = store.tree_tokens(index), store.mask(index), store.parts(index)
    reader = open_tokenizer(tokenizer, store)
    found = {
        "store": str(path),
        "documents": len(store),
        "document": index,
        "source": store.source(index),
        "key": f"{int(store.lengths.key[index]):016x}",
        "tokens": len(ids),
        **_learnt_counts(mask, len(ids)),
        "ids": ids[:32].tolist(),
        "text": decode(reader, ids[:256]),
    }
    spans = [] if mask is None else _learnt_spans(ids, mask, reader)
    rows = [] if parts is None else parts.tolist()
    branches = [dict(zip(_BRANCH, row)) for row in rows]
    if as_json:
        print_json({**found, "branches": branches, "learnt": None if mask is None else spans})
        return
    print_table(f"document {index} of {path}", ("what", "found"), list(found.items())[1:])
    if branches:
        numbered = [[number, *row] for number, row in enumerate(rows)]
        print_table("what begins alike, and where it branches", ("part", *_BRANCH), numbered)
    if mask is not None:
        _print_learnt(f"learnt of document {index}; all else is only read", spans)
        if reader is not None:
            console = _console()
            console.rule(" green: learnt, reversed: what ends it ", align="left", characters="-")
            console.print(_masked_text(ids, mask, reader))


def _learnt_counts(weights: np.ndarray | None, tokens: int) -> dict[str, int]:
    """Return how many tokens are learnt, and how many of these weigh more or less than others."""
    if weights is None:
        return {"learnt_tokens": tokens, "weighted_tokens": 0}
    return {"learnt_tokens": int((weights > 0).sum()), "weighted_tokens": int((weights > 1).sum())}


def _learnt_spans(
    ids: np.ndarray, weights: np.ndarray, tokenizer: Tokenizer | None, *, first: int = 0
) -> list[dict[str, Any]]:
    """Return the stretches of tokens that are learnt, with the token that ends each: the end of a turn, or no end."""
    return [
        {
            "start": first + start,
            "tokens": end - start,
            "text": decode(tokenizer, ids[start:end]),
            "last_id": int(ids[end - 1]),
            "last_token": decode(tokenizer, ids[end - 1 : end]),
        }
        for start, end in _stretches(weights > 0)
        if weights[start] > 0
    ]


def _stretches(learnt: np.ndarray) -> list[tuple[int, int]]:
    """Return the stretches of one kind, learnt or not: [1 1 0] is 0..2 and 2..3."""
    import numpy as np

    borders = [0, *(np.flatnonzero(np.diff(learnt.astype(np.int8))) + 1).tolist(), len(learnt)]
    return [(start, end) for start, end in pairwise(borders) if start < end]


def _print_learnt(title: str, spans: list[dict[str, Any]]) -> None:
    shown = spans[:_SHOWN_SPANS]
    rows = [
        [
            span["start"],
            span["tokens"],
            _shortened(span["text"]),
            span["last_id"],
            _quoted(span["last_token"]),
        ]
        for span in shown
    ]
    print_table(title, ("start", "tokens", "text", "last id", "ends with"), rows)
    if len(spans) > len(shown):
        typer.echo(f"and {len(spans) - len(shown)} more (--json lists all)")
    elif not spans:
        typer.echo("nothing is learnt")


def _quoted(text: str | None) -> str | None:
    return None if text is None else repr(text)


def _shortened(text: str | None) -> str | None:
    if text is None or len(text) <= _SHOWN_CHARACTERS:
        return _quoted(text)
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]!r} ... {text[-half:]!r}"


def _masked_text(ids: np.ndarray, weights: np.ndarray, tokenizer: Tokenizer, *, color: str = "") -> Text:
    """Return the text of a document, its middle left out where it is long: bold is learnt, the token that ends it
    reversed, dim is only read."""
    from rich.text import Text

    text = Text()
    places = [(0, len(ids))]
    if len(ids) > _HEAD_TOKENS + _TAIL_TOKENS:
        places = [(0, _HEAD_TOKENS), (len(ids) - _TAIL_TOKENS, len(ids))]
    for number, (first, last) in enumerate(places):
        if number:
            text.append(f"\n[... {len(ids) - _HEAD_TOKENS - _TAIL_TOKENS:,} tokens ...]\n", style=color)
        for start, end in _stretches(weights[first:last] > 0):
            learnt = weights[first + start] > 0
            ends = learnt and (first + end == len(ids) or weights[first + end] == 0)
            said, closing = tokenizer.decode(ids[first + start : first + end].tolist()), ""
            if ends:
                closing = tokenizer.decode(ids[first + end - 1 : first + end].tolist())
                # A token that is a part of a character has no text of its own.
                closing = closing if said.endswith(closing) else ""
            style = f"bold {color or 'green'}" if learnt else f"dim {color}".strip()
            text.append(said.removesuffix(closing), style=style)
            text.append(closing, style=f"{style} reverse")
    return text


def _peek_row(path: Path, rows: RowSource, index: int, tokenizer: Tokenizer | None, as_json: bool) -> None:
    row = rows.row(index)
    spans = _spans(row, tokenizer)
    if as_json:
        print_json({"plan": str(path), "rows": rows.num_rows, "row": index, "spans": spans})
        return
    columns = [name for name in spans[0] if name not in ("text", "learnt")]
    title = f"row {index} of {rows.num_rows} in {path}, {rows.length} tokens"
    print_table(title, columns, [[span[name] for name in columns] for span in spans])
    for number, span in enumerate(spans):
        if 0 < span["learnt_tokens"] < span["tokens"]:
            start, end = span["start"], span["start"] + span["tokens"]
            learnt = _learnt_spans(row.input_ids[start:end], row.weights[start:end], tokenizer, first=start)
            _print_learnt(f"learnt of document {span['document']} (part {number} of the row)", learnt)
    if tokenizer is not None:
        _print_text(row, spans, tokenizer)


def _spans(row: PackedRow, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    from longspan.data.plans.packing import PAD_DOCUMENT

    spans = []
    for number, source in enumerate(row.sources.tolist()):
        document = int(row.documents[number])
        start, end = int(row.cu_seqlens[number]), int(row.cu_seqlens[number + 1])
        branch = {}
        if row.branches is not None:
            parent, position = row.branches[number].tolist()
            # Parts of the row, as they are listed here.
            branch = {"part": number, "branches off": None if parent < 0 else parent, "position": position}
        spans.append({
            "start": start,
            "tokens": end - start,
            "source": row.source_names[source],
            "document": None if document == PAD_DOCUMENT else document,
            "continues": bool(row.continuation[number]),
            **branch,
            "learnt_tokens": int((row.weights[start:end] > 0).sum()),
            "loss_weight": int(row.weights[start:end].sum()),
            "text": decode(tokenizer, row.input_ids[start : min(end, start + 16)]),
            "learnt": [
                {name: value for name, value in learnt.items() if name != "text"}
                for learnt in _learnt_spans(row.input_ids[start:end], row.weights[start:end], tokenizer, first=start)
            ],
        })  # fmt: skip
    return spans


def _print_text(row: PackedRow, spans: list[dict[str, Any]], tokenizer: Tokenizer) -> None:
    """Print the text of a row, each document in a colour of its own behind a line that names it; bold is learnt."""
    from rich.text import Text

    console = _console()
    for number, span in enumerate(spans):
        color = _COLORS[number % len(_COLORS)]
        start, end = span["start"], span["start"] + span["tokens"]
        again = ", continues" if span["continues"] else ""
        name = "" if span["document"] is None else f", document {span['document']}"
        title = f" {start}..{end} {span['source']}{name}{again} "
        console.rule(Text(title, style=f"bold {color}"), align="left", characters="-", style=color)
        weights = row.weights[start:end]
        console.print(_masked_text(row.input_ids[start:end], weights, tokenizer, color=color))


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)
