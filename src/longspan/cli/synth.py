"""`longspan synth`: questions and answers on long documents, as conversations to train on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.counts import count_option
from longspan.cli.output import Json, Seed, example, print_json, print_table

if TYPE_CHECKING:
    from longspan.api import Client, CostEstimate, Endpoint, Limits, Price
    from longspan.synth import SetConfig, Student, SynthConfig
    from longspan.synth.selection import Selected

app = typer.Typer(
    help="Make training conversations on long documents.", no_args_is_help=True, rich_markup_mode=None
)

QA_EXAMPLE = example(
    "longspan synth qa texts --set one_detail_book --model openai:gpt-4o-mini --tokenizer tokenizer "
    "--chat-template mistral --min-tokens 2000 --language any --out synth/books --dry-run",
    "longspan synth qa texts --offline-templates --tokenizer tokenizer --chat-template mistral --length 2k "
    "--language any --out synth/retrieval",
)
LIST_EXAMPLE = example("longspan synth list")
OFFLINE = "offline"
_ANY = "any"


@app.command(epilog=QA_EXAMPLE)
def qa(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Documents: files, folders, patterns, addresses.")
    ],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer of the model that will be trained.")],
    out: Annotated[Path, typer.Option(help="Folder to write; the same command goes on with it.")],
    set_name: Annotated[
        str | None,
        typer.Option("--set", help="Which questions: a name of `synth list`, or a YAML file like those."),
    ] = None,
    offline_templates: Annotated[
        bool,
        typer.Option(
            "--offline-templates", help="Ask no model: planted facts, repeated names, section titles."
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Who writes the questions: openai:NAME or anthropic:NAME.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Address of its server, such as http://localhost:8000/v1.")
    ] = None,
    key_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the key. Default: the provider's own.")
    ] = None,
    api_version: Annotated[str | None, typer.Option(help="Of Azure or Anthropic.")] = None,
    extra: Annotated[
        str | None,
        typer.Option(help="Further fields of every request, as YAML; null leaves one of ours out."),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Tokens that the server's model reads and writes; longer requests are not sent."),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Chat template of the model that will be trained. Default: the tokenizer's own; else llama-2, "
            "llama-3, mistral, qwen or a Jinja file."
        ),
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens of a sample at most, such as 64k.")] = "80k",
    distractors: Annotated[
        int, typer.Option(min=0, help="Other documents around one that is shorter than --length.")
    ] = 0,
    max_questions: Annotated[
        int | None, typer.Option(min=1, help="Questions of a sample. Default: all of its document.")
    ] = None,
    documents: Annotated[
        int | None, count_option(help="Documents to draw. Default: as the set says.", min=1)
    ] = None,
    min_tokens: Annotated[
        str | None, typer.Option(help="Shortest document, such as 32000. Default: as the set says.")
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(help="Longest document. Default: as the set says.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Language of the documents, such as en, or any. Default: the set's.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Questions of a request (offline: of a document).")
    ] = None,
    leak_check: Annotated[
        bool,
        typer.Option(help="Ask every question without its document too, and drop it where that is enough."),
    ] = True,
    used: Annotated[
        Path | None,
        typer.Option(help="File of documents in use. Default: used.sqlite beside --out, for all sets there."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="SQLite file of answers. Default: answers.sqlite in --out.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at the same time.")] = 8,
    requests_per_minute: Annotated[int | None, count_option(help="Limit of the server.", min=1)] = None,
    tokens_per_minute: Annotated[int | None, count_option(help="Limit of the server.", min=1)] = None,
    max_requests: Annotated[int | None, count_option(help="Stop after so many requests.")] = None,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="Stop before this is spent; needs --prices.")
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(help="YAML file, NAME: {input: 2.5, output: 10}, of a million tokens each."),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the text in records.")] = "text",
    source_field: Annotated[str | None, typer.Option(help="Field of the source in records.")] = None,
    seed: Seed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show documents, requests, tokens and cost; send nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Have a model write questions on long documents; make conversations of them at a length.

    Every answer is recorded as it comes. A killed command that is given again asks no recorded one again, and no
    document is in two sets that share --used.
    """
    from longspan.api import Limits
    from longspan.core.config import parse_yaml
    from longspan.core.units import parse_length
    from longspan.synth import ConversationConfig, SynthConfig, UsedDocuments

    spec = _find_set(set_name, offline_templates)
    spec = _changed(
        spec,
        documents=documents,
        min_tokens=None if min_tokens is None else parse_length(min_tokens),
        max_tokens=None if max_tokens is None else parse_length(max_tokens),
        questions=questions,
        language=language,
    )
    student = _student(tokenizer, chat_template)
    fields = parse_yaml(extra, where="--extra") if extra else {}
    settings = SynthConfig(
        set=spec,
        inputs=tuple(inputs),
        text_field=text_field,
        source_field=source_field,
        tokenizer=student.tokenizer.fingerprint,
        chat_template=student.chat.fingerprint,
        model=None if spec.kind == OFFLINE else model,
        extra=fields,
        sample=ConversationConfig(
            length=parse_length(length), distractors=distractors, max_questions=max_questions
        ),
        leak_check=leak_check,
        seed=seed,
    )
    limits = Limits(
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
    claims = UsedDocuments(used if used is not None else out.parent / "used.sqlite")
    endpoint = _endpoint(spec, model, base_url, key_variable, api_version, window, fields)
    price = _price(model, prices)
    if dry_run:
        _show_estimate(settings, student, out, claims, price, limits, as_json=as_json)
        return
    client = _open(endpoint, limits, price, max_cost, max_requests, cache or out / "answers.sqlite")
    _run(settings, out, student, client, claims, as_json=as_json)


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


def _find_set(name: str | None, offline: bool) -> SetConfig:
    from longspan.core.errors import ArgumentError
    from longspan.synth import load_set
    from longspan.synth.templates import shipped_names

    if offline and name is None:
        return load_set(OFFLINE)
    if name is None:
        raise ArgumentError(
            "which questions is not said",
            allowed=shipped_names("sets"),
            fix="name a set with --set, or give --offline-templates",
        )
    spec = load_set(name)
    if offline and spec.kind != OFFLINE:
        raise ArgumentError(f"--offline-templates asks no model, and the set {spec.name} has to")
    return spec


def _changed(spec: SetConfig, *, language: str | None, **changes: int | None) -> SetConfig:
    from longspan.core.errors import ArgumentError

    values: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    if "questions" in values and spec.fixed_questions:
        raise ArgumentError(f"--questions does not apply: the set {spec.name} has a fixed list")
    if language is not None:
        values["language"] = None if language == _ANY else language
    if "min_tokens" in values and "max_tokens" not in values and spec.max_tokens is not None:
        # A lower bound above the set's upper one is meant as a change of both ends.
        values["max_tokens"] = spec.max_tokens if values["min_tokens"] <= spec.max_tokens else None
    return type(spec).from_dict({**spec.to_dict(), **values}, where=f"the set {spec.name}")


def _student(tokenizer: str, chat_template: str | None) -> Student:
    from longspan.data.chat import load_chat_format
    from longspan.data.tokenizer import load_tokenizer
    from longspan.synth import Student

    loaded = load_tokenizer(tokenizer)
    return Student(loaded, load_chat_format(loaded, chat_template))


def _endpoint(
    spec: SetConfig,
    model: str | None,
    base_url: str | None,
    key_variable: str | None,
    api_version: str | None,
    window: str | None,
    extra: dict[str, Any],
) -> Endpoint | None:
    """Return where requests go; None for a set that asks nobody."""
    from longspan.api import Endpoint
    from longspan.core.errors import ArgumentError
    from longspan.core.units import parse_length

    if spec.kind == OFFLINE:
        given = {"--model": model, "--base-url": base_url, "--window": window, "--extra": extra or None}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise ArgumentError(
                f"{', '.join(unused)} has no effect: no model is asked for the set {spec.name}"
            )
        return None
    provider, colon, name = (model or "").partition(":")
    kinds = {"openai": "chat", "anthropic": "anthropic"}
    if not colon or not name or provider not in kinds:
        raise ArgumentError(
            "who writes the questions is not said" if model is None else "there is no such provider",
            found=None if model is None else repr(model),
            allowed="--model openai:NAME (with --base-url for servers of your own) or anthropic:NAME",
            fix=None if model else "or give --offline-templates, which asks nobody",
        )
    return Endpoint.from_dict(
        {
            "kind": kinds[provider],
            "model": name,
            "base_url": base_url or "",
            "key_variable": key_variable,
            "api_version": api_version,
            "max_length": None if window is None else parse_length(window),
            "extra": extra,
        },
        where="--model and --base-url",
    )


def _price(model: str | None, prices: Path | None) -> Price | None:
    from longspan.api import price_of

    return None if prices is None or model is None else price_of(model.partition(":")[2], prices)


def _open(
    endpoint: Endpoint | None,
    limits: Limits,
    price: Price | None,
    max_cost: float | None,
    max_requests: int | None,
    cache: Path,
) -> Client | None:
    from longspan.api import Client, SpendingLimits

    if endpoint is None:
        return None
    values = {
        "max_cost": max_cost,
        "max_requests": max_requests,
        "price": None if price is None else price.to_dict(),
    }
    budget = SpendingLimits.from_dict(values, where="--max-cost")
    return Client(endpoint, limits=limits, cache=cache, budget=budget)


def _run(
    settings: SynthConfig,
    out: Path,
    student: Student,
    client: Client | None,
    claims: Any,
    *,
    as_json: bool,
) -> None:
    from longspan.synth import SynthJob, require_samples

    try:
        summary = SynthJob(settings, out, student, client=client, used=claims).run()
        spent = client.report().describe() if client is not None else None
    finally:
        if client is not None:
            client.close()
    if as_json:
        print_json(summary)
    else:
        _show(summary, spent)
    require_samples(summary)


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


def _show_estimate(
    settings: SynthConfig,
    student: Student,
    out: Path,
    claims: Any,
    price: Price | None,
    limits: Limits,
    *,
    as_json: bool,
) -> None:
    from longspan.synth import estimate_job

    selected, asking, checks = estimate_job(
        settings, student, out=out, used=claims, price=price, limits=limits
    )
    if as_json:
        print_json({"documents": selected.counts, "asking": asking._asdict(), "leak_check": checks._asdict()})
        return
    _print_estimate(settings.set.name, selected, asking, checks)


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
