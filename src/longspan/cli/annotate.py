"""`longspan annotate`: what a teacher predicts after every token of a store, for distillation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from longspan.cli.output import Json, example, percent, print_json, print_table

if TYPE_CHECKING:
    from longspan.annotate.config import AnnotateConfig
    from longspan.annotate.estimate import AnnotateEstimate
    from longspan.data.jobs import ArrayJob

app = typer.Typer(
    help="Write beside a store what a teacher predicts after every token.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

TOPK_EXAMPLE = example(
    "longspan data pack store --length 128 --out student-rows",
    "longspan annotate topk --model model --data student-rows --k 8 --mass 0.99 --dry-run",
    "longspan annotate topk --model model --data student-rows --k 8 --num-shards 2 --shard 0 --out taught",
    "longspan annotate topk --model model --data student-rows --k 8 --num-shards 2 --shard 1 --out taught",
)
MERGE_EXAMPLE = example("longspan annotate merge taught-0 taught-1 --out taught")

Schedule = Literal["ring", "striped", "dist_flash", "ulysses", "all_gather"]


@app.command(epilog=TOPK_EXAMPLE)
def topk(
    model: Annotated[
        str, typer.Option(help="The teacher: Hugging Face folder, hub name, or folder of an adapter.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Pack plan, packed rows or token store (each document by itself); with --format cepe the folder of "
            "one domain of `data pairs`, or of several."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; with --format cepe it is named as CEPE does unless it is given."),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Words kept after each token.")] = 50,
    mass: Annotated[
        float | None,
        typer.Option(help="Keep only as many words as hold this mass, such as 0.99; at most --k."),
    ] = None,
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="Of the logarithms.")] = "float16",
    format: Annotated[
        Literal["longspan", "cepe"],
        typer.Option(
            help="longspan: columns for `train`. cepe: target_prob and target_index of CEPE's windows."
        ),
    ] = "longspan",
    encoder_tokens: Annotated[
        str | None,
        typer.Option(help="cepe: last tokens of prev_token_ids that the teacher reads. Default: 2048."),
    ] = None,
    decoder_tokens: Annotated[
        str | None, typer.Option(help="cepe: first tokens of token_ids, which are annotated. Default: 2048.")
    ] = None,
    retrieval: Annotated[
        Path | None,
        typer.Option(help="cepe: folder like --data whose retrieved_token_ids are read as the encoder's."),
    ] = None,
    retrieval_k: Annotated[
        int | None, typer.Option(min=1, help="cepe: passages of --retrieval. Default: 8.")
    ] = None,
    rope: Annotated[
        str | None,
        typer.Option(help="RoPE instead of the teacher's own, such as '{rope_type: linear, factor: 8}'."),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Tokens that the teacher reads, beyond what its config says; 128k say.")
    ] = None,
    model_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of the teacher's weights. Default: as saved."),
    ] = None,
    quantize: Annotated[
        Literal["nf4"] | None, typer.Option(help="Keep the teacher's linear layers in 4 bits.")
    ] = None,
    cp: Annotated[int, typer.Option(min=1, help="Processes that share each row; GPUs under torchrun.")] = 1,
    schedule: Annotated[Schedule, typer.Option(help="How keys travel among the --cp processes.")] = "ring",
    batch_tokens: Annotated[
        str, typer.Option(help="Tokens in one forward pass, at least one row.")
    ] = "16384",
    num_shards: Annotated[
        int, typer.Option(min=1, help="Parts, each a folder OUT-0, OUT-1, ... that `annotate merge` joins.")
    ] = 1,
    shard: Annotated[int, typer.Option(min=0, help="Which of the parts to write, from 0.")] = 0,
    workers: Workers = 1,
    executor: ExecutorOption = ExecutorName.local,
    num_jobs: NumJobs = None,
    job_id: JobId = None,
    ray_address: RayAddress = None,
    print_sbatch: PrintSbatch = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what it will take on disk and what would take less.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write what a teacher predicts after every token: its likeliest words and the mass of all others.

    Killed at any time, the same command goes on. `train` distils from it (objective: distill).
    """
    jobs = Jobs(executor, workers, num_jobs, job_id, ray_address)
    if print_sbatch:
        jobs.print_sbatch("annotate")
        return
    from longspan.annotate.run import shard_folder
    from longspan.cli.output import quiet_transformers
    from longspan.core.config import parse_yaml
    from longspan.core.errors import ArgumentError
    from longspan.core.launched import is_first
    from longspan.data.jobs import ArrayJob

    quiet_transformers()
    settings: dict[str, Any] = {
        "teacher": {
            "model": model, "rope": parse_yaml(rope, where="--rope") if rope else None, "context": context,
            "dtype": model_dtype, "quantize": quantize, "cp": cp, "schedule": schedule,
            "batch_tokens": batch_tokens,
        },
        "data": str(data), "k": k, "mass": mass, "dtype": dtype,
    }  # fmt: skip
    if shard >= num_shards:
        raise ArgumentError(
            "there is no such shard",
            found=f"--shard {shard}",
            allowed=f"0 to {num_shards - 1} of --num-shards",
        )
    part = ArrayJob(shard, num_shards)
    windows = {
        "encoder_tokens": encoder_tokens, "decoder_tokens": decoder_tokens, "retrieval_k": retrieval_k,
        "retrieval": None if retrieval is None else str(retrieval),
    }  # fmt: skip
    windows = {name: value for name, value in windows.items() if value is not None}
    if format == "cepe":
        specs = _cepe_specs({**settings, "pairs": windows}, data, retrieval, out)
    else:
        if windows:
            raise ArgumentError(f"--{next(iter(windows)).replace('_', '-')} is for --format cepe")
        if out is None and not dry_run:
            raise ArgumentError("where shall the annotations go?", fix="give --out")
        specs = {out or Path(): _spec(settings)}
    if dry_run:
        found = {str(path): _estimated(spec, part) for path, spec in specs.items()}
        if is_first():
            _show_estimates(found, as_json)
        return
    targets = {shard_folder(path, part): spec for path, spec in specs.items()}
    complete = [path for path, spec in targets.items() if _annotate(spec, path, part, jobs)]
    # Under torchrun the first process speaks.
    if complete and is_first():
        _show(complete, as_json)


@app.command(epilog=MERGE_EXAMPLE)
def merge(
    shards: Annotated[list[Path], typer.Argument(help="Folders that `annotate topk --num-shards` made.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    as_json: Json = False,
) -> None:
    """Join shards of annotations; their files are linked, not copied, where the disk can."""
    from longspan.annotate.merge import merge as merge_shards

    merge_shards(shards, out)
    _show([out], as_json)


def _spec(settings: dict[str, Any]) -> AnnotateConfig:
    from longspan.annotate.config import AnnotateConfig

    return AnnotateConfig.from_dict(settings, where="the command line")


def _cepe_specs(
    settings: dict[str, Any], data: Path, retrieval: Path | None, out: Path | None
) -> dict[Path, AnnotateConfig]:
    """Return the work of each domain by the folder it is written to.

    INPUT-logits-enc2048-dec2048-MODEL/DOMAIN, and RETRIEVAL-ret_k8-dec2048-MODEL/DOMAIN
    """
    from longspan.annotate.sources import cepe_folder, pair_domains

    specs = {}
    for domain, pairs in pair_domains(data).items():
        of_domain = {**settings, "data": str(pairs)}
        if retrieval is not None:
            found = pair_domains(retrieval).get(domain, retrieval / domain)
            of_domain["pairs"] = {**settings["pairs"], "retrieval": str(found)}
        spec = _spec(of_domain)
        assert spec.pairs is not None
        folder = out or cepe_folder(pairs, spec.pairs, spec.teacher.model)
        specs[folder / domain] = spec
    return specs


def _estimated(spec: AnnotateConfig, part: ArrayJob) -> AnnotateEstimate:
    from longspan.annotate.run import estimate_job

    return estimate_job(spec, shard=part)


def _annotate(spec: AnnotateConfig, out: Path, part: ArrayJob, jobs: Jobs) -> bool:
    """Write one folder; return whether it is complete, and say so if other jobs have not ended."""
    from longspan.annotate.run import annotate

    share = jobs.share()
    alone = jobs.executor is not ExecutorName.ray and jobs.workers == 1
    done = annotate(spec, out, shard=part, executor=None if alone else jobs.start(use_gpus=True), share=share)
    if done.missing:
        typer.echo(missing_words(share, done.pieces, done.missing, str(out)))
    return not done.missing


def _show_estimates(found: dict[str, AnnotateEstimate], as_json: bool) -> None:
    from longspan.core.units import format_bytes, format_count

    if as_json:
        values = {
            path: {**each._asdict(), "options": [option._asdict() for option in each.options]}
            for path, each in found.items()
        }
        print_json(values)
        return
    for path, each in found.items():
        rows = [
            [
                option.name,
                f"{option.words:.1f}",
                f"{100 * option.mass:.1f}%",
                f"{option.bytes_per_token:.0f}",
                format_bytes(option.num_bytes),
                percent(option.saves) if number else None,
            ]
            for number, option in enumerate(each.options)
        ]
        columns = ("options", "words a token", "mass they hold", "bytes a token", "in all", "saves")
        title = f"{format_count(each.tokens)} tokens in {format_count(each.rows)} rows"
        where = "" if path == "." else f" to {path}"
        print_table(f"{title}{where}; after a sample of {each.sample_tokens:,} tokens", columns, rows)


def _show(written: list[Path], as_json: bool) -> None:
    from longspan.core.units import format_bytes, format_count
    from longspan.data.rows.annotations import read_annotation_manifest

    manifests = {str(path): read_annotation_manifest(path) for path in written}
    if as_json:
        shown = ("kind", "first", "rows", "source_rows", "tokens", "words", "k", "mass", "dtype", "teacher")
        print_json({path: {name: getattr(each, name) for name in shown} for path, each in manifests.items()})
        return
    rows = [
        [
            path,
            f"{each.first}-{each.stop - 1} of {each.source_rows}",
            format_count(each.tokens),
            f"{each.words / max(1, each.tokens):.1f}",
            format_bytes(sum(piece["bytes"] for piece in each.pieces)),
        ]
        for path, each in manifests.items()
    ]
    columns = ("written", "rows", "tokens", "words a token", "size")
    teacher = next(iter(manifests.values())).teacher["path"]
    print_table(f"what {teacher} predicts", columns, rows)
