"""Write the report: one page without any outside resource, and figures and tables beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from longspan.core.errors import ArgumentError
from longspan.core.files import atomic_write, finite
from longspan.report.changes_view import changes_section
from longspan.report.controls_view import controls_section
from longspan.report.csv_files import csv_tables
from longspan.report.evaluation import Evaluation, first_with_role
from longspan.report.figures import file_name, write_figures
from longspan.report.grids_view import grid_section
from longspan.report.groups import RunGroup, group_runs, groups_csv
from longspan.report.groups_view import group_headline, groups_sections
from longspan.report.headline import headline, models_section
from longspan.report.layouts import by_value
from longspan.report.load import LoadedRun, RecordFile, load_runs
from longspan.report.maps_view import map_section
from longspan.report.method_view import cost_section, method_section, mixed_settings, two_models
from longspan.report.page_tables import page_tables
from longspan.report.pairs_view import changes_words
from longspan.report.palette import STEPS, theme_css
from longspan.report.perplexity_view import ppl_section
from longspan.report.sample_data import SampleData
from longspan.report.scores_view import delta_section, scores_section
from longspan.report.summary import summarise
from longspan.report.tables import tally_of
from longspan.report.thinking_view import thinking_section
from longspan.report.training_view import lengths_section, training_section, training_totals
from longspan.report.view import LONG, LONG_NAME, Section, merge_records, short_name, unscored_text

_MOST_LINKS = 16
"""Sections whose links stay on the screen; more are a list at the beginning of the page."""


@dataclass(frozen=True)
class ReportResult:
    """What `write_report` wrote, and the numbers of every run by folder name (see `summarise`)."""

    page: Path
    figures: list[Path]
    """Each as .png, .svg and .pdf."""
    tables: list[Path]
    """Numbers as they were measured, unrounded: .csv, one file a task."""
    shown: list[Path]
    """The tables of the page as it shows them, each as .csv and .tex."""
    results: dict[str, dict[str, Any]]


def write_report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    title: str | None = None,
    group: bool = False,
) -> ReportResult:
    """Write the page `out` (.html), and beside it figures/*.{png,svg,pdf}, tables/*.csv and tables/page/*.{csv,tex}.

    Several runs share one page; labels that two runs have carry the names of their runs. `group`: runs that differ in
    their seed alone are summed up first, with mean and spread.

    Raises:
        ArgumentError: no run is named, one is named twice, `out` is not an .html file name, or a run that is to be
            grouped does not say how it was trained.
        DataError: a run folder is missing, holds nothing to report, or has a malformed record.
    """
    runs = [runs] if isinstance(runs, str | Path) else runs
    if not runs:
        raise ArgumentError("a report needs at least one run folder")
    out = page_file(out, what="report", option="--out", usual="report.html")
    loaded = load_runs(runs)
    results = {run.name: summarise(run) for run in loaded}
    groups = group_runs(loaded, results) if group else []
    page = _compose(loaded, groups)
    with atomic_write(out, "w") as file:
        file.write(_written(page, title))
    figures = write_figures(loaded, page.evaluation, out.parent / "figures")
    measured = {f"{file_name(name)}.csv": text for name, text in csv_tables(page.evaluation).items()}
    measured |= {f"{name}.csv": text for name, text in groups_csv(groups).items()}
    tables = _write_all(out.parent / "tables", measured)
    shown = _write_all(out.parent / "tables" / "page", page_tables(page.sections))
    return ReportResult(out, figures, tables, shown, results)


def _write_all(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    for name, text in texts.items():
        with atomic_write(folder / name, "w") as file:
            file.write(text)
    return [folder / name for name in texts]


def render(runs: Sequence[LoadedRun], *, title: str | None = None, groups: Sequence[RunGroup] = ()) -> str:
    """Return the page as text; the same runs give the same bytes."""
    return _written(_compose(runs, groups), title)


class _Page(NamedTuple):
    """What is on a page."""

    runs: Sequence[LoadedRun]
    groups: Sequence[RunGroup]
    records: list[RecordFile]
    evaluation: Evaluation
    sections: list[Section]
    data: SampleData


def _compose(runs: Sequence[LoadedRun], groups: Sequence[RunGroup]) -> _Page:
    records = merge_records(runs)
    evaluation = Evaluation.from_records(records)
    data = SampleData()
    drawn = _drawn(evaluation)
    sections = [
        *(groups_sections(evaluation, groups) if groups else []),
        models_section(evaluation),
        changes_section(runs),
        *(map_section(evaluation, task, data) for task in evaluation.layouts if task in drawn),
        *(grid_section(evaluation, task, data) for task in evaluation.grids if task not in drawn),
        ppl_section(evaluation),
        thinking_section(evaluation),
        delta_section(evaluation),
        *(scores_section(evaluation, task, data) for task in evaluation.scores),
        lengths_section(runs),
        training_section(runs),
        controls_section(evaluation),
        cost_section(records),
        method_section(runs, records),
    ]
    return _Page(runs, groups, records, evaluation, sections, data)


def _drawn(evaluation: Evaluation) -> list[str]:
    return evaluation.maps + ["needle_distractors"] * bool(evaluation.distractors)


def _written(page: _Page, title: str | None) -> str:
    runs, records, sections = page.runs, page.records, page.sections
    training = training_totals(runs)
    of_groups = group_headline(page.evaluation, page.groups, training) if page.groups else None
    sentence, tiles = of_groups or headline(page.evaluation, training)
    missing = (
        [] if _drawn(page.evaluation) else ["Needle accuracy was not measured: no records/needle-*.jsonl."]
    )
    missing += [line for section in sections for line in section.missing]
    missing += [*_unscored(records), *_unfinished(records), *_empty(runs)]
    missing += [*two_models(records), *mixed_settings(records)]
    return template("report.html.j2").render(
        title=title or "Context extension report",
        sentence=sentence,
        tiles=tiles,
        runs=[run.name for run in runs],
        facts=_facts(runs, records),
        sections=[section for section in sections if section.parts],
        missing=missing,
        steps=range(STEPS),
        long=LONG,
        changes_words=changes_words(),
        long_name=LONG_NAME,
        most_links=_MOST_LINKS,
        css=styles(),
        script=Markup(_asset("report.js")),
        samples=_json(page.data.to_json()),
    )


def _empty(runs: Sequence[LoadedRun]) -> list[str]:
    return [f"{path} holds no evaluation yet." for run in runs for path in run.empty]


def _unscored(records: Sequence[RecordFile]) -> list[str]:
    """Return one line for every evaluation with samples that have no score, with their reasons."""
    tallies = [(file, tally_of(file.samples)) for file in records if file.task != "ppl"]
    return [
        f"{file.task}, {short_name(file.label)}: {unscored_text(tally)} of {len(file.samples):,}."
        for file, tally in tallies
        if tally.unscored
    ]


def _unfinished(records: Sequence[RecordFile]) -> list[str]:
    """Return one line for every evaluation that ended early."""
    return [
        f"{file.path.name} ends before its evaluation did: its numbers are over the {len(file.samples)} samples so far."
        for file in records
        if not file.complete
    ]


def _facts(runs: Sequence[LoadedRun], records: Sequence[RecordFile]) -> list[str]:
    """Return the small print under the headline: model, seed, date, versions."""
    headers = [file.header for file in records]
    after = first_with_role("after", [file.label for file in records])
    model = next((f.header.get("model", {}).get("path") for f in records if f.label == after), None)
    environment = next((run.env for run in runs if run.env), {})
    seeds = [run.env["seed"] for run in runs if run.env and "seed" in run.env] or [
        h.get("seed") for h in headers
    ]
    dates = sorted(str(h["created"])[:10] for h in headers if h.get("created"))
    versions: Any = environment.get("versions") or next(
        (h.get("versions") for h in headers if h.get("versions")), {}
    )
    facts = [f"model {Path(str(model)).name}"] if model else []
    listed = sorted({str(seed) for seed in seeds if seed is not None}, key=by_value)
    facts += [f"seed{'s' if len(listed) > 1 else ''} {', '.join(listed)}"] if listed else []
    facts += [dates[-1]] if dates else []
    facts += [
        f"{name} {versions[name]}"
        for name in ("longspan", "torch")
        if isinstance(versions, dict) and versions.get(name)
    ]
    return facts


def template(name: str) -> Template:
    """Return the template of a page; what it is given is escaped, and all that it names has to be given."""
    environment = Environment(
        loader=PackageLoader("longspan.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def styles() -> Markup:
    """Return the style sheet of the pages."""
    return Markup(theme_css() + "\n" + _asset("report.css"))


def page_file(out: str | Path, *, what: str, option: str, usual: str) -> Path:
    """Return the name of a page. Raises ArgumentError where it is none: before anything is read for it."""
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        fix = f"{option} {out / usual if out.is_dir() else out.with_suffix('.html')}"
        raise ArgumentError(f"the {what} is one HTML file", found=out, fix=fix)
    return out


def _asset(name: str) -> str:
    return (files("longspan.report") / "templates" / name).read_text(encoding="utf-8")


def _json(value: object) -> Markup:
    """Write JSON that cannot end its <script> element: <, > and & become unicode escapes."""
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
