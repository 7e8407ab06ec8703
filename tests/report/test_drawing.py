"""Colours and drawing: readable, ordered, inside the picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from importlib.resources import files
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from longspan.report.charts import (
    Axis,
    LineChart,
    Mark,
    Series,
    cut_name,
    heat_map,
    length_axis,
    length_text,
    number_axis,
)
from longspan.report.figures import _length_ticks
from longspan.report.layouts import Layout
from longspan.report.palette import LINES, _luminance, contrast, ink_on, sequential, step_of
from longspan.report.samples import ScoredSample
from longspan.report.svg import AxisScale, Canvas, linear_ticks, log_ticks, spread, thinned
from longspan.report.tables import score_grid

PAGES = ("#fdfdfb", "#12151b")


@pytest.mark.parametrize("dark", [False, True])
def test_the_scale_is_ordered_by_lightness_and_its_numbers_are_readable(dark: bool) -> None:
    """Guards against a scale that colour-blind readers or a grey printer cannot order."""
    colours = sequential(dark)
    lightness = [_luminance(colour) for colour in colours]
    assert lightness == sorted(lightness, reverse=not dark)
    assert min(contrast(ink_on(colour), colour) for colour in colours) >= 4.5
    assert [step_of(v) for v in (-1, 0, 0.5, 1, 2)] == [0, 0, 10, 20, 20]


@pytest.mark.parametrize("dark", [False, True])
def test_lines_stand_out_from_the_page(dark: bool) -> None:
    """Guards against a line or its name that fades into the page (WCAG: 3:1 for graphics, 4.5:1 for text)."""
    assert min(contrast(colours[dark], PAGES[dark]) for colours in LINES) >= 4.5


def test_words_stand_out_from_the_page() -> None:
    """Guards against grey text that is too light to read (WCAG AA, 4.5:1), in either theme."""
    css = (files("longspan.report") / "templates" / "report.css").read_text()
    themes = [
        dict(re.findall(r"--(\w+): (#\w+)", part)) for part in css.split("prefers-color-scheme: dark")[:2]
    ]
    for theme in themes:
        for name in ("ink", "soft", "muted", "accent", "good", "bad"):
            assert min(contrast(theme[name], theme[ground]) for ground in ("page", "panel")) >= 4.5, name


def test_ticks_are_round_and_inside() -> None:
    """Guards against off-by-one ticks at the ends."""
    assert linear_ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert linear_ticks(0, 1.23e6, 4) == [0, 5e5, 1e6]
    assert log_ticks(8, 300) == [10, 20, 50, 100, 200]
    assert [length_text(n) for n in (256, 2048, 16384, 131072, 2**20, 20000)] == [
        "256", "2,048", "16k", "128k", "1M", "20,000"
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_spread_names_never_overlap_nor_leave_the_chart(wished: list[float]) -> None:
    """Guards against names printed over each other where lines end together."""
    placed = spread(wished, 15, 0, 300)
    ordered = sorted(placed)
    assert all(b - a >= 15 - 1e-6 for a, b in pairwise(ordered))
    assert ordered[0] >= -1e-6 and ordered[-1] <= 300 + 1e-6
    assert sorted(range(len(wished)), key=lambda i: (wished[i], i)) == sorted(
        range(len(wished)), key=placed.__getitem__
    )


def test_thinned_ticks_keep_the_last_and_the_gap() -> None:
    """Guards against tick labels that run into each other."""
    assert thinned([0, 1, 2, 3, 4], AxisScale(0, 4, 0, 40), 15) == [0, 2, 4]


def test_text_and_attributes_are_escaped() -> None:
    """Guards against markup in a label."""
    canvas = Canvas(10, 10)
    canvas.text(0, 0, "<b>&", data_tip='"><script>')
    root = ElementTree.fromstring(canvas.render('"<x>'))
    assert (
        root[0].text == "<b>&"
        and root[0].get("data-tip") == '"><script>'
        and root.get("aria-label") == '"<x>'
    )


def sample(length: int, depth: float, score: float | None) -> ScoredSample:
    return ScoredSample(
        f"{length}", depth, length, score=score, unscored=None if score is not None else "lost"
    )


def test_a_heat_map_tells_zero_missing_and_unscored_apart() -> None:
    """Guards against a missing cell painted like a zero."""
    layout = Layout("needle", rows="depth", columns="length")
    table = score_grid([sample(128, 0.0, 0.0), sample(256, 1.0, None), sample(128, 1.0, 1.0)], layout)
    root = ElementTree.fromstring(
        heat_map("x", table, 400, key="m", trained=[(128, "trained")], compact=False)
    )
    cells = {cell.get("aria-label", ""): cell for cell in root.iter("g")}
    texts = {label.partition(", ")[2]: [t.text for t in cell.iter("text")] for label, cell in cells.items()}
    assert texts["128 tokens, depth 0%: 0 of 1 correct (0%), 95% interval 0% to 79%"] == ["0"]
    assert texts["256 tokens, depth 0%: not measured"] == ["\u2013"]
    assert texts["256 tokens, depth 100%: 1 not scored"] == ["n/s"]
    buttons = [cell for cell in cells.values() if cell.get("role") == "button"]
    assert len(buttons) == 3, "a cell without samples has nothing to open"


def test_lengths_behind_the_last_measured_one_have_one_line() -> None:
    """Their captions were written over each other: 8,192 before and 16k after, in a grid that ends at 8,192."""
    table = score_grid([sample(4096, 0.0, 1.0), sample(8192, 0.0, 1.0)], Layout("needle", "depth", "length"))
    marks = [(8192, "before: 8,192"), (16384, "trained: 16k"), (4096, "other")]
    root = ElementTree.fromstring(heat_map("x", table, 400, key="m", trained=marks, compact=False))
    captions = [text.text for text in root.iter("text") if text.get("class") == "mark-name"]
    assert sorted(map(str, captions)) == ["before: 8,192, trained: 16k", "other"]


@pytest.mark.parametrize("count", [1, 2, 30])
def test_charts_survive_one_point_and_many_lines(count: int) -> None:
    """Guards against divisions by an empty range."""
    series = [Series(f"s{n}", n % 8, [(256.0, 2.0)], [(1.0, 3.0)], ["tip"]) for n in range(count)]
    chart = LineChart(
        "l", length_axis([256], "x"), number_axis([2.0], "y", log=True), series, [Mark(256, "m")]
    )
    ElementTree.fromstring(chart.draw(350, names=False))
    ElementTree.fromstring(chart.draw(1000))
    assert isinstance(number_axis([0.0], "y"), Axis)


def test_labels_of_lengths_do_not_lie_on_each_other() -> None:
    """Buckets of equal width crowd at the right end of a logarithmic axis; a grid of doublings keeps them all."""
    for lengths in (
        range(128, 2049, 128),
        [128 << n for n in range(9)],
        [128, 256, 512, 1024, 1536, 2048],
        [7],
        [],
    ):
        axes = Figure().subplots()
        _length_ticks(axes, list(lengths))
        kept = axes.xaxis.get_major_locator().locs
        assert list(kept[-1:]) == list(lengths[-1:])
        assert all(after >= 1.25 * before for before, after in pairwise(kept))
        if len(lengths) < 10:
            assert list(kept) == list(lengths)
        axes.figure.canvas.draw()


def test_long_names_keep_both_ends_and_wide_ones_are_cut_sooner() -> None:
    assert cut_name("short") == "short"
    cut = cut_name("model-" + "x" * 90 + "-step-12000")
    assert len(cut) <= 34 and cut.startswith("model-x") and cut.endswith("x-step-12000")
    wide = cut_name("\u6a21" * 60)
    assert len(wide) <= 20 and "\u2026" in wide
