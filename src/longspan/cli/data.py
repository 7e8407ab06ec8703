"""`longspan data`: from raw text to a plan of packed rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli import data_fetch, data_tokenize
from longspan.cli.output import Json, Seed, example, percent, print_json, print_lengths, print_table

if TYPE_CHECKING:
    import numpy as np

    from longspan.data.lengths import LengthTable
    from longspan.data.store import TokenStore

app = typer.Typer(
    help="Tokenize text once, choose documents, place them in rows.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command(epilog=data_tokenize.EXAMPLE)(data_tokenize.tokenize)
app.command(epilog=data_fetch.EXAMPLE)(data_fetch.fetch)

PlanOut = Annotated[Path, typer.Option(help="Folder to write; a plan of the same kind there is replaced.")]
Stores = Annotated[list[Path], typer.Argument(metavar="STORE", help="Token stores.")]


@app.command(epilog=example("longspan data lengths store"))
def lengths(stores: Stores, as_json: Json = False) -> None:
    """Show documents, tokens and lengths of each source."""
    table, _ = _open_stores(stores)
    _show_lengths(table.summary("stores", ", ".join(str(store) for store in stores)), as_json)


@app.command(epilog=example("longspan data mix store --mode per_source --tokens 2000 --out mixture"))
def mix(
    stores: Stores,
    out: PlanOut,
    mode: Annotated[
        str,
        typer.Option(
            help="none: every document. global: short documents are kept with probability --keep-short. "
            "per_source: the same, and every source keeps its share of the tokens. upsample: some sources "
            "get a new --weight. proportions: only the sources with a --weight."
        ),
    ] = "per_source",
    tokens: Annotated[str | None, typer.Option(help="Tokens to choose, such as 5B.")] = None,
    keep_short: Annotated[
        float | None, typer.Option(help="Probability that a short document is kept.")
    ] = None,
    threshold: Annotated[str, typer.Option(help="Documents with fewer tokens are short.")] = "4096",
    weight: Annotated[list[str] | None, typer.Option(help="SOURCE=WEIGHT; may be given many times.")] = None,
    max_repeat: Annotated[int, typer.Option(min=1, help="How often one document may be used.")] = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose documents by length and source; writes a mixture plan."""
    from longspan.data.mixture import MixtureSpec, plan_mixture

    settings = {
        "mode": mode,
        "tokens": tokens,
        "keep_short": keep_short,
        "threshold": threshold,
        "weights": _weights(weight or []),
        "max_repeat": max_repeat,
    }
    spec = MixtureSpec.from_dict(settings, where="the command line")
    table, paths = _open_stores(stores)
    plan = plan_mixture(spec, table, seed)
    plan.save(out, stores=paths)
    if as_json:
        print_json({"plan": str(out), "fingerprint": plan.fingerprint, **plan.report.to_dict()})
    else:
        _print_mixture(str(out), plan.report)


@app.command(epilog=example("longspan data pack mixture --length 512 --specials eos --out rows"))
def pack(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="PLAN|STORE", help="A mixture plan, or token stores to take whole."),
    ],
    length: Annotated[str, typer.Option(help="Tokens in a row, such as 128k.")],
    out: PlanOut,
    strategy: Annotated[
        str,
        typer.Option(
            help="concat: documents follow one another and are cut at row ends. intact: a row holds one document. "
            "best_fit: documents that fit a row are not cut, rows are padded."
        ),
    ] = "concat",
    min_length: Annotated[str, typer.Option(help="Shorter documents are left out.")] = "1",
    min_tail: Annotated[str, typer.Option(help="Shorter last pieces of cut documents are left out.")] = "1",
    remainder: Annotated[
        str, typer.Option(help="drop or pad: what becomes of a row that is not full.")
    ] = "drop",
    specials: Annotated[str, typer.Option(help="none, bos, eos or both: what frames a document.")] = "none",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Place documents in rows of one length; writes a pack plan, no tokens are copied."""
    import numpy as np

    from longspan.data.columns import folder_kind
    from longspan.data.mixture import KIND, MixturePlan, MixtureSpec, plan_mixture
    from longspan.data.packing import PackSpec, plan_packing

    if folder_kind(inputs[0]) == KIND:
        mixture = MixturePlan.load(inputs[0])
        table, paths = _open_stores(_stores_of(mixture.stores, inputs[0]))
        _check_lengths(table, mixture.lengths_fingerprint, inputs[0])
        documents = np.asarray(mixture.documents)
    else:
        table, paths = _open_stores(inputs)
        documents = plan_mixture(MixtureSpec.from_dict({"mode": "none"}), table, seed).documents
    settings = {
        "length": length,
        "strategy": strategy,
        "min_length": min_length,
        "min_tail": min_tail,
        "remainder": remainder,
        "specials": specials,
        **_special_ids(paths),
    }
    plan = plan_packing(PackSpec.from_dict(settings, where="the command line"), table, documents, seed)
    plan.save(out, stores=paths)
    if as_json:
        print_json({"plan": str(out), "fingerprint": plan.fingerprint, **plan.report.to_dict()})
    else:
        _print_packing(str(out), plan.report)


@app.command(epilog=example("longspan data peek rows --index 0 --tokenizer tokenizer"))
def peek(
    path: Annotated[
        Path, typer.Argument(metavar="STORE|PLAN", help="A token store, a mixture plan or a pack plan.")
    ],
    index: Annotated[int, typer.Option(min=0, help="Document of a store, or row of a pack plan.")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer that turns ids into text.")] = None,
    as_json: Json = False,
) -> None:
    """Show what is inside: a document of a store, the sources of a mixture, a row of a pack plan."""
    from longspan.data import mixture, packing
    from longspan.data.columns import folder_kind

    kind = folder_kind(path)
    if kind == mixture.KIND:
        plan = mixture.MixturePlan.load(path)
        if as_json:
            print_json({"kind": kind, "spec": plan.spec.to_dict(), "report": plan.report.to_dict()})
        else:
            _print_mixture(str(path), plan.report)
    elif kind == packing.KIND:
        _peek_row(path, index, tokenizer, as_json)
    else:
        _peek_document(path, index, tokenizer, as_json)


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
        "tokens": len(ids),
        "weighted_tokens": None if mask is None else int((mask != 1).sum()),
        "ids": ids[:32].tolist(),
        "text": _decode(tokenizer, ids[:256], store),
    }
    if as_json:
        print_json(found)
    else:
        print_table(f"document {index} of {path}", ("what", "found"), list(found.items())[1:])


def _peek_row(path: Path, index: int, tokenizer: str | None, as_json: bool) -> None:
    from longspan.data.loader import RowLoader
    from longspan.data.packing import PackPlan
    from longspan.data.store import TokenStore

    plan = PackPlan.load(path)
    stores = [TokenStore(store) for store in _stores_of(plan.stores, path)]
    row = RowLoader(stores, plan).row(index)
    spans: list[dict[str, Any]] = []
    for number, source in enumerate(row.sources.tolist()):
        start, end = int(row.cu_seqlens[number]), int(row.cu_seqlens[number + 1])
        spans.append({
            "start": start,
            "tokens": end - start,
            "source": row.source_names[source],
            "document": int(row.documents[number]),
            "continues": bool(row.continuation[number]),
            "loss_weight": int(row.weights[start:end].sum()),
            "text": _decode(tokenizer, row.input_ids[start : min(end, start + 16)], stores[0]),
        })  # fmt: skip
    if as_json:
        print_json({"plan": str(path), "rows": plan.num_rows, "row": index, "spans": spans})
        return
    columns = [name for name in spans[0] if tokenizer is not None or name != "text"]
    title = f"row {index} of {plan.num_rows} in {path}, {plan.spec.length} tokens"
    print_table(title, columns, [[span[name] for name in columns] for span in spans])


def _open_stores(paths: list[Path]) -> tuple[LengthTable, list[str]]:
    """Return the joined length table of stores and their absolute paths, which plans remember."""
    from longspan.core.errors import DataError
    from longspan.data.lengths import LengthTable
    from longspan.data.store import TokenStore

    stores = [TokenStore(path) for path in paths]
    for store in stores[1:]:
        if store.manifest.tokenizer["fingerprint"] != stores[0].manifest.tokenizer["fingerprint"]:
            raise DataError(
                "the stores were made with different tokenizers",
                found=f"{stores[0].path} and {store.path}",
                fix="tokenize both with the same tokenizer",
            )
    return LengthTable.concatenate([store.lengths for store in stores]), [os.path.abspath(p) for p in paths]


def _stores_of(stores: tuple[str, ...], plan: Path) -> list[Path]:
    from longspan.core.errors import DataError

    if not stores:
        raise DataError(f"the plan {plan} does not say which stores it was made from", fix="plan again")
    return [Path(store) for store in stores]


def _check_lengths(table: LengthTable, fingerprint: str, plan: Path) -> None:
    from longspan.core.errors import DataError

    if table.fingerprint != fingerprint:
        raise DataError(f"the stores have changed since the plan {plan} was made", fix="plan again")


def _special_ids(stores: list[str]) -> dict[str, int | None]:
    """Return the ids that frame and pad documents; padding weighs nothing, so any id will do for it."""
    from longspan.data.store import TokenStore

    known = TokenStore(stores[0]).manifest.tokenizer
    pad = next((known[name] for name in ("pad_id", "eos_id") if known[name] is not None), 0)
    return {"bos_id": known["bos_id"], "eos_id": known["eos_id"], "pad_id": pad}


def _weights(given: list[str]) -> dict[str, float]:
    from longspan.core.errors import ArgumentError

    weights: dict[str, float] = {}
    for item in given:
        # The last "=" separates: the name of a source is free text.
        source, _, number = item.rpartition("=")
        try:
            weights[source] = float(number)
        except ValueError:
            source = ""
        if not source:
            raise ArgumentError(
                "--weight is written SOURCE=WEIGHT", found=repr(item), allowed="such as books=0.5"
            )
    return weights


def _decode(tokenizer: str | None, ids: np.ndarray, store: TokenStore) -> str | None:
    from longspan.core.errors import DataError
    from longspan.data.tokenizer import load_tokenizer

    if tokenizer is None:
        return None
    loaded = load_tokenizer(tokenizer)
    if loaded.fingerprint != store.manifest.tokenizer["fingerprint"]:
        raise DataError(f"{tokenizer} is not the tokenizer that made {store.path}")
    return loaded.decode(ids.tolist())


def _show_lengths(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(summary)
    else:
        print_lengths(summary)


def _print_mixture(title: str, report: Any) -> None:
    from longspan.core.units import format_count

    rows: list[list[object]] = [
        [
            name,
            format_count(source.available_tokens),
            percent(source.share_before),
            format_count(source.documents),
            format_count(source.tokens),
            percent(source.share_after),
            format_count(source.shortfall),
        ]
        for name, source in report.sources.items()
    ]
    total = [format_count(report.documents), format_count(report.tokens)]
    rows.append(["total", None, None, *total, None, format_count(report.shortfall)])
    columns = ("source", "available", "share", "documents", "chosen tokens", "share", "missing")
    print_table(f"mixture: {title}", columns, rows)


def _print_packing(title: str, report: Any) -> None:
    from longspan.core.units import format_count

    rows = [
        ("rows", report.rows),
        ("documents", report.documents),
        ("tokens in", report.tokens_in),
        ("tokens packed", report.tokens_packed),
        ("special tokens", report.special_tokens),
        ("padding", report.padding_tokens),
        *((f"dropped: {reason}", count) for reason, count in report.dropped.items()),
    ]
    print_table(f"rows: {title}", ("what", "count"), [(name, format_count(count)) for name, count in rows])
