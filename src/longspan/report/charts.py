"""The report's charts: needle heat map, line chart, length histogram. Each returns one SVG string."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from longspan.report.layouts import axis_words, length_text, value_text, value_words
from longspan.report.palette import DASHES, step_of
from longspan.report.svg import (
    CHAR_WIDTH,
    AxisScale,
    Canvas,
    linear_ticks,
    log_ticks,
    spread,
    text_width,
    thinned,
)
from longspan.report.tables import Grid, Tally

FONT = 12.0
_MOST_CHARACTERS = 34


def cut_name(text: str, most: int = _MOST_CHARACTERS) -> str:
    """Return a name that fits into a drawing: a long one keeps both its ends, in which names differ."""
    width = most * CHAR_WIDTH
    if text_width(text, 1.0) <= width:
        return text
    kept = len(text)
    while text_width(text[: kept // 2] + text[len(text) - kept // 2 :], 1.0) > width - 1:
        kept -= 1
    return f"{text[: kept // 2]}\u2026{text[len(text) - kept // 2 :]}"


def cut_names(texts: Iterable[str], most: int = _MOST_CHARACTERS) -> dict[str, str]:
    """Return `cut_name` of each; names that are one name then are cut at the word in which they begin to differ."""
    cut = {text: cut_name(text, most) for text in texts}
    for shared in [name for name, count in Counter(cut.values()).items() if count > 1]:
        alike = [text for text in cut if cut[text] == shared]
        differ = next(n for n, letters in enumerate(zip(*alike)) if len(set(letters)) > 1)
        word = 1 + max(alike[0].rfind(mark, 0, differ) for mark in "-_/, ")
        cut |= {text: f"{text[:6]}\u2026{cut_name(text[word:], most - 7)}" for text in alike}
    return cut


@dataclass(frozen=True)
class Mark:
    """A labelled vertical line, such as a trained length or the border of a stage."""

    x: float
    text: str


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), optional intervals (low, high) and tooltips, one per point."""

    name: str
    color: int
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float] | None] = ()
    tips: Sequence[str] = ()
    family: str = "c"
    faint: bool = False
    strong: bool = False
    dashed: bool = True


@dataclass(frozen=True)
class Axis:
    """An axis: limits, ticks (value, text), its name, and whether it is logarithmic."""

    lo: float
    hi: float
    ticks: Sequence[tuple[float, str]]
    name: str = ""
    log: bool = False


@dataclass(frozen=True)
class LineChart:
    """A line chart without its size, so that it can be drawn for a wide and for a narrow page."""

    label: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    marks: Sequence[Mark] = field(default_factory=tuple)
    height: float = 320

    def margins(self, names: bool) -> tuple[float, float]:
        """Return the room left and right of the plot area, in pixels."""
        names_cut = cut_names(s.name for s in self.series if s.points and not s.faint)
        widest = max((text_width(name, FONT) for name in names_cut.values()), default=0)
        left = 12 + max((text_width(text, FONT) for _, text in self.y.ticks), default=0)
        return left, 14 + (widest + 8 if names else 0)

    def draw(self, width: float, *, names: bool = True, margins: tuple[float, float] | None = None) -> str:
        """Return the chart; `names` writes each line's name at its right end (else the page carries a legend).

        It is higher where that many names need it.
        """
        named = [s for s in self.series if s.points and not s.faint]
        left, right = margins or self.margins(names)
        top, bottom = (42 if any(mark.text for mark in self.marks) else 24), 44
        height = max(self.height, top + bottom + (FONT + 3) * len(named)) if names else self.height
        canvas = Canvas(width, height)
        x = AxisScale(self.x.lo, self.x.hi, left, width - right, self.x.log)
        y = AxisScale(self.y.lo, self.y.hi, height - bottom, top, self.y.log)
        _frame(canvas, self, x, y)
        _draw_marks(canvas, self.marks, x, top, y.start)
        # Samples of several lines at one x would hide each other's whiskers: a few pixels to the side each.
        whiskered = [s for s in self.series if s.intervals]
        for series in sorted(self.series, key=lambda s: (s.strong, not s.faint)):
            slot = whiskered.index(series) - (len(whiskered) - 1) / 2 if series in whiskered else 0.0
            _draw_series(canvas, series, x, y, dodge=slot * 3.5)
        if names:
            ends = spread([y(s.points[-1][1]) for s in named], FONT + 3, top + 4, y.start - 2)
            cut = cut_names(s.name for s in named)
            for series, end in zip(named, ends):
                cls = f"name {series.family}{series.color}" + (" strong" if series.strong else "")
                cls += " ordinal" if series.family == "p" else ""
                # Lines that end near the right side share one column of names.
                last = x(series.points[-1][0])
                place = x.stop + 8 if last > 0.8 * x.stop else last + 10
                canvas.text(place, end + FONT * 0.34, cut[series.name], cls=cls)
        return canvas.render(self.label)


def number_axis(values: Sequence[float], name: str, *, log: bool = False, zero: bool = False) -> Axis:
    """Return an axis that holds `values` with some air, ticks at round numbers."""
    lo, hi = min(values), max(values)
    if log:
        lo, hi = lo / 1.12, hi * 1.12
        ticks = log_ticks(lo, hi)
        if len(ticks) < 2:
            ticks = linear_ticks(lo, hi, 4)
    else:
        pad = (hi - lo) * 0.06 or max(abs(hi) * 0.1, 0.5)
        lo, hi = (0.0 if zero else lo - pad), hi + pad
        ticks = linear_ticks(lo, hi, 5)
    return Axis(lo, hi, [(v, f"{v:,.10g}") for v in ticks], name, log)


def place_axis(field: str | None, places: Sequence[float], *, air: float = 1.0) -> Axis | None:
    """Return the axis of a layout's columns with one tick a place; None where these are words."""
    if any(isinstance(place, str) for place in places):
        return None
    if field == "length":
        return length_axis([int(place) for place in places], axis_words(field), air=air)
    pad = (max(places) - min(places)) * 0.06 or 0.5
    ticks = [(float(place), value_text(field, place)) for place in places]
    return Axis(min(places) - pad, max(places) + pad, ticks, axis_words(field))


def length_axis(lengths: Sequence[int], name: str, *, air: float = 1.0) -> Axis:
    """Return a log axis with one tick per measured length; `air` widens it on both sides, as a factor."""
    ticks = [(float(v), length_text(v)) for v in lengths]
    return Axis(min(lengths) / air, max(lengths) * air, ticks, name, log=True)


def share_axis(name: str) -> Axis:
    """Return an axis from 0 to 100 %."""
    return Axis(0, 1, [(v / 4, f"{v * 25}%") for v in range(5)], name)


def _frame(canvas: Canvas, chart: LineChart, x: AxisScale, y: AxisScale) -> None:
    for value, text in chart.y.ticks:
        canvas.line(x.start, y(value), x.stop, y(value), cls="grid")
        canvas.text(x.start - 8, y(value) + FONT * 0.34, text, cls="tick", text_anchor="end")
    canvas.line(x.start, y.start, x.stop, y.start, cls="axis")
    texts = dict(chart.x.ticks)
    widest = max((text_width(text, FONT) for text in texts.values()), default=0)
    for value in thinned(list(texts), x, widest + 8):
        canvas.line(x(value), y.start, x(value), y.start + 4, cls="axis")
        canvas.text(x(value), y.start + 18, texts[value], cls="tick", text_anchor="middle")
    canvas.text(
        (x.start + x.stop) / 2, canvas.height - 6, chart.x.name, cls="axis-name", text_anchor="middle"
    )
    canvas.text(2, 12, chart.y.name, cls="axis-name")


def _draw_marks(canvas: Canvas, marks: Sequence[Mark], x: AxisScale, top: float, bottom: float) -> None:
    """Draw vertical lines; a name goes left of its line where the right side has no room."""
    right_end = -1e9
    for mark in sorted(marks, key=lambda m: m.x):
        text = cut_name(mark.text)
        place, width = x(mark.x), text_width(text, FONT - 1)
        canvas.line(place, top - (18 if mark.text else 4), place, bottom, cls="mark")
        if place + width + 4 > x.stop and place - width - 4 > right_end:
            canvas.text(place - 4, top - 10, text, cls="mark-name", text_anchor="end")
        elif place + 4 > right_end and place + width + 4 <= canvas.width and mark.text:
            canvas.text(place + 4, top - 10, text, cls="mark-name")
            right_end = place + 4 + width


def _draw_series(canvas: Canvas, series: Series, x: AxisScale, y: AxisScale, *, dodge: float) -> None:
    cls = f"{series.family}{series.color}"
    pixels = [(x(a) + dodge, y(b)) for a, b in series.points]
    if series.faint:
        canvas.path(pixels, cls=f"line faint {cls}")
        return
    for (place, _), interval in zip(pixels, series.intervals):
        if interval is not None:
            canvas.line(place, y(interval[0]), place, y(interval[1]), cls=f"whisker {cls}")
    dash = DASHES[series.color % len(DASHES)] if series.dashed and series.family == "c" else ""
    canvas.path(
        pixels, cls=f"line {cls}" + (" strong" if series.strong else ""), stroke_dasharray=dash or None
    )
    for (place, height), tip in zip(pixels, series.tips):
        canvas.circle(place, height, 3.4 if series.strong else 2.8, cls=f"dot {cls}")
        canvas.circle(place, height, 10, cls="hit", data_tip=tip)


def heat_map(
    name: str, table: Grid, width: float, *, key: str, trained: Sequence[tuple[int, str]], compact: bool
) -> str:
    """Return a layout's cells with their percentages, a row of column means, and lines at trained lengths.

    `key` names the map in the page's sample data. `trained` holds (tokens, caption); the line stands after the
    last measured length that is not longer.
    """
    font = 11.0 if compact else 13.0
    layout = table.layout
    row_texts = [value_text(layout.rows, row) for row in table.rows]
    texts = [value_text(layout.columns, place, compact=compact) for place in table.columns]
    left, top, right = (43.0, 20.0, 3.0) if compact else (64.0, 30.0, 6.0)
    left = max(left, max(text_width(text, FONT) for text in row_texts) + 12)
    columns, rows = len(table.columns), len(table.rows)
    cell_w = (width - left - right) / columns
    font = max(9.0, min(font, cell_w * 0.4))
    cell_h = min(max(cell_w * 0.62, 22.0), 30.0 if compact else 46.0)
    gap = 1.0 if compact else 1.5
    mean_top = top + rows * cell_h + 8
    bottom = mean_top + cell_h
    canvas = Canvas(width, bottom + (36 if not compact else 34))
    prints = cell_w >= font * 2.1

    def draw(column: int, y: float, tally: Tally) -> None:
        box = (left + column * cell_w + gap, y + gap, cell_w - 2 * gap, cell_h - 2 * gap)
        _cell(canvas, box, tally, font, prints)
        canvas.close()

    for row, place in enumerate(table.rows):
        y = top + row * cell_h
        canvas.text(left - 8, y + cell_h / 2 + font * 0.34, row_texts[row], cls="tick", text_anchor="end")
        for column, other in enumerate(table.columns):
            tally = table.tally(place, other)
            where = f"{value_words(layout.columns, other)}, {value_words(layout.rows, place)}"
            label = f"{name}, {where}: {tally_text(tally)}"
            cell = (
                {"tabindex": -1, "role": "button", "data_cell": f"{key}/{row}/{column}"}
                if tally_size(tally)
                else {"data_tip": "", "role": "img"}
            )
            canvas.open(cls="cell", aria_label=label, **cell)
            draw(column, y, tally)
    canvas.text(left - 8, mean_top + cell_h / 2 + font * 0.34, "mean", cls="tick", text_anchor="end")
    for column, place in enumerate(table.columns):
        tally = table.by_column[place]
        tip = f"{name}, {value_words(layout.columns, place)}, all rows: {tally_text(tally)}"
        canvas.open(cls="cell mean", role="img", aria_label=tip, data_tip="")
        draw(column, mean_top, tally)
    x = AxisScale(0, columns, left, left + columns * cell_w)
    widest = max(text_width(text, FONT) for text in texts) + 4
    for tick in thinned([float(n) for n in range(columns)], x, widest):
        canvas.text(x(tick + 0.5), bottom + 15, texts[int(tick)], cls="tick", text_anchor="middle")
    column_words, row_words = axis_words(layout.columns), axis_words(layout.rows)
    canvas.text(x(columns / 2), bottom + 31, column_words, cls="axis-name", text_anchor="middle")
    if not compact:
        canvas.text(2, 12, row_words, cls="axis-name")
    _trained_lines(canvas, table, trained, x, top, bottom, font)
    caption = f"{layout.capital} accuracy by {row_words} and {column_words}: {name}"
    return canvas.render(caption, role="group", cls="plot heat")


def tally_size(tally: Tally) -> int:
    """Return how many samples a tally holds, scored or not."""
    return tally.scored + tally.unscored


def tally_text(tally: Tally) -> str:
    """Say a tally in words: `7 of 8 correct (88%), 95% interval 53% to 98%`; a graded score has a mean instead."""
    if tally.mean is None:
        return f"{tally.unscored} not scored" if tally.unscored else "not measured"
    if tally.higher_is_better and all(score in (0.0, 1.0) for score in tally.scores):
        text = f"{tally.correct:g} of {tally.scored} correct ({tally.mean:.0%})"
    else:
        text = f"mean {tally.mean:.1%} of {tally.scored}"
    if tally.interval is not None:
        text += f", 95% interval {tally.interval[0]:.0%} to {tally.interval[1]:.0%}"
    text += "".join(f", {count} {reason}" for reason, count in tally.no_answer.most_common())
    return text + (f", {tally.unscored} not scored" if tally.unscored else "")


def _cell(
    canvas: Canvas, box: tuple[float, float, float, float], tally: Tally, font: float, prints: bool
) -> None:
    x, y, width, height = box
    if tally.mean is None or tally.goodness is None:
        canvas.rect(x + 0.5, y + 0.5, width - 1, height - 1, rx=2, cls="absent")
        text, ink = ("n/s" if tally.unscored else "\u2013"), "absent-ink"
    else:
        step = step_of(tally.goodness)
        canvas.rect(x, y, width, height, rx=2, cls=f"h{step}")
        text, ink = f"{tally.mean * 100:.0f}", f"i{step}"
    if prints:
        canvas.text(
            x + width / 2, y + height / 2 + font * 0.35, text, cls=ink, text_anchor="middle", font_size=font
        )
    if tally.scored and tally.unscored:
        canvas.path([(x + width - 7, y), (x + width, y), (x + width, y + 7)], closed=True, cls=ink)


def _trained_lines(
    canvas: Canvas,
    table: Grid,
    trained: Sequence[tuple[int, str]],
    x: AxisScale,
    top: float,
    bottom: float,
    font: float,
) -> None:
    captions: dict[int, list[str]] = {}
    for tokens, each in trained:
        captions.setdefault(sum(length <= tokens for length in table.columns), []).append(each)
    captions.pop(0, None)
    for column, several in captions.items():
        caption = ", ".join(several)  # two lengths behind the last that was measured have one line
        place = min(x(column), canvas.width - 1.5)
        canvas.line(place, top - 6, place, bottom, cls="trained")
        before_line = place + text_width(caption, font - 1) > canvas.width
        anchor = (
            "end"
            if before_line
            else "middle"
            if place - x.start > text_width(caption, font - 1) / 2
            else "start"
        )
        canvas.text(place + (2 if before_line else 0), top - 9, caption, cls="mark-name", text_anchor=anchor)


@dataclass(frozen=True)
class Shares:
    """Token shares of one histogram: `edges` in tokens (one more than `shares`), shares in 0..1."""

    name: str
    color: int
    edges: Sequence[float]
    shares: Sequence[float]


@dataclass(frozen=True)
class LengthHistogram:
    """Token share per log2 bin of document length, without its size; `top_share` is the end of the y axis."""

    label: str
    series: Sequence[Shares]
    x: Axis
    top_share: float

    def draw(self, width: float) -> str:
        """Return the histogram; the first series is filled, later ones are outlines over it."""
        axis, top_share = self.x, self.top_share
        height, left, right, top = 150.0, 34.0, 8.0, 8.0
        canvas = Canvas(width, height)
        x = AxisScale(axis.lo, axis.hi, left, width - right, log=True)
        y = AxisScale(0, top_share, height - 24, top)
        for share in linear_ticks(0, top_share, 3):
            canvas.line(left, y(share), width - right, y(share), cls="grid")
            canvas.text(left - 6, y(share) + 4, f"{share:.0%}", cls="tick", text_anchor="end")
        for number, one in enumerate(self.series):
            held = [n for n, share in enumerate(one.shares) if share > 0]
            points: list[tuple[float, float]] = []
            for n in range(held[0], held[-1] + 1) if held else ():
                low, high = max(one.edges[n], axis.lo), min(one.edges[n + 1], axis.hi)
                points += [(x(low), y(one.shares[n])), (x(high), y(one.shares[n]))]
            if points:
                points = [(points[0][0], y(0)), *points, (points[-1][0], y(0))]
            canvas.path(
                points, closed=number == 0, cls=f"{'area' if number == 0 else 'outline'} c{one.color}"
            )
        canvas.line(left, y(0), width - right, y(0), cls="axis")
        texts = dict(axis.ticks)
        for value in thinned(list(texts), x, max(text_width(t, FONT) for t in texts.values()) + 10):
            canvas.text(
                min(x(value), width - right - 8), height - 8, texts[value], cls="tick", text_anchor="middle"
            )
        return canvas.render(self.label)


def length_panels(
    groups: Mapping[str, Sequence[Shares]], title: str, axis_name: str
) -> dict[str, LengthHistogram]:
    """Return a histogram for each group, all on the same axes: they end where nothing is held."""
    every = [one for group in groups.values() for one in group]
    held = [
        (one.edges[n], one.edges[n + 1]) for one in every for n, share in enumerate(one.shares) if share > 0
    ]
    low, high = max(min((lo for lo, _ in held), default=1), 1), max((hi for _, hi in held), default=2)
    ticks = [(float(2**n), length_text(2**n)) for n in range(40) if low <= 2**n <= high]
    axis = Axis(low, max(high, low * 2), ticks, axis_name, log=True)
    top = max((share for one in every for share in one.shares), default=1.0) * 1.08
    return {name: LengthHistogram(f"{title}, {name}", group, axis, top) for name, group in groups.items()}


@dataclass(frozen=True)
class ForestRow:
    """One change with its interval, both as shares (0.01 is one percentage point)."""

    name: str
    color: int
    value: float
    interval: tuple[float, float] | None
    tip: str


@dataclass(frozen=True)
class Forest:
    """Changes around zero, one row each, in percentage points."""

    label: str
    rows: Sequence[ForestRow]

    def draw(self, width: float) -> str:
        """Return the drawing; names stand left of the plot, above it where that leaves too little room."""
        names = cut_names(row.name for row in self.rows)
        widest = max(text_width(name, FONT) for name in names.values()) + 14
        above = widest > 0.4 * width
        left, step, top = (8.0 if above else widest), (38.0 if above else 26.0), 10.0
        bottom = top + step * len(self.rows)
        canvas = Canvas(width, bottom + 40)
        ends = [100 * end for row in self.rows for end in (row.value, *(row.interval or ()), 0.0)]
        pad = (max(ends) - min(ends)) * 0.06 or 1.0
        x = AxisScale(min(ends) - pad, max(ends) + pad, left, width - 12)
        for value in linear_ticks(x.lo, x.hi, 6 if width > 500 else 4):
            canvas.line(x(value), top, x(value), bottom, cls="grid")
            text = f"{value:+g}".replace("-", "\u2212") if value else "0"
            canvas.text(x(value), bottom + 16, text, cls="tick", text_anchor="middle")
        canvas.line(x(0), top, x(0), bottom, cls="axis")
        for number, row in enumerate(self.rows):
            y = top + step * number + (step - 11 if above else step / 2)
            place = {"x": 2.0, "y": y - 12} if above else {"x": left - 12, "y": y + 4}
            anchor = None if above else "end"
            canvas.text(place["x"], place["y"], names[row.name], cls="tick", text_anchor=anchor)
            if row.interval is not None:
                low, high = (x(100 * end) for end in row.interval)
                canvas.line(low, y, high, y, cls=f"whisker bold c{row.color}")
            canvas.circle(x(100 * row.value), y, 4.5, cls=f"dot full c{row.color}")
            canvas.circle(x(100 * row.value), y, 11, cls="hit", data_tip=row.tip)
        canvas.text(
            (left + width) / 2, bottom + 34, "percentage points", cls="axis-name", text_anchor="middle"
        )
        return canvas.render(self.label)
