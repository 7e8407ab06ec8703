"""A small SVG drawing kit: scales, ticks, axes, lines, whiskers, steps.

Colours are CSS classes and custom properties, so a drawing follows the page from light to dark to paper.
All text and attributes are escaped here; callers pass plain strings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from unicodedata import east_asian_width

CHAR_WIDTH = 0.56  # of the font size: average advance of a system sans-serif


@dataclass(frozen=True)
class AxisScale:
    """Map lo..hi to start..stop in pixels, linearly or by logarithm."""

    lo: float
    hi: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        lo, hi = self.lo, self.hi
        if self.log:
            lo, hi, value = math.log(lo), math.log(hi), math.log(max(value, 1e-12))
        share = (value - lo) / (hi - lo) if hi > lo else 0.5
        return self.start + share * (self.stop - self.start)


def linear_ticks(lo: float, hi: float, count: int = 5) -> list[float]:
    """Return about `count` round values (1, 2 or 5 times a power of ten) inside lo..hi.

    >>> linear_ticks(0, 1.23e6, 4)
    [0.0, 500000.0, 1000000.0]
    """
    if hi <= lo:
        return [lo]
    raw = (hi - lo) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(lo / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(hi / step + 1e-9) + 1)]


def log_ticks(lo: float, hi: float) -> list[float]:
    """Return 1-2-5 values inside lo..hi, only the powers of ten when there are many.

    >>> log_ticks(8, 300)
    [10.0, 20.0, 50.0, 100.0, 200.0]
    """
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [v for d in decades for m in steps if lo * 0.999 <= (v := float(m * 10.0**d)) <= hi * 1.001]


def thinned(values: Sequence[float], scale: AxisScale, gap: float) -> list[float]:
    """Drop values that would stand closer than `gap` pixels to the next kept one; the last always stays."""
    kept: list[float] = []
    for value in reversed(values):
        if not kept or abs(scale(kept[-1]) - scale(value)) >= gap:
            kept.append(value)
    return kept[::-1]


def spread(positions: Sequence[float], gap: float, lo: float, hi: float) -> list[float]:
    """Move positions apart until neighbours are `gap` pixels away, staying inside lo..hi and in order.

    >>> spread([10, 10, 40], 12, 0, 100)
    [4.0, 16.0, 40.0]
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    # Blocks of touching labels, each (sum of wished centres, members); merged while they overlap.
    blocks: list[list[float]] = []
    for index in order:
        blocks.append([positions[index], 1])
        while len(blocks) > 1:
            (wish_a, n_a), (wish_b, n_b) = blocks[-2:]
            if wish_b / n_b - wish_a / n_a >= gap * (n_a + n_b) / 2:
                break
            blocks[-2:] = [[wish_a + wish_b, n_a + n_b]]
    placed: list[float] = []
    for wish, n in blocks:
        first = wish / n - gap * (n - 1) / 2
        placed += [first + gap * k for k in range(int(n))]
    for k in range(len(placed)):
        placed[k] = max(placed[k], lo + gap * k)
    for k in range(len(placed) - 1, -1, -1):
        placed[k] = min(placed[k], hi - gap * (len(placed) - 1 - k))
    result = [0.0] * len(positions)
    for place, index in zip(placed, order):
        result[index] = float(place)
    return result


def text_width(text: str, size: float) -> float:
    """Return a text's approximate width in pixels; a Chinese character is as wide as high."""
    return size * sum(1.0 if east_asian_width(each) in "WF" else CHAR_WIDTH for each in text)


class Canvas:
    """An SVG under construction, `width` x `height` CSS pixels, origin at the top left."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []

    def open(self, **attributes: object) -> None:
        """Begin a group."""
        self._parts.append(f"<g{_attributes(attributes)}>")

    def close(self) -> None:
        """End the group begun last."""
        self._parts.append("</g>")

    def rect(self, x: float, y: float, width: float, height: float, **attributes: object) -> None:
        """Draw a rectangle."""
        box = {"x": x, "y": y, "width": max(width, 0), "height": max(height, 0)}
        self._parts.append(f"<rect{_attributes({**box, **attributes})}/>")

    def line(self, x1: float, y1: float, x2: float, y2: float, **attributes: object) -> None:
        """Draw a straight line."""
        self._parts.append(f"<line{_attributes({'x1': x1, 'y1': y1, 'x2': x2, 'y2': y2, **attributes})}/>")

    def path(
        self, points: Sequence[tuple[float, float]], *, closed: bool = False, **attributes: object
    ) -> None:
        """Draw a polyline, or a polygon when `closed`."""
        if points:
            data = "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points) + ("Z" if closed else "")
            self._parts.append(f"<path{_attributes({'d': data, **attributes})}/>")

    def circle(self, x: float, y: float, radius: float, **attributes: object) -> None:
        """Draw a circle."""
        self._parts.append(f"<circle{_attributes({'cx': x, 'cy': y, 'r': radius, **attributes})}/>")

    def text(self, x: float, y: float, text: str, **attributes: object) -> None:
        """Write one line of text, its baseline at y."""
        self._parts.append(f"<text{_attributes({'x': x, 'y': y, **attributes})}>{escape(text)}</text>")

    def render(self, label: str, *, role: str = "img", cls: str = "plot") -> str:
        """Return the SVG element; `label` is what a screen reader says."""
        head = {"class": cls, "viewBox": f"0 0 {_number(self.width)} {_number(self.height)}"}
        size = {"width": self.width, "height": self.height, "role": role, "aria-label": label}
        return f"<svg{_attributes({**head, **size})}>{''.join(self._parts)}</svg>"


def _attributes(attributes: dict[str, object]) -> str:
    """Write attributes; `cls` is class, underscores are hyphens, None is left out."""
    written = []
    for name, value in attributes.items():
        if value is None:
            continue
        name = {"cls": "class", "viewBox": "viewBox"}.get(name, name.replace("_", "-"))
        text = _number(value) if isinstance(value, (int, float)) else escape(str(value), quote=True)
        written.append(f' {name}="{text}"')
    return "".join(written)


def _number(value: float) -> str:
    """Write pixels with one decimal: half the bytes, no visible difference."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text
