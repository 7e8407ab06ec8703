"""`longspan quickstart`: the whole story on this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli.output import Json, example, percent, print_json, print_table

EXAMPLE = example("longspan quickstart --preset tiny --out quickstart-run")


class QuickstartPreset(StrEnum):
    """The recipes that are shipped."""

    small = "small"
    tiny = "tiny"
    real = "real"


def quickstart(
    out: Annotated[
        Path, typer.Option(help="Folder of the run; the same command goes on after a kill.")
    ] = Path("quickstart-run"),
    preset: Annotated[
        QuickstartPreset,
        typer.Option(
            help="small: a model that learns it, some minutes. tiny: every step once, about a minute. real: "
            "SmolLM2-135M-Instruct from the hub or the package index, in its chat; an hour, or see --budget."
        ),
    ] = QuickstartPreset.small,
    budget: Annotated[
        str | None,
        typer.Option(help="Of --preset real: 20m goes part of the way in about so long on two idle cores."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Of --preset real: another pretrained model with a chat template, folder or hub name."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Of --preset real: long texts to train on, files, folders, patterns; many times. Default: what "
            "every CPython carries."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice. Default: 0.")] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Train the controls too; takes several times as long.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE changes a setting of the recipe; many times.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--settings", help="A recipe in place of --preset, such as the config.yaml of a run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Extend a small model's context on this machine, from raw text to a report, with nothing to download.

    With --preset real a pretrained model learns to find what stands far back in its chat.
    """
    from longspan.quickstart import load_config, run_quickstart
    from longspan.steps.opening import quiet_transformers

    config = load_config(
        file or preset.value,
        seed=seed,
        ablate=ablate,
        budget=budget,
        model=model,
        data=data or (),
        overrides=settings or [],
    )
    quiet_transformers()
    results = run_quickstart(out, config)
    if as_json:
        print_json(results)
    else:
        _print(out, results)


def _print(out: Path, results: dict[str, Any]) -> None:
    from longspan.core.units import format_seconds

    needle, ppl = results["needle"], results["ppl"]
    lengths = sorted({length for found in needle.values() for length in found["lengths"]})
    longest = max(int(length) for found in ppl.values() for length in found["by_length"])
    labels = sorted(needle, key=lambda label: (label != "before", label != "after", label))
    rows = [
        [
            label,
            percent(needle[label]["mean"]),
            *(percent(needle[label]["by_length"].get(str(length))) for length in lengths),
            _decimal(ppl.get(label, {}).get("by_length", {}).get(str(longest))),
        ]
        for label in labels
    ]
    columns = ("model", "mean", *(f"{length:,}" for length in lengths), f"perplexity at {longest:,}")
    print_table("planted facts found, by context length", columns, rows)
    seconds = results["seconds"]["total"]
    print_table(
        f"done in {format_seconds(seconds)}",
        ("what", "where"),
        [("report", out / "report.html"), ("numbers", out / "results.json")],
    )


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
