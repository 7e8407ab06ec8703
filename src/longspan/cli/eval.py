"""`longspan eval`: what a model finds and predicts at each context length, as records in a run folder."""

from __future__ import annotations

import typer

from longspan.cli import eval_harness, eval_needle, eval_ppl, eval_tasks
from longspan.cli.output import Json, example, print_json, print_table

app = typer.Typer(help="Measure a model at each context length.", no_args_is_help=True, rich_markup_mode=None)

app.command(epilog=eval_needle.EXAMPLE)(eval_needle.needle)
app.command(epilog=eval_ppl.EXAMPLE)(eval_ppl.ppl)
app.command(epilog=eval_tasks.PASSKEY_EXAMPLE)(eval_tasks.passkey)
app.command(epilog=eval_tasks.TOPICS_EXAMPLE)(eval_tasks.topics)
app.command(epilog=eval_tasks.RULER_EXAMPLE)(eval_tasks.ruler)
app.command(epilog=eval_tasks.LONGQA_EXAMPLE)(eval_tasks.longqa)
app.command(epilog=eval_harness.EXAMPLE)(eval_harness.harness)
app.command(epilog=eval_tasks.RESCORE_EXAMPLE)(eval_tasks.rescore)

TASKS: dict[str, str] = {
    "needle": "a fact planted in unseen text, asked back, by context length and depth",
    "needle_distractors": "the same among facts of the same form (needle --distractors)",
    "needle_multi": "several facts asked for at once (needle --needles)",
    "needle_multikey": "a fact at every depth of one context, each asked for (needle --multi-key)",
    "ppl": "perplexity of unseen text by context length and position",
    "passkey": "a number among a few sentences that are repeated over and over",
    "topics": "the topic that a long talk began with",
    "lines": "the number in one of many lines (topics --kind lines)",
    "ruler": "RULER's 13 tasks: needles, variable tracking, frequent words, questions",
    "longqa": "questions on documents from JSON lines, as LongBench asks and scores them",
    "harness": "published benchmarks: lm-eval's LongBench, InfiniteBench, MMLU, BABILong; long-llm, HELMET",
}
"""What `longspan eval` measures, by the names that records have."""


@app.command(name="list", epilog=example("longspan eval list"))
def list_(as_json: Json = False) -> None:
    """List what can be measured, the presets of published tests, and the scoring rules."""
    from longspan.eval.needle_config import NeedleConfig
    from longspan.eval.needle_presets import PRESETS
    from longspan.eval.scorers import SCORERS

    presets = {name: NeedleConfig.from_dict(dict(values)) for name, values in PRESETS.items()}
    if as_json:
        listed = {name: settings.to_dict() for name, settings in presets.items()}
        print_json({"tasks": TASKS, "presets": listed, "scorers": sorted(SCORERS)})
        return
    print_table("tasks", ("name", "what it measures"), list(TASKS.items()))
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
    typer.echo(f"scorers: {', '.join(sorted(SCORERS))}")


def _shown(samples: int) -> str:
    """Say whether so many right answers a length can show an effective context."""
    from longspan.core.intervals import samples_needed

    needed = samples_needed() or samples
    return "can be shown" if samples >= needed else f"cannot be shown: {samples} a length, {needed} needed"
