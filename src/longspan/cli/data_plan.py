"""`longspan data mix` and `pack`: which documents, and where in which row."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from longspan.cli.data_jobs import JOBS, PrintSbatch, missing_words, write_settings
from longspan.cli.data_stores import PlanOut, show_lengths
from longspan.cli.from_settings import Part, Used, from_settings
from longspan.cli.output import Json, Plot, Seed, example, percent, print_json, print_table

if TYPE_CHECKING:
    from longspan.cli.jobs_config import JobsConfig
    from longspan.data.jobs import ArrayJob, Executor
    from longspan.data.plans.mixture_config import MixtureConfig
    from longspan.data.plans.packing import PackPlan
    from longspan.data.plans.store_packing import StorePackConfig

MIX_EXAMPLE = example("longspan data mix store --mode per_source --tokens 2000 --out mixture")
PACK_EXAMPLE = example(
    "longspan data pack mixture --length 512 --specials eos --out rows",
    "longspan data pack store --length 512 --strategy best_fit --remainder pad --out fit --materialize fit-mds",
)


def _mixed(given: dict[str, Any]) -> dict[str, Any]:
    """Return what the stores' names, a part or a preset ask for."""
    from longspan.steps.mix import named_mixture

    return named_mixture(given["stores"], given["preset"], given)[1]


@from_settings(
    settings=Part(
        "longspan.data.plans.mixture_config:MixtureConfig",
        without=["group", "part"],
        names={"weights": "--weight", "sources": "--source"},
        under=_mixed,
    )
)
def mix(
    stores: Annotated[
        list[str],
        typer.Argument(
            metavar="STORE|PART",
            help="Token stores; STORE@0.3 is a share, STORE#2 two uses. Or one part of `data split`.",
        ),
    ],
    out: PlanOut,
    settings: MixtureConfig,
    used: Used,
    preset: Annotated[
        str | None,
        typer.Option(help="Published shares: slimpajama-per-source, prolong-64k, cepe-concat and others."),
    ] = None,
    plot: Plot = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose documents by length and source; writes a mixture plan."""
    from longspan.steps.mix import mix_stores

    # What names and presets asked for stands in the settings now.
    plan, paths, table = mix_stores(stores, out, settings, seed=seed)
    write_settings({**used, "stores": paths, "preset": None}, out)
    before = table.summary("before", "before")
    after = table.summary("after", "after mixing", documents=plan.documents)
    show_lengths([before, after], as_json, plot)
    if as_json:
        print_json({
            "plan": str(out),
            "fingerprint": plan.fingerprint,
            **plan.report.to_dict(),
            "lengths": {"before": before, "after": after},
        })  # fmt: skip
    else:
        print_mixture(str(out), plan.report)


@from_settings(settings=Part("longspan.data.plans.store_packing:StorePackConfig"), jobs=JOBS)
def pack(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="PLAN|STORE", help="A mixture plan, or token stores to take whole."),
    ],
    length: Annotated[str, typer.Option(help="Tokens in a row, such as 128k.")],
    out: PlanOut,
    settings: StorePackConfig,
    jobs: JobsConfig,
    used: Used,
    materialize: Annotated[
        Path | None, typer.Option(help="Folder to write the rows to as well, for other tools.")
    ] = None,
    row_format: Annotated[
        str, typer.Option("--format", help="mds, jsonl, parquet or npy: what --materialize writes.")
    ] = "mds",
    labels: Annotated[
        str,
        typer.Option(
            help="document or next: `labels` in jsonl and parquet of a row with which a document ends is -100, or the "
            "BOS of the next document."
        ),
    ] = "document",
    print_sbatch: PrintSbatch = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Place documents in rows of one length; writes a pack plan, no tokens are copied unless asked.

    Workers and jobs share the writing of --materialize; a plan alone is a matter of seconds. With strategy split there
    is one plan for each of --split-lengths, as OUT/PIECE-LENGTH.
    """
    from longspan.core.errors import ArgumentError
    from longspan.data.plans.framing import frame_words
    from longspan.steps.pack import pack_rows

    if materialize is None and (jobs.is_shared or print_sbatch):
        raise ArgumentError("there is nothing for jobs to share", fix="give --materialize")
    _check_form(row_format, labels, written=materialize is not None)
    if print_sbatch:
        jobs.print_sbatch("longspan-pack")
        return
    share = jobs.share()
    plans = pack_rows(inputs, out, length, settings, seed=seed, shared=share.count > 1)
    found = []
    with jobs.start() if materialize is not None else nullcontext() as running:
        for place, plan in plans.items():
            rows = None if materialize is None else materialize / place.relative_to(out)
            left = None
            if running is not None and rows is not None and plan.num_rows:
                left = _write(place, rows, (row_format, labels), running, share)
            found.append({
                "plan": str(place),
                "fingerprint": plan.fingerprint,
                "rows_at": None if rows is None else str(rows),
                **({} if left is None else {"job": share.index, "jobs": share.count, **left}),
                "documents_begin": frame_words(plan.spec),
                **plan.report.to_dict(),
            })  # fmt: skip
            if not as_json:
                _print_packing(str(place), plan)
                if left is not None:
                    typer.echo(missing_words(share, left["pieces"], left["missing"], str(rows)))
    write_settings(used, out)
    if as_json:
        print_json(found if settings.split_lengths else found[0])


def _check_form(row_format: str, labels: str, *, written: bool) -> None:
    """Refuse a form of rows that there is not, or rows that nothing writes."""
    from longspan.core.errors import ArgumentError
    from longspan.data.packed.row_formats import FORMATS
    from longspan.data.rows.plan_rows import Labels

    if row_format not in FORMATS:
        raise ArgumentError("unknown --format", found=row_format, allowed=FORMATS)
    if labels not in get_args(Labels):
        raise ArgumentError("unknown --labels", found=labels, allowed=get_args(Labels))
    if not written and (row_format, labels) != ("mds", "document"):
        raise ArgumentError("--format and --labels say how rows are written", fix="give --materialize")


def _write(
    plan: Path, out: Path, form: tuple[str, str], executor: Executor, share: ArrayJob
) -> dict[str, int] | None:
    """Write rows; return how many pieces there are, and how many other jobs have yet to write, if any."""
    from longspan.data.packed.materialize import rows_folder

    row_format, labels = form
    work = rows_folder(plan, out, format=row_format, labels=labels)  # type: ignore[arg-type]
    if work.make(executor, share):
        return None
    return {"pieces": work.num_pieces, "missing": work.missing()}


def print_mixture(title: str, report: Any) -> None:
    """Print what was asked of each source and what was taken."""
    from longspan.core.units import format_count

    rows: list[list[object]] = [
        [
            name,
            format_count(source.available_tokens),
            percent(source.share_before),
            format_count(source.documents),
            format_count(source.tokens),
            percent(source.share_after),
            format_count(source.overshoot),
            format_count(source.shortfall),
        ]
        for name, source in report.sources.items()
    ]
    total = [format_count(report.documents), format_count(report.tokens)]
    rows.append(
        ["total", None, None, *total, None, format_count(report.overshoot), format_count(report.shortfall)]
    )
    columns = (
        "source", "available", "share", "documents", "chosen tokens", "share", "above budget", "missing"
    )  # fmt: skip
    print_table(f"mixture: {title}", columns, rows)
    if report.excluded:
        typer.echo(f"documents that do not fulfil the condition: {report.excluded}")


def _print_packing(title: str, plan: PackPlan) -> None:
    from longspan.core.units import format_count
    from longspan.data.plans.framing import frame_words

    report, spec = plan.report, plan.spec
    full = report.rows * spec.length
    rows = [
        ("rows", format_count(report.rows)),
        ("documents", format_count(report.documents)),
        ("continued pieces", format_count(report.continuations)),
        ("special tokens", format_count(report.special_tokens)),
        ("documents begin", frame_words(spec)),
        ("repeated tokens", format_count(report.repeated_tokens)),
        ("padding", format_count(report.padding_tokens)),
        ("filled", percent(1 - report.padding_tokens / full) if full else None),
    ]
    print_table(f"rows: {title}", ("what", "count"), rows)
    typer.echo(conservation(report.tokens_in, report.tokens_packed, report.dropped))


def conservation(tokens_in: int, packed: int, dropped: dict[str, int]) -> str:
    """Write where all tokens went: "tokens: 16 in = 12 packed + 3 short + 1 left over"."""
    names = {"remainder": "left over", "other_lengths": "in other lengths", "overflow": "beyond a row"}
    parts = [f"{packed:,} packed"]
    parts += [f"{count:,} {names.get(reason, reason)}" for reason, count in dropped.items() if count]
    return f"tokens: {tokens_in:,} in = {' + '.join(parts)}"
