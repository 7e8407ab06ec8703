"""The report draws a grid task by the axes that its records say, whatever its name."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.core.errors import DataError
from longspan.eval.registry import entry_of
from longspan.report import write_report
from longspan.report.layouts import Layout
from longspan.report.load import load_run
from longspan.report.samples import ScoredSample
from longspan.report.tables import score_grid
from tests.report.conftest import page_of
from tests.report.synthetic_run import header, needle_lines, sample_line, write_records

LABELS = ("before", "after")

pytestmark = pytest.mark.usefixtures("png_alone")


def described(task: str, axes: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """Return the header fields that say what a task is."""
    words = {"title": "A value is asked for by its key.", "heading": "Keys and values", "short": task}
    return {"format": 2, **words, "axes": axes, "higher_is_better": True, **more}


def write(run: Path, task: str, lines: dict[str, list[dict[str, Any]]], **fields: Any) -> Path:
    for label, samples in lines.items():
        write_records(run / f"records/{task}-{label}.jsonl", header(task, label) | fields, samples)
    return run


def shape(page: str, task: str) -> list[str]:
    """Return a page's sections, drawings and buttons, without the task's own words."""
    page = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    page = re.sub(r"<title>.*?</title>|<p class=\"eyebrow\">.*?</p>", "", page)
    return re.findall(
        r'<section id="\w+"|<svg|<table|data-cell="[^"]+"|<h3>', page.replace(f'"{task}"', '"grid"')
    )


def test_identical_samples_have_the_same_sections_by_any_name(tmp_path: Path) -> None:
    """Recorded as needle they had maps, a models section, figures and a CSV; as kv_retrieval one line in a table."""
    rng = np.random.default_rng(3)
    lines = {label: needle_lines(label, rng) for label in LABELS}
    needle = entry_of("needle")
    assert needle is not None
    results = {}
    for task, fields in (
        ("needle", {}),
        ("kv_retrieval", needle._replace(name="kv_retrieval", short="kv").described()),
        ("by_fields", {"cluster": "sample"}),  # a name that nobody knows, and a header that says no axes
    ):
        run = write(tmp_path / task / "run", task, lines, **fields)
        result = write_report([run], tmp_path / task / "report.html")
        files = {path.name.replace(task, "grid") for path in (*result.figures, *result.tables)}
        table = (tmp_path / task / f"tables/{task}.csv").read_text()
        page = result.page.read_text()
        assert (
            f"{'kv' if task == 'kv_retrieval' else task.replace('_', ' ')} accuracy at 2,048 tokens" in page
        )
        results[task] = (shape(page, task), files, table, result.results["run"][task])
    assert results["kv_retrieval"] == results["needle"] == results["by_fields"]
    assert {"grid_heatmaps.png", "grid_by_length.png", "grid.csv", "effective_context.csv"} <= results[
        "needle"
    ][1]


def placed(
    rows: str, columns: str, values: list[tuple[Any, Any]], score: float = 1.0
) -> list[dict[str, Any]]:
    return [
        sample_line(f"{row}-{column}-{n}", score * (n % 2), sample=n, **{rows: row, columns: column})
        for row, column in values
        for n in range(4)
    ]


def test_rows_need_not_be_depths(tmp_path: Path) -> None:
    """A map by the number of needles was written as percent of a depth, or not drawn."""
    values = [(count, length) for count in (1, 4, 16) for length in (1024, 4096)]
    lines = {label: placed("num_needles", "length", values) for label in LABELS}
    fields = described("many", {"rows": "num_needles", "columns": "length"})
    result = write_report([write(tmp_path / "run", "many", lines, **fields)], tmp_path / "report.html")
    page = result.page.read_text()
    assert "before, 4,096 tokens, 16 needles: 2 of 4 correct (50%)" in page.replace(
        "Before training", "before"
    )
    assert "number of needles" in page and 'id="many"' in page and "Effective context" in page
    rows = list(csv.DictReader((tmp_path / "tables/many.csv").read_text().splitlines()))
    assert rows[-1] | {"label": "after", "length": "4096", "needles": "16", "mean": "0.5"} == rows[-1]
    assert {"many_heatmaps.png", "many_by_length.png"} <= {path.name for path in result.figures}


def test_axes_without_a_length(tmp_path: Path) -> None:
    """Columns that are no lengths have no effective context, no trained length in their map, and no crash."""
    values = [(keys, hops) for keys in (2, 10) for hops in (1, 2, 3)]
    lines = {label: placed("num_keys", "hops", values) for label in LABELS}
    fields = described("hops", {"rows": "num_keys", "columns": "hops"})
    result = write_report([write(tmp_path / "run", "hops", lines, **fields)], tmp_path / "report.html")
    page = result.page.read_text()
    assert ", hops 3, 10 keys: 2 of 4 correct" in page and 'id="models"' not in page
    assert "trained: " not in page
    assert result.results["run"]["hops"]["after"]["columns"] == [1, 2, 3]
    assert {"hops_heatmaps.png", "hops_by_hops.png"} <= {path.name for path in result.figures}


@pytest.mark.parametrize("rows", [None, "sort"])
def test_one_axis_and_rows_of_words(tmp_path: Path, rows: str | None) -> None:
    """Words as rows are a table of cells, as RULER's subtasks; columns alone one row a label."""
    values = [(kind, length) for kind in ("chain", "sum") for length in (1024, 2048)]
    lines = {label: placed("sort", "length", values) for label in LABELS}
    run = write(tmp_path / "run", "own", lines, **described("own", {"rows": rows, "columns": "length"}))
    page = page_of(run)
    section = re.search(r'<section id="own">(.*?)</section>', page, re.DOTALL)
    assert section is not None and section[1].count("data-cell=") == (4 if rows is None else 8)
    assert "A value is asked for by its key." in section[1] and 'id="models"' in page
    assert ("chain" in section[1]) == (rows is not None)


def test_places_in_words_have_an_order() -> None:
    """Short, medium, long by the alphabet, or qa10 before qa2, is an order that nobody reads in."""
    samples = [
        ScoredSample(f"{row}{size}", row, size)
        for row in ("qa10", "qa2")
        for size in ("long", "short", "medium")
    ]
    grid = score_grid(samples, Layout("babilong", columns="size", rows="subtask"))
    assert grid.columns == ["short", "medium", "long"] and grid.rows == ["qa2", "qa10"]


def test_lower_is_better_turns_colours_and_worst_round(tmp_path: Path) -> None:
    """An error rate of 1 was painted as the best, called correct, and had an effective context."""
    lines = {
        "after": placed("depth", "length", [(0.5, 1024)]) + placed("depth", "length", [(1.0, 1024)], 0.0)
    }
    fields = described("errors", {"rows": "depth", "columns": "length"}, higher_is_better=False)
    page = page_of(write(tmp_path / "run", "errors", lines, **fields))
    assert "Worst cell" in page and "50% at 1,024 tokens, depth 50%" in page
    assert (
        "lower is better" in page
        and "Score by context length" in page
        and 'id="models"' not in page
        and "4 correct" not in page
    )
    steps = re.findall(r'class="cell"[^>]*depth (\d+)%.*?<rect[^>]*class="h(\d+)"', page, re.DOTALL)
    by_depth = {int(depth): int(step) for depth, step in steps}
    assert by_depth[100] > by_depth[50], "no errors is the best colour"


def test_a_header_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    """Guards against a traceback, and against files of one task mixed though their axes differ."""
    line = [sample_line("a", 1.0, length=512, depth=0.5, hops=1)]
    run = write(tmp_path / "run", "own", {"after": line}, **described("own", {"columns": 3}))
    with pytest.raises(DataError, match="field 'axes' names no fields"):
        load_run(run)
    write(run, "own", {"after": line}, **described("own", {"columns": "length", "rows": "depth"}))
    write(run, "own", {"before": line}, **described("own", {"columns": "hops"}))
    with pytest.raises(DataError, match="other axes than a file of the same task"):
        page_of(run)
    write(
        run,
        "own",
        {"before": [{**line[0], "depth": None}]},
        **described("own", {"columns": "length", "rows": "depth"}),
    )
    with pytest.raises(DataError, match="field 'depth' is not a number"):
        load_run(run)


def test_scores_that_are_no_shares_stay_a_table(tmp_path: Path) -> None:
    """A task of one's own without axes in its header may score as it likes; a map holds shares alone."""
    lines = [sample_line(f"s{n}", 3.0 + n, length=512, depth=0.5) for n in range(4)]
    run = write(tmp_path / "run", "haiku", {"after": lines})
    assert "haiku_heatmaps" not in json.dumps(load_run(run).records[0].header)
    assert load_run(run).records[0].layout.columns is None
    assert "4.5" in page_of(run)


def test_a_scorer_named_as_its_mode_is_said_once(tmp_path: Path) -> None:
    """The line under a map said `teacher_forced 1, teacher_forced`."""
    params = {"scorer": {"name": "teacher_forced", "version": 1}, "mode": "teacher_forced"}
    run = write(tmp_path / "run", "needle", {"after": placed("depth", "length", [(0.5, 512)])}, params=params)
    detail = re.search(r'<p class="detail">(.*?)</p>', page_of(run))
    assert detail is not None and detail[1].endswith("; teacher_forced 1")


def test_a_file_without_scores_does_not_end_the_report(tmp_path: Path) -> None:
    """Axes that are read off samples differ where one model's were all lost, or lack a depth: that is no error."""
    lines = {"after": placed("depth", "length", [(0.5, 512), (1.0, 512)])}
    run = write(tmp_path / "run", "own", lines)
    write(run, "own", {"before": [{**line, "score": None, "unscored": "lost"} for line in lines["after"]]})
    page = page_of(run)
    assert "512 tokens, depth 100%: 2 of 4 correct" in page and "8 samples unscored (lost)" in page
    write(run, "own", {"before": [{**line, "depth": None} for line in lines["after"]]})
    assert 'id="own"' in page_of(run)
