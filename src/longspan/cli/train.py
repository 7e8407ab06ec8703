"""`longspan train`: a recipe to a run folder with one Hugging Face folder per stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.output import Json, example, print_json, print_table, quiet_transformers

if TYPE_CHECKING:
    from longspan.train.streams import StagePlan

EXAMPLE = example(
    "longspan train recipe.yaml --dry-run",
    "longspan train recipe.yaml --set seed=1 --out run",
    "torchrun --nproc-per-node 4 -m longspan train recipe.yaml --set parallel.cp_ring=4",
)


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file; stores are looked for beside it.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/ and the recipe's name.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE changes a setting, such as stages.0.lr=1e-4; many times."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan the data of every stage and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train through the stages of a recipe; the same command goes on after a kill."""
    from longspan.train.config import TrainConfig

    config = TrainConfig.from_yaml(recipe, settings or [])
    from longspan.parallel.launch import is_first_process
    from longspan.train import trainer

    if dry_run:
        plans = [_describe(plan) for plan in trainer.plan_run(config, data_root=recipe.parent)]
        if as_json:
            print_json({"recipe": str(recipe), "fingerprint": config.fingerprint(), "stages": plans})
        else:
            _print_plans(str(recipe), plans)
        return
    quiet_transformers()
    out = out or Path("runs") / recipe.stem
    result = trainer.train(config, out, data_root=recipe.parent)
    if not is_first_process():
        return
    models = {stage: str(path) for stage, path in result.models.items()}
    if as_json:
        print_json({"run": str(out), "steps": result.steps, "tokens": result.tokens, "models": models})
    else:
        title = f"{out}: {result.steps:,} steps, {result.tokens:,} tokens"
        print_table(title, ("stage", "model"), list(models.items()))


def _describe(plan: StagePlan) -> dict[str, Any]:
    stage = plan.stage
    streams = {
        name: {
            "documents": len(plan.mixtures[name].documents) if name in plan.mixtures else None,
            "rows": plan.sources[name].num_rows,
            "rows_needed": needed,
        }
        for name, needed in plan.rows_needed.items()
    }
    return {
        "name": stage.name,
        "context_length": stage.context_length,
        "steps": stage.num_steps,
        "rows_per_step": stage.rows_per_step,
        "tokens": stage.num_steps * stage.rows_per_step * stage.context_length,
        "lr": stage.lr,
        "rope": stage.rope,
        "streams": streams,
    }


def _print_plans(title: str, plans: list[dict[str, Any]]) -> None:
    from longspan.core.units import format_count

    stages = [
        [
            p["name"],
            f"{p['context_length']:,}",
            p["steps"],
            p["rows_per_step"],
            format_count(p["tokens"]),
            p["lr"],
        ]
        for p in plans
    ]
    columns = ("stage", "context", "steps", "rows a step", "tokens", "peak lr")
    print_table(f"stages of {title}; nothing was trained", columns, stages)
    streams = [
        [plan["name"], name, stream["documents"], stream["rows"], stream["rows_needed"]]
        for plan in plans
        for name, stream in plan["streams"].items()
    ]
    print_table("data", ("stage", "stream", "documents", "rows", "rows needed"), streams)
