"""Planting sentences into a haystack at text level, at line or sentence borders, where a depth asks for them.

Nothing here knows token ids: places are found by the ends of the haystack's tokens in characters, sentences go
into the text, and what came out is measured by tokenising it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from longspan.core.errors import DataError
from longspan.data.facts import nearest_border
from longspan.eval.haystack import Window

DEPTH_TOLERANCE = 0.02


class Insertion(NamedTuple):
    """A sentence to be planted on a line of its own."""

    text: str
    depth: float
    """Share of all that surrounds it, other insertions counted, that stands before it."""
    tokens: int
    """Tokens of its line."""


class Planted(NamedTuple):
    """A haystack with insertions."""

    text: str
    spans: list[tuple[int, int]]
    """Characters of each insertion in `text`, in the order in which they were given."""
    expected: list[float]
    """Depth of each, were there a border at every token."""
    tolerances: list[float]
    """How far off the nearest border can be from that."""


def plant(
    window: Window, haystack_tokens: int, insertions: Sequence[Insertion], *, exact: int | None = None
) -> Planted:
    """Plant sentences into the first tokens of a window.

    Insertions take room: with 40 tokens of others before it in a haystack of 100 tokens, depth 0.5 of all 140
    is depth 0.3 of the haystack. Each keeps its side of the others; where there is no room for all to stand
    where they should, `exact` does and others give way.
    """
    haystack = window.head(haystack_tokens)
    order = sorted(range(len(insertions)), key=lambda index: insertions[index].depth)
    places, expected = _places(order, insertions, haystack_tokens, exact)
    pieces: list[str] = []
    spans = [(0, 0)] * len(insertions)
    tolerances = [0.0] * len(insertions)
    chars = previous = 0
    last = "\n"  # what stands before the text is a line of its own

    def put(piece: str) -> None:
        nonlocal chars, last
        if piece:
            pieces.append(piece)
            chars, last = chars + len(piece), piece[-1]

    for index in order:
        target = window.char_at(places[index], haystack_tokens)
        border = max(previous, nearest_border(haystack, target))
        put(haystack[previous:border])
        put("" if last == "\n" else "\n")
        spans[index] = (chars, chars + len(insertions[index].text))
        put(insertions[index].text)
        put("" if haystack.startswith("\n", border) else "\n")
        previous = border
        low, high = np.searchsorted(window.ends[:haystack_tokens], sorted([target, border]))
        tolerances[index] = DEPTH_TOLERANCE + (int(high - low) + 1) / haystack_tokens
    put(haystack[previous:])
    return Planted("".join(pieces), spans, expected, tolerances)


def check_depth(achieved: float, planted: Planted, index: int) -> None:
    """Raise DataError when an insertion is farther off than the nearest line or sentence border explains."""
    expected, tolerance = planted.expected[index], planted.tolerances[index]
    if abs(achieved - expected) > tolerance:
        raise DataError(
            f"the needle stands at depth {achieved:.3f} instead of {expected:.3f}",
            allowed=f"{tolerance:.3f} off, by the nearest line or sentence border",
        )


def _places(
    order: Sequence[int], insertions: Sequence[Insertion], haystack_tokens: int, exact: int | None
) -> tuple[list[float], list[float]]:
    """Return where in the bare haystack each insertion goes (0..1), and its depth among all if it does."""
    sizes = [insertion.tokens for insertion in insertions]
    earlier = [0] * len(insertions)
    places = [0.0] * len(insertions)
    before = 0
    for index in order:
        earlier[index] = before
        around = haystack_tokens + sum(sizes) - sizes[index]
        place = (insertions[index].depth * around - before) / haystack_tokens
        places[index] = min(1.0, max(0.0, place))
        before += sizes[index]
    pivot = order.index(exact) if exact is not None else 0
    for number in range(pivot + 1, len(order)):
        places[order[number]] = max(places[order[number]], places[order[number - 1]])
    for number in reversed(range(pivot)):
        places[order[number]] = min(places[order[number]], places[order[number + 1]])
    expected = [
        (places[index] * haystack_tokens + earlier[index]) / (haystack_tokens + sum(sizes) - sizes[index])
        for index in range(len(insertions))
    ]
    return places, expected
