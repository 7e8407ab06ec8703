"""`longspan synth`: questions and answers on long documents, as conversations to train on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.from_settings import Part, Used, from_settings, write_used
from longspan.cli.output import Json, example, print_json, print_table

if TYPE_CHECKING:
    from longspan.api import CostEstimate
    from longspan.synth.config import QaConfig
    from longspan.synth.selection import Selected

app = typer.Typer(
    help="Make training conversations on long documents.", no_args_is_help=True, rich_markup_mode=None
)

QA_EXAMPLE = example(
    "longspan synth qa texts --question-set one_detail_book --model openai:gpt-4o-mini --tokenizer tokenizer "
    "--chat-template mistral --min-tokens 2000 --language any --out synth/books --dry-run",
    "longspan synth qa texts --offline-templates --tokenizer tokenizer --chat-template mistral --length 2k "
    "--language any --out synth/retrieval",
)
LIST_EXAMPLE = example("longspan synth list")


@from_settings(
    settings=Part(
        "longspan.synth.config:QaConfig",
        argument="inputs",
        names={"inputs": "INPUT"},
        nested=["sample"],
        lifted=["server.base_url"],
        old={
            "--set": "question_set",
            "--key-variable": "server.key_variable",
            "--api-version": "server.api_version",
            "--extra": "server.extra",
            "--window": "server.max_length",
            "--cache": "server.cache",
            "--concurrency": "server.limits.concurrency",
            "--requests-per-minute": "server.limits.requests_per_minute",
            "--tokens-per-minute": "server.limits.tokens_per_minute",
            "--max-requests": "server.budget.max_requests",
            "--max-cost": "server.budget.max_cost",
            "--prices": "server.budget.prices",
        },
    )
)
def qa(
    settings: QaConfig,
    used: Used,
    out: Annotated[Path, typer.Option(help="Folder to write; the same command goes on with it.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show documents, requests, tokens and cost; send nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Have a model write questions on long documents; make conversations of them at a length.

    Every answer is recorded as it comes. A killed command that is given again asks no recorded one again, and no
    document is in two sets that share --used.
    """
    from longspan.api import ServerConfig
    from longspan.data.chat import load_chat_format
    from longspan.data.tokenizer import load_tokenizer
    from longspan.synth import Student, SynthConfig, SynthJob, UsedDocuments, estimate_job, require_samples

    chosen = settings.chosen_set()
    tokenizer = load_tokenizer(settings.tokenizer)
    student = Student(tokenizer, load_chat_format(tokenizer, settings.chat_template))
    job = SynthConfig.of(settings, chosen, student)
    claims = UsedDocuments(settings.used or out.parent / "used.sqlite")
    writer, server = settings.writer(chosen), settings.server or ServerConfig()
    if dry_run:
        price = None if writer is None else server.budget.priced(writer.name).price
        selected, asking, checks = estimate_job(
            job, student, out=out, used=claims, price=price, limits=server.limits
        )
        if as_json:
            counts = {"asking": asking._asdict(), "leak_check": checks._asdict()}
            print_json({"documents": selected.counts, **counts})
        else:
            _print_estimate(chosen.name, selected, asking, checks)
        return
    server = server.model_copy(update={"cache": server.cache or str(out / "answers.sqlite")})
    client = None if writer is None else writer.client(server)
    try:
        summary = SynthJob(job, out, student, client=client, used=claims).run()
        spent = client.report().describe() if client is not None else None
    finally:
        if client is not None:
            client.close()
    write_used(used, out)
    if as_json:
        print_json(summary)
    else:
        _show(summary, spent)
    require_samples(summary)


app.command(epilog=QA_EXAMPLE)(qa)


@app.command("list", epilog=LIST_EXAMPLE)
def list_sets(as_json: Json = False) -> None:
    """Name the sets of questions, with the documents that each takes."""
    from longspan.synth import shipped_sets

    sets = shipped_sets()
    if as_json:
        print_json([spec.to_dict() for spec in sets])
        return
    rows = [
        [
            spec.name,
            spec.kind,
            f"{spec.min_tokens:,}",
            None if spec.max_tokens is None else f"{spec.max_tokens:,}",
            spec.documents,
            len(spec.fixed_questions) or spec.questions,
            spec.template().label if spec.prompt else None,
        ]
        for spec in sets
    ]
    columns = ("set", "kind", "min tokens", "max tokens", "documents", "questions", "prompt")
    print_table("sets of questions", columns, rows)


def _show(summary: dict[str, Any], spent: str | None) -> None:
    """Print what became of documents, requests and questions, and where the evidence lies."""
    for part in ("documents", "requests", "repairs", "questions", "samples"):
        if summary[part]:
            rows = [[name, f"{count:,}"] for name, count in summary[part].items()]
            title = "faults mended in replies" if part == "repairs" else part
            print_table(f"{summary['set']}: {title}", (part, "number"), rows)
    if summary["tokens"]:
        tokens = summary["tokens"]
        print_table("tokens of a sample", list(tokens), [[f"{value:,}" for value in tokens.values()]])
        counts = summary["depth"]["counts"]
        bins = len(counts)
        columns = [f"{100 * number // bins}-{100 * (number + 1) // bins} %" for number in range(bins)]
        title = f"evidence by depth (at most {summary['depth']['distance']:.1%} from even)"
        print_table(title, columns, [[f"{count:,}" for count in counts]])
    if spent:
        typer.echo(spent)
    typer.echo(f"{summary['samples']['written']:,} samples in {summary['out']}; picture: depth.png beside it")


def _print_estimate(name: str, selected: Selected, asking: CostEstimate, checks: CostEstimate) -> None:
    from longspan.core.units import format_count, format_seconds

    rows = [[reason, f"{count:,}"] for reason, count in selected.counts.items()]
    print_table(f"{name}: documents", ("documents", "number"), rows)
    lines = [
        [
            what,
            f"{each.requests:,}",
            format_count(each.prompt_tokens),
            format_count(each.completion_tokens),
            None if each.cost is None else f"{each.cost:,.2f}",
            None if each.minutes is None else format_seconds(60 * each.minutes),
        ]
        for what, each in (("questions", asking), ("leak check", checks))
    ]
    columns = ("at most", "requests", "tokens sent", "tokens written", "cost", "time by the limits")
    print_table("what it would take; nothing was sent", columns, lines)
