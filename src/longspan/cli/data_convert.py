"""`longspan data convert`, `merge` and `split`: whole stores, plans and rows in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from longspan.cli.data_jobs import write_settings
from longspan.cli.data_stores import Stores
from longspan.cli.from_settings import Used, from_settings
from longspan.cli.output import Json, example, print_json, print_table

CONVERT_EXAMPLE = example(
    "longspan data convert rows --to jsonl --out chunks",
    "longspan data convert store --to parquet --out documents.parquet",
    "longspan data convert documents.parquet --to store --tokenizer tokenizer --out again",
)
MERGE_EXAMPLE = example("longspan data merge store store --out merged")
SPLIT_EXAMPLE = example(
    "longspan data split store --out train=0.6,validation=0.4",
    "longspan data pack train --length 512 --out train-rows",
    "longspan data split store --out train-store=0.6,validation-store=0.4 --materialize",
)


@from_settings()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN|ROWS|STORE|TOKENS",
            help="A pack plan, packed rows, a token store; for --to store also MDS of ids, CEPE's .npy, "
            "datatrove's .ds, Megatron's .bin and .idx, or documents that this command wrote.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="Rows: mds, jsonl, parquet or npy. A store: jsonl, parquet, columns, or npy, which are CEPE's files, "
            "one for each source. store, for tokens of other tools."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Place to write; nothing may stand there.")],
    used: Used,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer of the ids, for --to store.")] = None,
    specials: Annotated[
        Literal["none", "bos", "eos", "both"] | None,
        typer.Option(help="What frames each document of a store in npy. Default: both, as CEPE has it."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that write rows; the result does not depend on it.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Write rows or documents in another format, or take token data of other tools over as a store."""
    from longspan.data.exchange.convert import convert as write
    from longspan.data.tokenizer import load_tokenizer

    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    kind = write(source, out, format=to, tokenizer=loaded, specials=specials, num_workers=workers)
    if out.is_dir():
        write_settings(used, out)
    if as_json:
        print_json({"out": str(out), "kind": kind, "format": to})
    else:
        typer.echo(f"{kind} written as {to}: {out}")


@from_settings()
def merge(
    stores: Stores,
    out: Annotated[Path, typer.Option(help="Token store to make.")],
    used: Used,
    as_json: Json = False,
) -> None:
    """Make one store of several with the same tokenizer; shards are linked where the disk allows it."""
    from longspan.data.exchange.whole_stores import merge_stores

    merged = merge_stores(stores, out)
    write_settings(used, merged.path)
    _show({str(out): merged.lengths}, as_json)


@from_settings()
def split(
    stores: Stores,
    out: Annotated[
        str,
        typer.Option(
            help="Parts and their shares, such as train=0.98,validation=0.01,test=0.01: plans to write."
        ),
    ],
    used: Used,
    materialize: Annotated[
        bool, typer.Option("--materialize", help="Copy the documents into stores instead of writing plans.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Split stores by document; the same document always goes to the same part.

    Each part is a plan that `data pack` and `data mix` take in place of a store.
    """
    from longspan.core.errors import ArgumentError
    from longspan.data.exchange.whole_stores import split_plans, split_store
    from longspan.steps.stores import lengths_of

    parts = _parts(out)
    if not materialize:
        table, paths = lengths_of(stores)
        plans = split_plans(table, parts)
        for name, plan in plans.items():
            plan.save(name, stores=paths)
            write_settings(used, Path(name))
        rows = [(name, plan.report.documents, plan.report.tokens) for name, plan in plans.items()]
        _print(rows, "plan", as_json)
        return
    if len(stores) != 1:
        raise ArgumentError(
            "one store is copied at a time",
            found=f"{len(stores)} stores",
            fix="merge them, or leave out --materialize",
        )
    copied = split_store(stores[0], parts)
    for store in copied.values():
        write_settings(used, store.path)
    _show({name: store.lengths for name, store in copied.items()}, as_json)


def _parts(given: str) -> dict[str, float]:
    """Read PART=SHARE,... Raises ArgumentError for what is not written so."""
    from longspan.core.errors import ArgumentError

    parts: dict[str, float] = {}
    for item in given.split(","):
        # The last "=" separates: a path may hold one.
        name, _, share = item.rpartition("=")
        try:
            parts[name] = float(share)
        except ValueError:
            name = ""
        if not name:
            raise ArgumentError(
                "--out is written PART=SHARE,...",
                found=repr(item),
                allowed="such as train=0.9,validation=0.1",
            )
    return parts


def _show(stores: dict, as_json: bool) -> None:
    rows = [(name, len(lengths), lengths.total_tokens) for name, lengths in stores.items()]
    _print(rows, "store", as_json)


def _print(rows: list[tuple[str, int, int]], kind: str, as_json: bool) -> None:
    if as_json:
        print_json([{kind: name, "documents": d, "tokens": t} for name, d, t in rows])
    else:
        print_table(f"{kind}s", (kind, "documents", "tokens"), rows)
