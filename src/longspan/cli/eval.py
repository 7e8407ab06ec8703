"""`longspan eval`: what a model finds and predicts at each context length, as records in a run folder."""

from __future__ import annotations

from collections.abc import Mapping

import typer

from longspan.cli import eval_harness, eval_needle, eval_ppl, eval_rescore
from longspan.cli.eval_tasks import command_of
from longspan.cli.output import Json, example, print_json, print_table
from longspan.eval.registry import TaskEntry, built_in, entries

app = typer.Typer(help="Measure a model at each context length.", no_args_is_help=True, rich_markup_mode=None)
OWN = {
    "needle": (eval_needle.EXAMPLE, eval_needle.needle),
    "ppl": (eval_ppl.EXAMPLE, eval_ppl.ppl),
    "harness": (eval_harness.EXAMPLE, eval_harness.harness),
}
"""Tasks whose commands say more than a setting of the task."""


def add_tasks(tasks: Mapping[str, TaskEntry]) -> None:
    """Add the commands of tasks that have none yet."""
    known = {each.callback.__name__ for each in app.registered_commands if each.callback is not None}
    for name, entry in tasks.items():
        if name in known or entry.command:
            continue
        lines = [
            f"longspan eval {name} --model model {options} --out run".replace("  ", " ")
            for options in entry.examples
        ]
        epilog, command = OWN.get(name) or (example(*lines), command_of(entry))
        app.command(name=name, epilog=epilog)(command)


def add_installed() -> None:
    """Add the tasks that were registered, and those of installed packages, which takes a look at all of them."""
    add_tasks(entries())


add_tasks(built_in())
app.command(epilog=eval_rescore.EXAMPLE)(eval_rescore.rescore)


@app.command(name="list", epilog=example("longspan eval list"))
def list_(as_json: Json = False) -> None:
    """List what can be measured, the presets of published tests, and the scoring rules."""
    from longspan.eval.needle_config import NeedleConfig
    from longspan.eval.needle_presets import PRESETS
    from longspan.eval.scorers import SCORERS

    tasks = entries()
    presets = {name: NeedleConfig.from_dict(dict(values)) for name, values in PRESETS.items()}
    if as_json:
        print_json(
            {
                "tasks": {
                    name: {"command": entry.command or name, "scorers": entry.scorers, **entry.described()}
                    for name, entry in tasks.items()
                },
                "presets": {name: settings.to_dict() for name, settings in presets.items()},
                "scorers": {
                    name: {**scorer.named(), "says": scorer.says, "higher_is_better": scorer.higher_is_better}
                    for name, scorer in sorted(SCORERS.items())
                },
            }
        )
        return
    commands = [(name, entry.command or name, entry.title) for name, entry in tasks.items()]
    print_table("tasks", ("name", "longspan eval", "what it measures"), commands)
    rows = [
        [
            name,
            f"{len(settings.lengths)} of {min(settings.lengths):,} to {max(settings.lengths):,}",
            len(settings.depths),
            settings.samples,
            _shown(len(settings.depths) * settings.samples),
            settings.mode,
            settings.scorer_name,
        ]
        for name, settings in presets.items()
    ]
    columns = ("name", "lengths", "depths", "samples", "effective context", "mode", "scorer")
    print_table("presets of needle", columns, rows)
    print_table("scorers", ("name", "rule"), [(name, scorer.says) for name, scorer in SCORERS.items()])


def _shown(samples: int) -> str:
    """Say whether so many right answers a length can show an effective context."""
    from longspan.core.intervals import samples_needed

    needed = samples_needed() or samples
    return "can be shown" if samples >= needed else f"cannot be shown: {samples} a length, {needed} needed"
