"""`longspan annotate`: what a teacher predicts after every token of a store, for distillation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longspan.cli.data_jobs import JOBS, PrintSbatch, missing_words, write_settings
from longspan.cli.from_settings import Part, Used, from_settings
from longspan.cli.output import Json, example, percent, print_json, print_table

if TYPE_CHECKING:
    from longspan.annotate.config import AnnotateConfig
    from longspan.annotate.estimate import AnnotateEstimate
    from longspan.cli.jobs_config import JobsConfig
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


def _windows(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that --format cepe implies."""
    return {"pairs": {}} if given["format"] == "cepe" else {}


SETTINGS = Part(
    "longspan.annotate.config:AnnotateConfig",
    without=["piece_tokens"],
    nested=["teacher", "pairs"],
    # As everywhere, --dtype would be that of the weights.
    names={"teacher.dtype": "--model-dtype", "dtype": "--log-dtype"},
    old={"--dtype": "dtype"},
    under=_windows,
)


@from_settings(settings=SETTINGS, jobs=JOBS)
def topk(
    settings: AnnotateConfig,
    jobs: JobsConfig,
    used: Used,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; with --format cepe it is named as CEPE does unless it is given."),
    ] = None,
    format: Annotated[
        Literal["longspan", "cepe"],
        typer.Option(
            help="longspan: columns for `train`. cepe: target_prob and target_index of CEPE's windows."
        ),
    ] = "longspan",
    num_shards: Annotated[
        int, typer.Option(min=1, help="Parts, each a folder OUT-0, OUT-1, ... that `annotate merge` joins.")
    ] = 1,
    shard: Annotated[int, typer.Option(min=0, help="Which of the parts to write, from 0.")] = 0,
    print_sbatch: PrintSbatch = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what it will take on disk and what would take less.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write what a teacher predicts after every token: its likeliest words and the mass of all others.

    Killed at any time, the same command goes on. `train` distils from it (objective: distill).
    """
    if print_sbatch:
        jobs.print_sbatch("annotate")
        return
    from longspan.annotate.run import estimate_job, shard_folder
    from longspan.core.errors import ArgumentError
    from longspan.core.launched import is_first
    from longspan.data.jobs import ArrayJob
    from longspan.steps.opening import quiet_transformers

    quiet_transformers()
    if shard >= num_shards:
        raise ArgumentError(
            "there is no such shard",
            found=f"--shard {shard}",
            allowed=f"0 to {num_shards - 1} of --num-shards",
        )
    part = ArrayJob(shard, num_shards)
    if format == "cepe":
        specs = _cepe_specs(settings, out)
    else:
        if settings.pairs is not None:
            name = min(settings.pairs.model_fields_set).replace("_", "-")
            raise ArgumentError(f"--{name} is for --format cepe")
        if out is None and not dry_run:
            raise ArgumentError("where shall the annotations go?", fix="give --out")
        specs = {out or Path(): settings}
    if dry_run:
        found = {str(path): estimate_job(spec, shard=part) for path, spec in specs.items()}
        if is_first():
            _show_estimates(found, as_json)
        return
    targets = {shard_folder(path, part): spec for path, spec in specs.items()}
    complete = [path for path, spec in targets.items() if _annotate(spec, path, part, jobs)]
    # Under torchrun the first process alone logs.
    if complete and is_first():
        for path in complete:
            write_settings(used, path)
        _show(complete, as_json)


def merge(
    shards: Annotated[list[Path], typer.Argument(help="Folders that `annotate topk --num-shards` made.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    as_json: Json = False,
) -> None:
    """Join shards of annotations; their files are linked, not copied, where the disk can."""
    from longspan.annotate.merge import merge as merge_shards

    merge_shards(shards, out)
    _show([out], as_json)


app.command(epilog=TOPK_EXAMPLE)(topk)
app.command(epilog=MERGE_EXAMPLE)(merge)


def _cepe_specs(settings: AnnotateConfig, out: Path | None) -> dict[Path, AnnotateConfig]:
    """Return the work of each domain by the folder it is written to.

    INPUT-logits-enc2048-dec2048-MODEL/DOMAIN, and RETRIEVAL-ret_k8-dec2048-MODEL/DOMAIN
    """
    from longspan.annotate.sources import cepe_folder, pair_domains

    windows = settings.pairs
    assert windows is not None
    retrieved = {} if windows.retrieval is None else pair_domains(Path(windows.retrieval))
    specs = {}
    for domain, pairs in pair_domains(Path(settings.data)).items():
        of_domain = windows
        if windows.retrieval is not None:
            found = str(retrieved.get(domain, Path(windows.retrieval) / domain))
            of_domain = windows.model_copy(update={"retrieval": found})
        folder = out or cepe_folder(pairs, of_domain, settings.teacher.model)
        specs[folder / domain] = settings.model_copy(update={"data": str(pairs), "pairs": of_domain})
    return specs


def _annotate(spec: AnnotateConfig, out: Path, part: ArrayJob, jobs: JobsConfig) -> bool:
    """Write one folder; return whether it is complete, and say so if other jobs have not ended."""
    from longspan.annotate.run import annotate

    share = jobs.share()
    alone = jobs.executor != "ray" and jobs.workers == 1
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
