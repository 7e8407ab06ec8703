"""`longspan data pairs` and `longspan data retrieval`: what an encoder-decoder with long context trains on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from longspan.cli.from_settings import Part, Used, from_settings, write_used
from longspan.cli.output import Json, Seed, example, percent, print_json, print_table
from longspan.core.errors import ArgumentError
from longspan.core.units import parse_count

if TYPE_CHECKING:
    from longspan.data.exchange.token_documents import TokenDocuments
    from longspan.data.pairs.retrieval import RetrievalConfig
    from longspan.data.pairs.windows import PairConfig, PairCount

PAIRS_EXAMPLE = example(
    "longspan data pairs store --mode ab --encoder 48 --decoder 16 --eval-samples 8 --train-samples 40 --out pairs"
)
RETRIEVAL_EXAMPLE = example("longspan data retrieval store --tokenizer tokenizer --samples 20 --out pairs")

Inputs = Annotated[
    list[Path],
    typer.Argument(
        metavar="STORE|INPUT", help="Token stores; or .npy token files of CEPE, or folders of them."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder to write; what is complete there is kept.")]
Specials = Annotated[
    Literal["none", "bos", "eos", "both"] | None,
    typer.Option(help="What frames the documents of a store. Default: both."),
]
NumShards = Annotated[int, typer.Option(min=1, help="Shards of the retrieval corpus.")]
Shard = Annotated[int, typer.Option(min=0, help="Shard of the retrieval corpus to write, from 0.")]


def _count(value: str | int) -> int:
    """Read a count: `2e6`, `2M` and `2,000,000` are two million."""
    try:
        return parse_count(value)
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from None


@from_settings(
    settings=Part(
        "longspan.data.pairs.windows:PairConfig",
        names={"test": "--eval-samples", "train": "--train-samples", "weights": "--weight"},
    )
)
def pairs(
    inputs: Inputs,
    settings: PairConfig,
    used: Used,
    out: Out,
    retrieval_samples: Annotated[
        int,
        typer.Option(
            parser=_count, metavar="COUNT", help="Chunks of the shard of the retrieval corpus; 0: none."
        ),
    ] = 0,
    shard: Shard = 0,
    num_shards: NumShards = 100,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer that turns ids into text; for the retrieval corpus.")
    ] = None,
    specials: Specials = None,
    format: Annotated[
        Literal["mds", "cepe"],
        typer.Option(help="mds: the ids in the dtype of the store. cepe: as CEPE's code reads them, int64."),
    ] = "mds",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Cut documents into pairs of an encoder and a decoder window, split into test, train and retrieval."""
    from longspan.data.exchange.token_documents import open_documents
    from longspan.data.pairs.retrieval import RetrievalConfig
    from longspan.data.pairs.windows import plan_pairs, write_pairs

    if not (settings.test or settings.train or retrieval_samples):
        raise ArgumentError(
            "nothing to write", fix="give --eval-samples, --train-samples or --retrieval-samples"
        )
    if retrieval_samples and tokenizer is None:
        raise ArgumentError("--retrieval-samples needs --tokenizer, which turns ids into text")
    documents = open_documents(inputs, specials=specials)
    plan = plan_pairs(settings, documents, seed)
    written = write_pairs(plan, documents, out, format=format)
    counts = list(plan.counts)
    if retrieval_samples:
        chunks = RetrievalConfig(
            samples=retrieval_samples, num_shards=num_shards, mode=settings.mode, weights=settings.weights
        )
        folder, of_shard = _write_shard(chunks, documents, str(tokenizer), shard, seed, out)
        written.append(folder)
        counts += of_shard
    write_used(used, out)
    _show(written, counts, as_json)


@from_settings(
    settings=Part(
        "longspan.data.pairs.retrieval:RetrievalConfig", without=["mode"], names={"weights": "--weight"}
    )
)
def retrieval(
    inputs: Inputs,
    settings: RetrievalConfig,
    used: Used,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer that turns ids into text.")],
    out: Out,
    shard: Shard = 0,
    specials: Specials = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write one shard of a retrieval corpus: chunks of text with what follows them, as JSON lines."""
    from longspan.data.exchange.token_documents import open_documents

    documents = open_documents(inputs, specials=specials)
    folder, counts = _write_shard(settings, documents, tokenizer, shard, seed, out)
    write_used(used, folder)
    _show([folder], counts, as_json)


def _write_shard(
    settings: RetrievalConfig, documents: TokenDocuments, tokenizer: str, shard: int, seed: int, out: Path
) -> tuple[Path, list[PairCount]]:
    from longspan.core.errors import DataError
    from longspan.data.pairs.retrieval import plan_retrieval, write_retrieval
    from longspan.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    if documents.tokenizer not in (None, loaded.fingerprint):
        raise DataError(f"{tokenizer} is not the tokenizer that made the store")
    plan = plan_retrieval(settings, documents, shard, seed)
    return write_retrieval(plan, documents, loaded, out), list(plan.counts)


def _show(written: list[Path], counts: list[PairCount], as_json: bool) -> None:
    from longspan.core.units import format_count

    if as_json:
        print_json(
            {"written": [str(path) for path in written], "counts": [each._asdict() for each in counts]}
        )
        return
    rows = [
        [
            count.part,
            count.domain,
            format_count(count.documents),
            format_count(count.available),
            format_count(count.pairs),
            percent(count.pairs / count.available if count.available else None),
            format_count(count.wanted - count.pairs),
        ]
        for count in counts
    ]
    columns = ("part", "domain", "documents", "available", "written", "share", "missing")
    print_table(f"written: {', '.join(map(str, written))}", columns, rows)
