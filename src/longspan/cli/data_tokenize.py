"""`longspan data tokenize`: text to a token store, here, on a Slurm array or on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.data_jobs import (
    ExecutorName,
    ExecutorOption,
    JobId,
    Jobs,
    NumJobs,
    PrintSbatch,
    RayAddress,
    Workers,
    missing_words,
)
from longspan.cli.output import Json, Seed, example, percent, print_json, print_lengths, print_table

if TYPE_CHECKING:
    from longspan.data.jobs import ArrayJob
    from longspan.data.plans.mixture import MixtureConfig
    from longspan.data.tokenize import CorpusJob

EXAMPLE = example("longspan data tokenize texts --tokenizer tokenizer --out store")


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
    text_field: Annotated[str, typer.Option(help="Field of a record that holds the text.")] = "text",
    source_field: Annotated[
        str | None, typer.Option(help="Field that names the source. Default: the place of the file does.")
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Field whose value joins records into one document, such as the name of a repository."
        ),
    ] = None,
    order_by: Annotated[
        str | None,
        typer.Option(
            help="Field that orders the records of a group, by number also where numbers are written as text. "
            "Default: as they stand."
        ),
    ] = None,
    header_field: Annotated[
        str | None,
        typer.Option(help="Field with a file name, put as a comment above each record of a group."),
    ] = None,
    messages_field: Annotated[
        str | None, typer.Option(help="Field that holds a conversation, instead of a text.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Template of conversations: a shipped name or a Jinja file. Default: the tokenizer's."
        ),
    ] = None,
    begin_with_user: Annotated[
        bool,
        typer.Option(
            "--begin-with-user",
            help="Leave out a first turn of conversations that is not the user's, such as a system turn; counted.",
        ),
    ] = False,
    mix: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Sample while reading: a YAML file, or settings such as mode=per_source,keep_short=0.1. "
            "Needs --tokens; `data mix` then makes the exact mixture.",
        ),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="With --mix: tokens to sample, such as 5B.")] = None,
    seed: Seed = 0,
    workers: Workers = 1,
    executor: ExecutorOption = ExecutorName.local,
    num_jobs: NumJobs = None,
    job_id: JobId = None,
    ray_address: RayAddress = None,
    print_sbatch: PrintSbatch = False,
    merge_only: Annotated[
        bool, typer.Option("--merge-only", help="Put the store together; jobs have made all pieces.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Stop at the first record that cannot be used (broken, without a wanted field, of another type), or "
            "file without such records. Default: they are left out and counted.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Encode every document into a token store; one that is already complete is kept."""
    from longspan.data.tokenize import CorpusJob
    from longspan.data.tokenizer import load_tokenizer

    jobs = Jobs(executor, workers, num_jobs, job_id, ray_address)
    if print_sbatch:
        jobs.print_sbatch("longspan-tokenize")
        return
    share = jobs.share()
    loaded = load_tokenizer(tokenizer)
    chat = None
    if messages_field is not None or chat_template is not None or begin_with_user:
        from longspan.data.chat import load_chat_format

        chat = load_chat_format(loaded, chat_template, begin_with_user=begin_with_user)
    job = CorpusJob(
        inputs,
        loaded,
        out,
        text_field=text_field,
        source_field=source_field,
        group_by=group_by,
        order_by=order_by,
        header_field=header_field,
        messages_field=messages_field,
        chat=chat,
        mix=_spec(mix, tokens),
        seed=seed,
        strict=strict,
    )
    if merge_only:
        job.merge_only()
    else:
        with jobs.start() as running:
            job.run_share(running, share)
    _print_result(job, share, as_json)


def _spec(mix: str | None, tokens: str | None) -> MixtureConfig | None:
    from longspan.core.config import apply_overrides, read_yaml
    from longspan.core.errors import ArgumentError
    from longspan.data.plans.mixture import MixtureConfig

    if mix is None:
        if tokens is not None:
            raise ArgumentError("--tokens has an effect only with --mix", fix="give --mix mode=per_source")
        return None
    if Path(mix).is_file():
        where, values = mix, read_yaml(mix)
    else:
        where, values = "--mix", apply_overrides({}, mix.split(","))
    if tokens is not None:
        values["tokens"] = tokens
    return MixtureConfig.from_dict(values, where=where)


def _print_result(job: CorpusJob, share: ArrayJob, as_json: bool) -> None:
    store = job.finished(quiet=True)
    if store is None:
        missing = len(job.missing())
        found = {"job": share.index, "jobs": share.count, "pieces": job.num_units, "missing": missing}
        if as_json:
            print_json(found)
        else:
            typer.echo(missing_words(share, job.num_units, missing, "the store"))
        return
    summary = store.lengths.summary("store", str(job.out))
    sampled = store.manifest.counts.get("sampling")
    if as_json:
        print_json(summary if sampled is None else {**summary, "sampling": sampled})
        return
    print_lengths(summary)
    if sampled is not None:
        _print_sampled(job, sampled)


def _print_sampled(job: CorpusJob, sampled: dict[str, Any]) -> None:
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
    typer.echo(f"The exact mixture: {' '.join(mix_command(str(job.out), sampled))}")
