"""`longspan data tokenize`: text to a token store, here, on a Slurm array or on Ray."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.output import Json, Seed, example, percent, print_json, print_lengths, print_table

if TYPE_CHECKING:
    from longspan.data.executor import ArrayJob
    from longspan.data.mixture import MixtureSpec
    from longspan.data.tokenize import CorpusJob

EXAMPLE = example("longspan data tokenize texts --tokenizer tokenizer --out store")


class ExecutorName(StrEnum):
    """Where the work runs."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


def tokenize(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="Files, folders, glob patterns, addresses or @LIST, a file that lists them; also compressed.",
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
        str | None, typer.Option(help="Field that orders the records of a group. Default: as they stand.")
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
    workers: Annotated[int, typer.Option(min=1, help="Processes; the result does not depend on it.")] = 1,
    executor: Annotated[
        ExecutorName, typer.Option(help="Where the work runs; the result does not depend on it.")
    ] = ExecutorName.local,
    num_jobs: Annotated[
        int | None, typer.Option(min=1, help="Jobs that share the work. Default with slurm: the array's.")
    ] = None,
    job_id: Annotated[int | None, typer.Option(min=0, help="Which of the jobs this is, from 0.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="With ray: a running cluster. Default: RAY_ADDRESS, else this machine.")
    ] = None,
    print_sbatch: Annotated[
        bool,
        typer.Option("--print-sbatch", help="Print a file for sbatch with --num-jobs jobs, do nothing else."),
    ] = False,
    merge_only: Annotated[
        bool, typer.Option("--merge-only", help="Put the store together; jobs have made all pieces.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first broken record.")] = False,
    as_json: Json = False,
) -> None:
    """Encode every document into a token store; one that is already complete is kept."""
    from longspan.data.executor import LocalExecutor, RayExecutor
    from longspan.data.tokenize import CorpusJob
    from longspan.data.tokenizer import load_tokenizer

    if print_sbatch:
        _print_sbatch(num_jobs, workers)
        return
    share = _share(executor, num_jobs, job_id)
    loaded = load_tokenizer(tokenizer)
    chat = None
    if messages_field is not None or chat_template is not None:
        from longspan.data.chat import load_chat_format

        chat = load_chat_format(loaded, chat_template)
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
        running = (
            RayExecutor(ray_address, num_workers=workers if workers > 1 else None)
            if executor is ExecutorName.ray
            else LocalExecutor(workers)
        )
        with running:
            job.run_share(running, share)
    _print_result(job, share, as_json)


def _share(executor: ExecutorName, num_jobs: int | None, job_id: int | None) -> ArrayJob:
    from longspan.core.errors import ArgumentError
    from longspan.data.executor import ArrayJob, array_job

    if (num_jobs is None) != (job_id is None):
        raise ArgumentError("--num-jobs and --job-id are given together")
    if num_jobs is not None and job_id is not None:
        return ArrayJob(job_id, num_jobs)
    return array_job() if executor is ExecutorName.slurm else ArrayJob()


def _spec(mix: str | None, tokens: str | None) -> MixtureSpec | None:
    from longspan.core.config import apply_overrides, read_yaml
    from longspan.core.errors import ArgumentError
    from longspan.data.mixture import MixtureSpec

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
    return MixtureSpec.from_dict(values, where=where)


def _print_sbatch(num_jobs: int | None, workers: int) -> None:
    from longspan.core.errors import ArgumentError
    from longspan.data.executor import sbatch_script

    if num_jobs is None:
        raise ArgumentError("how many jobs shall share the work?", fix="give --num-jobs")
    command, skip = ["longspan"], False
    for word in sys.argv[1:]:
        name = word.partition("=")[0]
        if not skip and name not in ("--print-sbatch", "--num-jobs", "--executor"):
            command.append(word)
        skip = not skip and name in ("--num-jobs", "--executor") and "=" not in word
    script = sbatch_script(
        [*command, "--executor", "slurm"], num_jobs=num_jobs, workers=workers, name="longspan-tokenize"
    )
    typer.echo(script, nl=False)


def _print_result(job: CorpusJob, share: ArrayJob, as_json: bool) -> None:
    store = job.finished(quiet=True)
    if store is None:
        missing = len(job.missing())
        found = {"job": share.index, "jobs": share.count, "pieces": job.num_units, "missing": missing}
        if as_json:
            print_json(found)
        else:
            typer.echo(
                f"job {share.index} of {share.count} is done; {missing} of {job.num_units} pieces are still "
                "missing, and the last job to end makes the store"
            )
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
