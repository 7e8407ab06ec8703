"""`longspan data mix` and `pack`: which documents, and where in which row."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from longspan.cli.data_jobs import (
    ExecutorName,
    ExecutorOption,
    JobId,
    Jobs,
    NumJobs,
    PrintSbatch,
    RayAddress,
    Workers,
    missing_words,
)
from longspan.cli.data_stores import (
    PlanOut,
    check_lengths,
    lengths_of,
    parse_weights,
    show_lengths,
    special_ids,
    stores_of,
)
from longspan.cli.output import Json, Plot, Seed, example, percent, print_json, print_table

if TYPE_CHECKING:
    import numpy as np

    from longspan.data.jobs import ArrayJob, Executor
    from longspan.data.plans.packing import PackPlan
    from longspan.data.plans.store_packing import Settled
    from longspan.data.store.lengths import LengthTable

MIX_EXAMPLE = example("longspan data mix store --mode per_source --tokens 2000 --out mixture")
PACK_EXAMPLE = example(
    "longspan data pack mixture --length 512 --specials eos --out rows",
    "longspan data pack store --length 512 --strategy best_fit --remainder pad --out fit --materialize fit-mds",
)


CharactersPerToken = Annotated[
    float | None,
    typer.Option(
        help="Take documents for as long as their characters divided by this, such as 3.68. Default: their tokens."
    ),
]


def mix(
    stores: Annotated[
        list[str],
        typer.Argument(
            metavar="STORE|PART",
            help="Token stores; STORE@0.3 is a share, STORE#2 two uses. Or one part of `data split`.",
        ),
    ],
    out: PlanOut,
    mode: Annotated[
        str | None,
        typer.Option(
            help="none: every document. global: short documents are kept with probability --keep-short. "
            "per_source: the same, and every source keeps its share of the tokens. upsample: some sources "
            "get a new --weight. proportions: only the sources with a --weight. repeat: sources with a "
            "--weight are used so many times, the others once. Default: per_source, or what STORE@0.3, "
            "STORE#2 and --preset ask for."
        ),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to choose, such as 5B.")] = None,
    keep_short: Annotated[
        float | None, typer.Option(help="Probability that a short document is kept.")
    ] = None,
    threshold: Annotated[
        str | None, typer.Option(help="Documents with fewer tokens are short. Default: 4096.")
    ] = None,
    weight: Annotated[list[str] | None, typer.Option(help="SOURCE=WEIGHT; may be given many times.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Published shares: slimpajama-per-source, prolong-64k, cepe-concat and others."),
    ] = None,
    characters_per_token: CharactersPerToken = None,
    max_repeat: Annotated[int, typer.Option(min=1, help="How often one document may be used.")] = 1,
    plot: Plot = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose documents by length and source; writes a mixture plan."""
    from longspan.core.errors import ArgumentError
    from longspan.data.plans.mixture import MixtureConfig, plan_mixture
    from longspan.data.plans.shares import parse_stream, stream_settings

    streams = [parse_stream(store) for store in stores]
    names, part = _part([stream.path for stream in streams])
    table, paths = lengths_of(names)
    given: dict[str, Any] = {
        "mode": mode,
        "tokens": tokens,
        "keep_short": keep_short,
        "threshold": threshold,
        "weights": parse_weights(weight or []) or None,
        "part": part,
        "characters_per_token": characters_per_token,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    asked = stream_settings(streams)
    if preset is not None:
        if asked:
            raise ArgumentError("--preset has shares of its own", fix="name the stores without @ and #")
        asked = _preset(preset, table)
    elif not asked:
        asked = {"mode": "per_source"}
    elif clash := {"mode", "weights"} & set(settings):
        raise ArgumentError("STORE@SHARE and STORE#USES say what is mixed", found=f"--{min(clash)} too")
    spec = MixtureConfig.from_dict({**asked, **settings, "max_repeat": max_repeat}, where="the command line")
    plan = plan_mixture(spec, table, seed)
    plan.save(out, stores=paths)
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


def pack(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="PLAN|STORE", help="A mixture plan, or token stores to take whole."),
    ],
    length: Annotated[str, typer.Option(help="Tokens in a row, such as 128k.")],
    out: PlanOut,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="concat: documents follow one another and are cut at row ends. intact: a row holds one document. "
            "best_fit: documents that fit a row are not cut, rows are padded. split: documents are cut into "
            "pieces of --split-lengths, one plan for each length, as OUT/PIECE-LENGTH. Default: concat; for "
            "conversations best_fit, without those that are longer than a row."
        ),
    ] = None,
    split_lengths: Annotated[
        str | None, typer.Option(help="For split: lengths of pieces, longest first, such as 64k,8k.")
    ] = None,
    by_source: Annotated[
        bool, typer.Option("--by-source", help="A row holds documents of one source only.")
    ] = False,
    min_length: Annotated[str, typer.Option(help="Shorter documents are left out.")] = "1",
    min_tail: Annotated[str, typer.Option(help="Shorter last pieces of cut documents are left out.")] = "1",
    overflow: Annotated[
        str | None,
        typer.Option(
            help="split, drop_tail or drop: a document longer than a row goes on in another one, keeps its first "
            "tokens, or is left out. Default: split; for conversations drop."
        ),
    ] = None,
    overlap: Annotated[
        str, typer.Option(help="Tokens that the next piece of the same document repeats, without loss.")
    ] = "0",
    overlap_across: Annotated[
        bool,
        typer.Option(
            "--overlap-across",
            help="Every row begins with the --overlap last tokens of the row before, whatever documents they are of, "
            "and they are trained on again.",
        ),
    ] = False,
    remainder: Annotated[
        str | None,
        typer.Option(
            help="drop or pad: what becomes of a row that is not full; drop_last drops a last row too that is just "
            "full. Default: drop; for conversations pad."
        ),
    ] = None,
    specials: Annotated[
        str,
        typer.Option(
            help="auto, none, bos, eos or both: what frames a document. auto: BOS before texts, where the tokenizer "
            "adds it itself."
        ),
    ] = "auto",
    mos: Annotated[
        str, typer.Option(help="none, bos, eos or an id: the token before a piece that continues a document.")
    ] = "none",
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
    workers: Workers = 1,
    executor: ExecutorOption = ExecutorName.local,
    num_jobs: NumJobs = None,
    job_id: JobId = None,
    ray_address: RayAddress = None,
    print_sbatch: PrintSbatch = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Place documents in rows of one length; writes a pack plan, no tokens are copied unless asked.

    Workers and jobs share the writing of --materialize; a plan alone is a matter of seconds.
    """
    from longspan.core.errors import ArgumentError
    from longspan.core.units import parse_length
    from longspan.data.plans.framing import frame_words
    from longspan.data.plans.packing import plan_packing, plan_split
    from longspan.data.plans.store_packing import StorePackConfig
    from longspan.data.store import TokenStore

    jobs = Jobs(executor, workers, num_jobs, job_id, ray_address)
    if materialize is None and (jobs.is_shared or print_sbatch):
        raise ArgumentError("there is nothing for jobs to share", fix="give --materialize")
    _check_form(row_format, labels, written=materialize is not None)
    if print_sbatch:
        jobs.print_sbatch("longspan-pack")
        return
    share = jobs.share()
    table, paths, documents = _documents(inputs, seed)
    given: dict[str, Any] = {
        "strategy": strategy,
        "min_length": min_length,
        "min_tail": min_tail,
        "overflow": overflow,
        "overlap": overlap,
        "overlap_across": overlap_across,
        "remainder": remainder,
        "by_source": by_source,
        "split_lengths": [] if split_lengths is None else split_lengths.split(","),
        "specials": specials,
        "mos": mos,
    }
    settings = StorePackConfig.from_dict(given, where="the command line")
    settled = settings.settle(
        [TokenStore(path) for path in paths],
        length=parse_length(length),
        where="the plan",
        ids=special_ids(paths[0]),
    )
    spec, documents = settled.pack, _whole(table, documents, settled)
    if spec.split_lengths:
        plans = {
            f"{piece}-{spec.length}": plan for piece, plan in plan_split(spec, table, documents, seed).items()
        }
    else:
        plans = {"": plan_packing(spec, table, documents, seed)}
    found = []
    with jobs.start() if materialize is not None else nullcontext() as running:
        for name, plan in plans.items():
            place = out / name
            _save(plan, place, paths, share)
            rows = None if materialize is None else materialize / name
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
    if as_json:
        print_json(found if spec.split_lengths else found[0])


def _whole(table: LengthTable, documents: np.ndarray, settled: Settled) -> np.ndarray:
    """Return the documents that are not too long, and say how many are."""
    from longspan.core.log import get_logger

    long = settled.too_long(table, documents)
    if long.any():
        get_logger("data.pack").warning(
            "left out: %d documents longer than a row, %d tokens; --overflow split cuts them",
            int(long.sum()),
            int(table.tokens[documents[long]].sum()),
        )
    return documents[~long]


def _part(inputs: list[str]) -> tuple[list[str], tuple[float, float] | None]:
    """Return the stores to mix, and the part of them where a plan of `data split` is given."""
    from longspan.core.columns import folder_kind
    from longspan.core.errors import ArgumentError
    from longspan.data.plans.mixture import KIND, MixtureConfig, MixturePlan

    plans = [path for path in inputs if folder_kind(path) == KIND]
    if not plans:
        return inputs, None
    plan = MixturePlan.load(plans[0])
    if len(inputs) > 1 or plan.spec != MixtureConfig(mode="none", part=plan.spec.part):
        raise ArgumentError(
            "a mixture is made of stores, or of one part that `data split` made", found=", ".join(inputs)
        )
    stores = stores_of(plan.stores, Path(plans[0]))
    check_lengths(lengths_of(stores)[0], plan.lengths_fingerprint, Path(plans[0]))
    return list(map(str, stores)), plan.spec.part


def _documents(inputs: list[Path], seed: int) -> tuple[LengthTable, list[str], np.ndarray]:
    import numpy as np

    from longspan.core.columns import folder_kind
    from longspan.data.plans.mixture import KIND, MixtureConfig, MixturePlan, plan_mixture

    if folder_kind(inputs[0]) == KIND:
        mixture = MixturePlan.load(inputs[0])
        table, paths = lengths_of(stores_of(mixture.stores, inputs[0]))
        check_lengths(table, mixture.lengths_fingerprint, inputs[0])
        return table, paths, np.asarray(mixture.documents)
    table, paths = lengths_of(inputs)
    return table, paths, plan_mixture(MixtureConfig.from_dict({"mode": "none"}), table, seed).documents


def _save(plan: PackPlan, place: Path, stores: list[str], share: ArrayJob) -> None:
    """Save a plan; jobs of an array all make the same one, and the first saves it."""
    from longspan.core.columns import folder_kind
    from longspan.core.errors import DataError, RunError
    from longspan.data.plans.packing import KIND, PackPlan

    if share.count == 1:
        plan.save(place, stores=stores)
        return
    if not place.exists():
        try:
            plan.save(place, stores=stores)
        except RunError:
            if not place.exists():
                raise
    there = PackPlan.load(place) if folder_kind(place) == KIND else None
    if there is None or (there.fingerprint, list(there.stores)) != (plan.fingerprint, stores):
        raise DataError(
            f"{place} holds something else than this plan", fix="remove it, or choose another --out"
        )


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


def _preset(name: str, table: LengthTable) -> dict[str, Any]:
    from longspan.data.plans.presets import load_preset

    preset = load_preset(name)
    return {
        "mode": "proportions",
        "weights": preset.weights_for(table.source_names),
        "keep_short": preset.keep_short,
        "threshold": preset.threshold,
    }


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
