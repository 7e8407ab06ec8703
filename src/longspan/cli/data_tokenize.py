"""`longspan data tokenize`: text to a token store, here, on a Slurm array or on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.data_jobs import JOBS, PrintSbatch, missing_words, write_settings
from longspan.cli.from_settings import Part, Used, from_settings
from longspan.cli.output import Json, example, percent, print_json, print_lengths, print_table

if TYPE_CHECKING:
    from longspan.cli.jobs_config import JobsConfig
    from longspan.data.jobs import ArrayJob
    from longspan.data.store import TokenStore
    from longspan.data.tokenize import CorpusJob, TokenizeConfig

EXAMPLE = example("longspan data tokenize texts --tokenizer tokenizer --out store")


def _sampled(given: dict[str, Any]) -> dict[str, Any]:
    """Refuse a number of tokens without a mixture that draws them."""
    from longspan.core.errors import ArgumentError

    mix = given.get("mix")
    if isinstance(mix, dict) and set(mix) == {"tokens"}:
        raise ArgumentError(
            "--tokens has an effect only with --mix", fix="give --mix mode=per_source,tokens=..."
        )
    return {}


SETTINGS = Part(
    "longspan.data.tokenize.tokenize_config:TokenizeConfig",
    without=["shard_bytes"],
    old={"--tokens": "mix.tokens"},
    under=_sampled,
)


@from_settings(settings=SETTINGS, jobs=JOBS)
def tokenize(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="Files, folders, glob patterns, addresses or @LIST, a file that lists them; also compressed. "
            "Links are followed. What is read how: docs/inputs.md.",
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Folder, tokenizer.json, SentencePiece .model, .tiktoken file (FILE#llama-3 says how it splits "
            "texts), or a name on the Hugging Face hub."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Token store to make.")],
    settings: TokenizeConfig,
    jobs: JobsConfig,
    used: Used,
    print_sbatch: PrintSbatch = False,
    merge_only: Annotated[
        bool, typer.Option("--merge-only", help="Put the store together; jobs have made all pieces.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Encode every document into a token store; one that is already complete is kept."""
    from longspan.data.store.token_store import MANIFEST
    from longspan.data.tokenize import CorpusJob, tokenize_corpus
    from longspan.data.tokenizer import load_tokenizer

    if print_sbatch:
        jobs.print_sbatch("longspan-tokenize")
        return
    share, was_there = jobs.share(), (out / MANIFEST).is_file()
    store: TokenStore | None
    if share.count == 1 and not merge_only:
        store = tokenize_corpus(inputs, tokenizer, out, settings, executor=jobs.start())
    else:
        job = CorpusJob(inputs, load_tokenizer(tokenizer), out, settings)
        if merge_only:
            store = job.merge_only()
        else:
            with jobs.start() as running:
                store = job.run_share(running, share)
    if store is None:
        _print_missing(job, share, as_json)
        return
    if not was_there:
        write_settings(used, store.path)
    _print_result(store, as_json)


def _print_missing(job: CorpusJob, share: ArrayJob, as_json: bool) -> None:
    missing = len(job.missing())
    if as_json:
        print_json({"job": share.index, "jobs": share.count, "pieces": job.num_units, "missing": missing})
    else:
        typer.echo(missing_words(share, job.num_units, missing, "the store"))


def _print_result(store: TokenStore, as_json: bool) -> None:
    summary = store.lengths.summary("store", str(store.path))
    sampled = store.manifest.counts.get("sampling")
    if as_json:
        print_json(summary if sampled is None else {**summary, "sampling": sampled})
        return
    print_lengths(summary)
    if sampled is not None:
        _print_sampled(str(store.path), sampled)


def _print_sampled(store: str, sampled: dict[str, Any]) -> None:
    from longspan.core.units import format_count
    from longspan.data.tokenize.sampling import mix_command

    rows = [
        [
            name,
            format_count(source["documents_read"]),
            percent(source["share_read"]),
            format_count(source["documents"]),
            format_count(source["tokens"]),
            None if source["wanted"] is None else format_count(source["wanted"]),
            format_count(source["shortfall"]),
        ]
        for name, source in sampled["sources"].items()
    ]
    columns = ("source", "read", "share", "documents", "tokens", "wanted", "missing")
    print_table("sampled while reading", columns, rows)
    typer.echo(f"The exact mixture: {' '.join(mix_command(store, sampled))}")
