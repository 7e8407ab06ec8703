"""`longspan eval rescore`: recorded answers by another rule, or by a model that judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.from_settings import Part, Used, from_settings
from longspan.cli.output import Json, example, percent, print_json, print_table

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
    elif settings.scorer == "citations":
        summary = _citations(settings, records, out, used)
    else:
        from longspan.eval.rescoring import rescore as score_again

        summary = score_again(records, settings.scorer, out, used=used, run_code=settings.run_code)
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
    if (judged := summary.get("judgements")) is not None:
        print_table(
            f"{judged['asked']:,} pairs judged, {judged['unjudged']:,} of them without a verdict",
            ("set", "metric", "scored", "unscored", "mean"),
            [
                [
                    each["subtask"],
                    each["metric"],
                    each["scored"],
                    each["samples"] - each["scored"],
                    percent(each["mean"]),
                ]
                for each in summary["by_metric"]
            ],
        )


def _citations(settings: RescoreConfig, records: Path, out: Path, used: Used) -> dict[str, Any]:
    from longspan.api import ServerConfig, remote_model
    from longspan.core.errors import ArgumentError
    from longspan.eval.citations import judge_cited, open_cited, server_judge

    if settings.judge is None:
        raise ArgumentError(
            "which model judges is not said",
            allowed="--judge FOLDER, a name on the hub, openai:NAME or anthropic:NAME",
        )
    assert settings.data_root is not None  # the settings refuse it
    remote = remote_model(settings.judge)
    if remote is None and settings.server is not None:
        raise ArgumentError(
            "a model that is run here has no server", found=settings.judge, allowed="--judge openai:NAME"
        )
    cited = open_cited(records, out, data_root=settings.data_root)
    if remote is not None:
        with remote.client(settings.server or ServerConfig()) as client:
            return judge_cited(cited, server_judge(client), name=settings.judge, used=used)
    from longspan.infer.entailment import EntailmentModel

    return judge_cited(cited, EntailmentModel(settings.judge).judge, name=settings.judge, used=used)
