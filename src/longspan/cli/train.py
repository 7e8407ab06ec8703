"""`longspan train`: a recipe to a run folder with one Hugging Face folder per stage."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.output import Json, command_line, example, print_json, print_table

if TYPE_CHECKING:
    from longspan.train.config import TrainConfig
    from longspan.train.recipes import LoadedRecipe
    from longspan.train.resolve import ResolvedRecipe, ResolvedStage

EXAMPLE = example(
    "longspan train recipe.yaml --dry-run",
    "longspan train recipe.yaml --set seed=1 --out run",
    "longspan train prolong-64k --dry-run --gpu h100",
    "longspan train recipe.yaml --profile --out profiled",
    "longspan train prolong-512k --print-sbatch",
    "torchrun --nproc-per-node 4 -m longspan train recipe.yaml --set parallel.cp_ring=4",
)


class RecipeScale(StrEnum):
    """How large a recipe is run."""

    full = "full"
    tiny = "tiny"


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A YAML file, beside which stores are looked for, or a shipped recipe: easycontext-1m, fu-2024-80k, "
            "prolong-64k, qlora-80k and others; a wrong name lists all.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/ and the recipe's name.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE changes a setting, such as stages.0.lr=1e-4; many times."),
    ] = None,
    scale: Annotated[
        RecipeScale,
        typer.Option(
            help="tiny: the same stages with a small model on made data, some seconds on a CPU (docs/recipes.md)."
        ),
    ] = RecipeScale.full,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the recipe comes to, stage by stage, and stop.")
    ] = False,
    search_rope: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE",
            help="Search LongRoPE factors for a stage on its rows, print them as its rope, and stop.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPU that a dry run estimates for, as `longspan plan` takes it: h100, b200 ... Default: this machine."
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Record the third to fifth step with torch's profiler in RUN/profile."
        ),
    ] = False,
    print_sbatch: Annotated[
        bool,
        typer.Option("--print-sbatch", help="Print a file for sbatch that runs this on several nodes; stop."),
    ] = False,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node, for --print-sbatch.")] = 8,
    as_json: Json = False,
) -> None:
    """Train through the stages of a recipe; the same command goes on after a kill."""
    from longspan.core.errors import ArgumentError
    from longspan.steps.opening import quiet_transformers
    from longspan.train.recipes import load_recipe

    if gpu is not None and not dry_run:
        raise ArgumentError(
            "--gpu says what a dry run estimates for", fix="give --dry-run, or leave --gpu out"
        )
    loaded = load_recipe(recipe, [] if scale is RecipeScale.tiny else settings or [])
    command = _command(recipe, settings or [], scale, out)
    out = out or Path("runs") / (loaded.name if scale is RecipeScale.full else f"{loaded.name}-{scale.value}")
    if print_sbatch:
        _print_sbatch(loaded, gpus_per_node)
        return
    quiet_transformers()
    if scale is RecipeScale.tiny:
        from longspan.steps.train import at_tiny_scale

        loaded = at_tiny_scale(loaded, settings or [], out)
        recipe = f"{recipe} --scale tiny"
    config, root = loaded.config, loaded.folder
    if dry_run:
        _dry_run(recipe, command, config, root, gpu, as_json=as_json)
        return
    if search_rope is not None:
        _search_rope(config, root, scale, search_rope, as_json=as_json)
        return
    _train(config, out, root, profile=profile, as_json=as_json)


def _train(config: TrainConfig, out: Path, root: Path, *, profile: bool, as_json: bool) -> None:
    from longspan.parallel.launch import is_first_process
    from longspan.steps.train import train_model

    result = train_model(config, out, data_root=root, profile=profile)
    if not is_first_process():
        return
    models = {stage: str(path) for stage, path in result.models.items()}
    if as_json:
        print_json({"run": str(out), "steps": result.steps, "tokens": result.tokens, "models": models})
    else:
        title = f"{out}: {result.steps:,} steps, {result.tokens:,} tokens"
        print_table(title, ("stage", "model"), list(models.items()))


def _print_sbatch(loaded: LoadedRecipe, gpus_per_node: int) -> None:
    """Print the file that runs this very command line."""
    from longspan.train.slurm import sbatch_script

    command = command_line("--gpus-per-node")
    world = loaded.config.parallel.world
    typer.echo(sbatch_script(command, world=world, per_node=gpus_per_node, name=loaded.name), nl=False)


def _command(recipe: str, settings: list[str], scale: RecipeScale, out: Path | None) -> str:
    """Return what to write behind `longspan train` for the run that a dry run is about."""
    words = [recipe, *(word for setting in settings for word in ("--set", setting))]
    words += ["--scale", scale.value] if scale is not RecipeScale.full else []
    words += ["--out", str(out)] if out is not None else []
    return shlex.join(words)


def _dry_run(
    recipe: str, command: str, config: TrainConfig, root: Path, gpu: str | None, *, as_json: bool
) -> None:
    from longspan.train.resolve import resolve

    resolved = resolve(config, command, data_root=root, gpu=gpu)
    if as_json:
        print_json({"recipe": recipe, "fingerprint": config.fingerprint(), **resolved.to_dict()})
    else:
        _print_resolved(recipe, resolved)


def _search_rope(config: TrainConfig, root: Path, scale: RecipeScale, stage: str, *, as_json: bool) -> None:
    import json

    from longspan.kernels.longrope import PAPER, LongRopeSearch
    from longspan.train.rope_search import search_rope

    search = PAPER if scale is RecipeScale.full else LongRopeSearch(8, 4, 4, 3)
    found = search_rope(config, stage, data_root=root, search=search)
    if as_json:
        print_json({"stage": stage, "rope": found.rope, **found.result._asdict()})
        return
    # A JSON object is YAML too: this line goes into the stage as it is.
    typer.echo(f"rope: {json.dumps(found.rope)}")


def _print_resolved(title: str, resolved: ResolvedRecipe) -> None:
    from longspan.core.units import format_bytes, format_count, format_seconds
    from longspan.plan.training import WORKSPACE

    print_table(
        f"stages of {title}; nothing was trained",
        ("stage", "context", "steps", "rows a step", "tokens", "peak lr", "rope", "loss", "optimizer"),
        [_stage_row(stage) for stage in resolved.stages],
    )
    sources = [
        [stage.name, name, None if tokens is None else format_count(tokens)]
        for stage in resolved.stages
        for name, tokens in stage.tokens_by_source.items()
    ]
    print_table("tokens by source", ("stage", "source", "tokens"), sources)
    streams = [
        [
            *(stage.name, name, stream["documents"], stream["rows"], stream["rows_needed"]),
            *(stream.get("documents_begin"), _left_out(stream)),
        ]
        for stage in resolved.stages
        for name, stream in stage.streams.items()
        if stream["rows"] is not None
    ]
    if streams:
        heads = ("stage", "stream", "documents", "rows", "rows needed", "documents begin", "left out")
        print_table("data", heads, streams)
    costs = [
        [
            stage.name,
            format_bytes(sum(stage.memory.values())),
            format_bytes(stage.host) if stage.host else None,
            None if stage.step_seconds is None else format_seconds(stage.step_seconds),
            None if stage.seconds is None else format_seconds(stage.seconds),
        ]
        for stage in resolved.stages
        if stage.memory is not None
    ]
    if costs:
        memory, where = (
            "memory of a process",
            f"process{'' if resolved.processes == 1 else 'es'} on this machine's CPU",
        )
        if resolved.on_gpu:
            memory = f"GPU memory ({format_bytes(WORKSPACE)} allowance)"
            where = f"x {'this GPU' if resolved.gpu is None else resolved.gpu.name}"
        print_table(
            f"estimate for {resolved.processes} {where}; rows as one document each: time at most",
            ("stage", memory, "host memory", "step", "stage in all"),
            costs,
        )
    lines = [("processes", str(resolved.processes)), ("start with", resolved.launch)]
    lines += [("note", note) for note in resolved.notes]
    print_table("how to run it", ("what", ""), lines)


def _stage_row(stage: ResolvedStage) -> list[Any]:
    from longspan.core.units import format_count

    rope = stage.rope or {}
    words = [rope.get("rope_type", "default")] if rope else ["as before"]
    words += [f"theta {rope['rope_theta']:g}"] if "rope_theta" in rope else []
    words += [f"x {rope['factor']:g}"] if "factor" in rope else []
    return [
        stage.name,
        f"{stage.context_length:,}",
        stage.steps,
        stage.rows_per_step,
        None if stage.tokens is None else format_count(stage.tokens),
        f"{stage.lr:g}",
        " ".join(words),
        stage.objective,
        stage.optimizer_state,
    ]


def _left_out(stream: dict[str, Any]) -> str | None:
    from longspan.train.left_out import left_out_words

    prefix = "left_out_"
    counts = {key.removeprefix(prefix): count for key, count in stream.items() if key.startswith(prefix)}
    return left_out_words(counts) or None
