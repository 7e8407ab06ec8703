"""`longspan data pairs` and `longspan data retrieval`: what an encoder-decoder with long context trains on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.counts import count_option
from longspan.cli.output import Json, Seed, example, percent, print_json, print_table

if TYPE_CHECKING:
    from longspan.data.pairs.windows import PairCount

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
Weight = Annotated[
    list[str] | None,
    typer.Option(
        help="DOMAIN=WEIGHT; may be given many times. Default: CEPE's shares if it knows all domains, else equal."
    ),
]
Specials = Annotated[
    str | None,
    typer.Option(help="none, bos, eos or both: what frames the documents of a store. Default: both."),
]
NumShards = Annotated[int, typer.Option(min=1, help="Shards of the retrieval corpus.")]
Shard = Annotated[int, typer.Option(min=0, help="Shard of the retrieval corpus to write, from 0.")]


def pairs(
    inputs: Inputs,
    mode: Annotated[
        str,
        typer.Option(
            help="ab: windows inside long documents. concat: windows of documents one after another."
        ),
    ],
    out: Out,
    encoder: Annotated[str, typer.Option(help="Tokens before the decoder's, such as 4k.")] = "4096",
    decoder: Annotated[str, typer.Option(help="Tokens of the decoder.")] = "4096",
    eval_samples: Annotated[int, count_option(help="Pairs for evaluation; 0: none.")] = 0,
    train_samples: Annotated[int, count_option(help="Pairs for training; 0: none.")] = 0,
    retrieval_samples: Annotated[
        int, count_option(help="Chunks of the shard of the retrieval corpus; 0: none.")
    ] = 0,
    shard: Shard = 0,
    num_shards: NumShards = 100,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer that turns ids into text; for the retrieval corpus.")
    ] = None,
    weight: Weight = None,
    specials: Specials = None,
    format: Annotated[
        str,
        typer.Option(help="mds: the ids in the dtype of the store. cepe: as CEPE's code reads them, int64."),
    ] = "mds",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Cut documents into pairs of an encoder and a decoder window, split into test, train and retrieval."""
    from typing import get_args

    from longspan.cli.data_stores import parse_weights
    from longspan.core.errors import ArgumentError
    from longspan.data.pairs.windows import PairConfig, PairFormat, plan_pairs, write_pairs

    if format not in get_args(PairFormat):
        raise ArgumentError("unknown --format", found=format, allowed=get_args(PairFormat))
    if not (eval_samples or train_samples or retrieval_samples):
        raise ArgumentError(
            "nothing to write", fix="give --eval-samples, --train-samples or --retrieval-samples"
        )
    if retrieval_samples and tokenizer is None:
        raise ArgumentError("--retrieval-samples needs --tokenizer, which turns ids into text")
    settings = {
        "mode": mode,
        "encoder": encoder,
        "decoder": decoder,
        "test": eval_samples,
        "train": train_samples,
        "weights": parse_weights(weight or []),
    }
    spec = PairConfig.from_dict(settings, where="the command line")
    documents = _open(inputs, specials)
    plan = plan_pairs(spec, documents, seed)
    written = write_pairs(plan, documents, out, format="cepe" if format == "cepe" else "mds")
    counts = list(plan.counts)
    if retrieval_samples:
        retrieval_settings = {
            "samples": retrieval_samples,
            "num_shards": num_shards,
            "mode": mode,
            "weights": spec.weights,
        }
        folder, of_shard = _write_shard(retrieval_settings, documents, str(tokenizer), shard, seed, out)
        written.append(folder)
        counts += of_shard
    _show(written, counts, as_json)


def retrieval(
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer that turns ids into text.")],
    samples: Annotated[int, count_option(help="Chunks of the shard, all domains together.", min=1)],
    out: Out,
    shard: Shard = 0,
    num_shards: NumShards = 100,
    chunk: Annotated[str, typer.Option(help="Tokens of a chunk, and at most of its neighbor.")] = "512",
    weight: Weight = None,
    specials: Specials = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write one shard of a retrieval corpus: chunks of text with what follows them, as JSON lines."""
    from longspan.cli.data_stores import parse_weights

    settings = {
        "samples": samples,
        "num_shards": num_shards,
        "chunk": chunk,
        "weights": parse_weights(weight or []),
    }
    folder, counts = _write_shard(settings, _open(inputs, specials), tokenizer, shard, seed, out)
    _show([folder], counts, as_json)


def _open(inputs: list[Path], specials: str | None) -> Any:
    from typing import get_args

    from longspan.core.errors import ArgumentError
    from longspan.data.exchange.token_documents import Specials as Known
    from longspan.data.exchange.token_documents import open_documents

    if specials is not None and specials not in get_args(Known):
        raise ArgumentError("unknown --specials", found=specials, allowed=get_args(Known))
    return open_documents(inputs, specials=specials)  # type: ignore[arg-type]


def _write_shard(
    settings: dict[str, Any], documents: Any, tokenizer: str, shard: int, seed: int, out: Path
) -> tuple[Path, list[PairCount]]:
    from longspan.core.errors import DataError
    from longspan.data.pairs.retrieval import RetrievalConfig, plan_retrieval, write_retrieval
    from longspan.data.tokenizer import load_tokenizer

    spec = RetrievalConfig.from_dict(settings, where="the command line")
    loaded = load_tokenizer(tokenizer)
    if documents.tokenizer not in (None, loaded.fingerprint):
        raise DataError(f"{tokenizer} is not the tokenizer that made the store")
    plan = plan_retrieval(spec, documents, shard, seed)
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
