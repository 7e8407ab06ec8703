"""Write the report: one page without any outside resource, and figures and tables beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from longspan.core.errors import ArgumentError
from longspan.core.files import atomic_write
from longspan.report.controls_view import controls_section, distractor_section
from longspan.report.evaluation import Evaluation
from longspan.report.figures import write_figures
from longspan.report.headline import headline
from longspan.report.load import RecordFile, Run, load_run
from longspan.report.needle_view import needle_section
from longspan.report.palette import STEPS, theme_css
from longspan.report.perplexity_view import ppl_section
from longspan.report.tables import needle_csv, ppl_csv, summarise
from longspan.report.training_view import lengths_section, method_section, training_section, training_totals
from longspan.report.view import merge_records


@dataclass(frozen=True)
class ReportResult:
    """What `write_report` wrote, and the numbers of every run by folder name (see `summarise`)."""

    page: Path
    figures: list[Path]
    tables: list[Path]
    results: dict[str, dict[str, Any]]


def write_report(runs: Sequence[str | Path], out: str | Path, *, title: str | None = None) -> ReportResult:
    """Write the page `out` (.html), figures/*.png and tables/*.csv beside it.

    Several runs share one page; a label that two runs have carries the run's name from the second on.

    Raises:
        ArgumentError: no run is named, or `out` is not an .html file name.
        DataError: a run folder is missing, holds nothing to report, or has a malformed record.
    """
    out = Path(out)
    if not runs:
        raise ArgumentError("a report needs at least one run folder")
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ArgumentError("the report is one HTML file", found=out, fix=f"--out {out / 'report.html'}")
    loaded = [load_run(path) for path in runs]
    records = merge_records(loaded)
    evaluation = Evaluation.from_records(records)
    page = render(loaded, title=title)
    with atomic_write(out, "w") as file:
        file.write(page)
    figures = write_figures(loaded, evaluation, out.parent / "figures")
    tables = []
    for name, text in (("needle", needle_csv(evaluation.needle)), ("perplexity", ppl_csv(evaluation.ppl))):
        if text.count("\n") > 1:
            tables.append(out.parent / "tables" / f"{name}.csv")
            with atomic_write(tables[-1], "w") as file:
                file.write(text)
    results = {
        run.name if len({r.name for r in loaded}) == len(loaded) else str(run.path): summarise(run)
        for run in loaded
    }
    return ReportResult(out, figures, tables, results)


def render(runs: Sequence[Run], *, title: str | None = None) -> str:
    """Return the page as text; the same runs give the same bytes."""
    records = merge_records(runs)
    evaluation = Evaluation.from_records(records)
    sentence, tiles = headline(evaluation, training_totals(runs))
    sections = [
        needle_section(evaluation),
        ppl_section(evaluation),
        lengths_section(runs),
        training_section(runs),
        controls_section(evaluation),
        distractor_section(evaluation),
        method_section(runs, records),
    ]
    environment = Environment(
        loader=PackageLoader("longspan.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=title or "Context extension report",
        sentence=sentence,
        tiles=tiles,
        runs=[run.name for run in runs],
        facts=_facts(runs, [file.header for file in records]),
        sections={section.id: section for section in sections},
        missing=[*(line for section in sections for line in section.missing), *_unfinished(records)],
        steps=range(STEPS),
        css=Markup(theme_css() + "\n" + _asset("report.css")),
        script=Markup(_asset("report.js")),
        samples=_json(sections[0].parts.get("samples", {})),
    )


def _unfinished(records: Sequence[RecordFile]) -> list[str]:
    """Return one line for every evaluation that ended early."""
    return [
        f"{file.path.name} ends before its evaluation did: its numbers are over the {len(file.samples)} samples so far."
        for file in records
        if not file.complete
    ]


def _facts(runs: Sequence[Run], headers: Sequence[dict[str, Any]]) -> list[str]:
    """Return the small print under the headline: model, seed, date, versions."""
    model = next((h.get("model", {}).get("path") for h in headers if h.get("label") == "after"), None)
    environment = next((run.env for run in runs if run.env), {})
    seeds = [run.env["seed"] for run in runs if run.env and "seed" in run.env] or [
        h.get("seed") for h in headers
    ]
    dates = sorted(str(h["created"])[:10] for h in headers if h.get("created"))
    versions: Any = environment.get("versions") or next(
        (h.get("versions") for h in headers if h.get("versions")), {}
    )
    facts = [f"model {Path(str(model)).name}"] if model else []
    listed = sorted({str(seed) for seed in seeds if seed is not None})
    facts += [f"seed{'s' if len(listed) > 1 else ''} {', '.join(listed)}"] if listed else []
    facts += [dates[-1]] if dates else []
    facts += [
        f"{name} {versions[name]}"
        for name in ("longspan", "torch")
        if isinstance(versions, dict) and versions.get(name)
    ]
    return facts


def _asset(name: str) -> str:
    return (files("longspan.report") / "templates" / name).read_text(encoding="utf-8")


def _json(value: object) -> Markup:
    """Write JSON that cannot end its <script> element: <, > and & become unicode escapes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
