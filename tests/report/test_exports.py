"""What stands beside the page, and what changed between its runs."""

from __future__ import annotations

import csv
import re
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from longspan.report import write_report
from longspan.report.charts import Axis, LineChart, Series
from longspan.report.csv_files import csv_text
from longspan.report.figures import accuracy_figure, loss_figure, write_figure
from longspan.report.layouts import Layout
from longspan.report.page_tables import latex
from longspan.report.palette import DASHES, LINES, _linear, _to_oklab
from longspan.report.samples import ScoredSample
from longspan.report.tables import ALL, score_grid
from longspan.report.training_view import MOST_SOURCES, source_losses
from longspan.report.view import Table, TableCell
from tests.report.conftest import page_of
from tests.report.synthetic_run import header, needle_lines, ppl_lines, write_records
from tests.report.test_benchmarks import rows_of

UNESCAPED = re.compile(r"(?<!\\)&")


def test_every_table_of_the_page_is_a_file_twice(tmp_path: Path) -> None:
    """Tables had to be typed off the page for a paper."""
    for label in ("before", "after"):
        write_records(tmp_path / f"run/records/ppl-{label}.jsonl", header("ppl", label), ppl_lines(label))
    result = write_report([tmp_path / "run"], tmp_path / "report.html")
    page = result.page.read_text()
    assert [path.name for path in result.figures] == ["perplexity.png", "perplexity.svg", "perplexity.pdf"]
    assert len(result.shown) == 2 * page.count("<table") and all(path.exists() for path in result.shown)
    name = "perplexity-Perplexity-by-source-longest-windows"
    with open(tmp_path / f"tables/page/{name}.csv") as file:
        shown = list(csv.reader(file))
    assert shown[0] == ["", "code", "reference"] and [row[0] for row in shown[1:]] == ["before", "after"]
    assert all(float(cell) > 1 for row in shown[1:] for cell in row[1:])
    text = (tmp_path / f"tables/page/{name}.tex").read_text()
    assert r"\begin{tabular}{lrr}" in text and text.count(r" \\") == 3 and r"\toprule" in text


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=4))
def test_no_text_breaks_a_latex_table(cells: list[tuple[str, str]]) -> None:
    """A label with an underscore, a percent sign or a line break ended the table."""
    table = Table(
        "A % caption\nof two lines",
        ["a_b", "50%"],
        [[one, TableCell(two, "num strong")] for one, two in cells],
    )
    lines = latex(table).split("\n")
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == len(cells) + 1 and all(len(UNESCAPED.findall(row)) == 1 for row in rows)
    assert lines[0].startswith("% A % caption of") and rows[0] == r"a\_b & 50\% \\"
    assert not any(re.search(r"(?<!\\)[%#]", row) for row in rows)


def test_changes_in_a_csv_are_no_formulas_and_stay_what_they_are() -> None:
    """A spreadsheet ran a label, or showed a change as text with an apostrophe."""
    rows = [["=1+1", "+1.2 to +3.4", "-2+3+cmd|' /C calc'!A0"]]
    assert csv_text(["a", "b", "c"], rows).splitlines()[1] == "'=1+1,+1.2 to +3.4,'-2+3+cmd|' /C calc'!A0"


def test_figures_of_a_paper_hold_fonts_and_no_date(tmp_path: Path) -> None:
    """Publishers refuse Type 3 fonts; a date makes another file of the same figure."""
    for name in ("a", "b"):
        figure = Figure(layout="constrained")
        figure.subplots().plot([1, 2], label="x")
        for kind in ("png", "svg", "pdf"):
            write_figure(figure, tmp_path / f"{name}.{kind}")
    assert all(
        (tmp_path / f"a.{k}").read_bytes() == (tmp_path / f"b.{k}").read_bytes()
        for k in ("png", "svg", "pdf")
    )
    assert (
        b"/Type3" not in (tmp_path / "a.pdf").read_bytes()
        and b"/FontFile2" in (tmp_path / "a.pdf").read_bytes()
    )
    width, height = struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24])
    assert width > height > 100


MACHADO = {  # Machado, Oliveira and Fernandes (2009), severity 1
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}


def test_many_sources_neither_crush_a_figure_nor_cover_each_other() -> None:
    """Guards against a legend of 100 names that leaves no room for the lines, and against names on each other."""
    sources = [f"source_{n:03}" for n in range(100)]
    losses = {source: 2 + n / 50 for n, source in enumerate(sources)}
    metrics = [{"step": n, "tokens": 1000 * n, "loss": 3.0, "loss_by_source": losses} for n in (1, 2)]
    named, others = source_losses(metrics)
    assert list(named) == [*sources[:3], *sources[-3:]] and len(others) == 94
    few = {source: losses[source] for source in sources[:MOST_SOURCES]}
    assert source_losses([{**line, "loss_by_source": few} for line in metrics]) == (
        {source: [(1000.0, loss), (2000.0, loss)] for source, loss in few.items()},
        {},
    )
    samples = [ScoredSample("a", ALL, 1024, length=1024, score=1.0)]
    layout = Layout("own", short="own", columns="length")
    grids = {f"model-{n:02}": score_grid(samples, layout) for n in range(40)}
    accuracy = accuracy_figure(grids)
    assert accuracy is not None
    for figure in (loss_figure(metrics), accuracy):
        figure.draw_without_rendering()
        axes = figure.axes[0].get_position()
        assert axes.height * figure.get_figheight() > 2.5 and axes.width * figure.get_figwidth() > 5
    lines = [Series(name, 0, [(0.0, 1.0), (1.0, 1.0)]) for name in sources]
    names = re.findall(
        r'<text x="[\d.]+" y="([\d.]+)" class="name',
        LineChart("", Axis(0, 1, []), Axis(0, 2, []), lines).draw(900),
    )
    heights = sorted(map(float, names))
    assert len(heights) == 100 and min(b - a for a, b in pairwise(heights)) >= 12


@pytest.mark.parametrize("blindness", MACHADO)
@pytest.mark.parametrize("dark", [False, True])
def test_lines_differ_for_the_colour_blind(blindness: str, dark: bool) -> None:
    """Two lines of one look; where colours come close the dashes differ."""

    def seen(colour: str) -> tuple[float, float, float]:
        channels = _linear(colour)
        mixed = [min(max(sum(a * c for a, c in zip(row, channels)), 0.0), 1.0) for row in MACHADO[blindness]]
        coded = [12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in mixed]
        return _to_oklab("#" + "".join(f"{round(255 * c):02x}" for c in coded))

    looks = [(seen(colours[dark]), dash) for colours, dash in zip(LINES, DASHES)]
    for n, (one, dash) in enumerate(looks):
        for other, its in looks[:n]:
            distance = sum((a - b) ** 2 for a, b in zip(one, other)) ** 0.5
            assert distance > 0.05 or dash != its


def two_runs(folder: Path, configs: tuple[str, str], **second: Any) -> list[Path]:
    for name, config in zip(("one", "two"), configs):
        head = header("needle", "after")
        if name == "two":
            head["params"] |= second
        lines = needle_lines("after", np.random.default_rng(1))[:40]
        write_records(folder / name / "records/needle-after.jsonl", head, lines)
        write_records(folder / name / "records/passkey-after.jsonl", {**head, "task": "passkey"}, lines)
        (folder / name / "config.yaml").write_text(config)
    return [folder / "one", folder / "two"]


def test_what_changed_between_runs_is_a_table(tmp_path: Path) -> None:
    """Which of forty settings made the difference had to be found by reading two recipes side by side."""
    base = "seed: 7\nstages:\n- name: extend\n  length: 2048\n  rope: {theta: 100000.0}\n"
    runs = two_runs(
        tmp_path, (base, base.replace("100000.0", "500000.0") + "extra: true\n"), needle="Another."
    )
    page = page_of(*runs)
    assert rows_of(page, "changes") == [
        ["setting", "one", "two"],
        ["stages.extend.rope.theta", "100000.0", "500000.0"],
        ["extra", "\u2013", "true"],
    ]
    assert "params.needle (needle, after; passkey, after)" in page, "what differs alike stands once"
    alike = page_of(*two_runs(tmp_path / "alike", (base, base)))
    assert "Nothing that the runs recorded of their settings differs." in alike
    assert 'id="changes"' not in page_of(runs[0])


def test_runs_without_a_recipe_or_with_a_broken_one_still_compare(tmp_path: Path) -> None:
    """A run of evaluations alone ended the page."""
    runs = two_runs(tmp_path, ("seed: 1\n", "seed: [1\n"))
    assert "config.yaml" in page_of(*runs)
    (runs[1] / "config.yaml").unlink()
    assert "What changed is not known of two: no config.yaml." in page_of(*runs)
