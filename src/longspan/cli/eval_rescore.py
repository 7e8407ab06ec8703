"""`longspan eval rescore`: recorded answers by another rule, or by a model that judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.from_settings import Part, Used, from_settings
from longspan.cli.output import Json, example, print_json, print_table

if TYPE_CHECKING:
    from longspan.eval.rescoring import RescoreConfig

EXAMPLE = example(
    "longspan eval rescore run/records/passkey-model.jsonl --scorer rouge_1 --out rescored/passkey-model.jsonl"
)
SETTINGS = Part(
    "longspan.eval.rescoring:RescoreConfig",
    lifted=["server.base_url"],
    old={"--cache": "server.cache", "--concurrency": "server.limits.concurrency"},
)


@from_settings(settings=SETTINGS)
def rescore(
    settings: RescoreConfig,
    used: Used,
    records: Annotated[Path, typer.Argument(help="Records file of an evaluation.")],
    out: Annotated[Path, typer.Option(help="Records file to write.")],
    as_json: Json = False,
) -> None:
    """Score recorded answers by another rule, without the model that gave them.

    The key of a judge's server comes from OPENAI_API_KEY or ANTHROPIC_API_KEY.
    """
    if settings.scorer == "judge":
        from longspan.api import ServerConfig, chat_model
        from longspan.eval.judge import CRITERIA, judge_file

        judge = chat_model(settings.judge, option="--judge")
        with judge.client(settings.server or ServerConfig()) as client:
            summary = judge_file(records, client, out, template=CRITERIA[settings.criteria], used=used)
    else:
        from longspan.eval.rescoring import rescore as score_again

        summary = score_again(records, settings.scorer, out, used=used)
    if as_json:
        print_json(summary)
        return
    interval, mean = summary["interval"], summary["mean"]
    row = [
        summary["scored"],
        sum(summary["unscored"].values()),
        None if mean is None else f"{mean:.3f}",
        None if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
    ]
    title = f"{summary['task']}, {summary['label']}, by {settings.scorer}"
    if (rating := summary.get("mean_rating")) is not None:
        title += f", mean rating {rating:.2f} (1 to 10)"
    print_table(title, ("scored", "unscored", "mean", "95% interval"), [row])
