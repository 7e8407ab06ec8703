"""Planting sentences into a haystack at text level, between its sentences, where a depth asks for them.

Nothing here knows token ids: places are found by the ends of the haystack's tokens in characters, sentences go
into the text, and what came out is measured by tokenising it. A border of sentences (`data.sentences`) is looked for
within `reach` tokens of the place; where there is none the text is parted at a line, a space or a token, so a
depth is what it says in text of any kind. What stands farther off all the same, because others are in its way, is
not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from longspan.core.errors import DataError
from longspan.data.texts.sentences import place_between
from longspan.eval.haystack import Window

DEPTH_TOLERANCE = 0.02
"""Share of the haystack by which a depth may be off, beside what looking for a border takes."""
_BORDER_TOKENS = 64


def reach(haystack_tokens: int) -> int:
    """Return how many tokens off its place a border may be: 64, less in short haystacks, 2 % of long ones."""
    return round(max(DEPTH_TOLERANCE * haystack_tokens, min(_BORDER_TOKENS, haystack_tokens / 8)))


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
    depths: list[float]
    """Where each was to stand."""
    tolerance: float
    """How far off that it may be."""


def plant(
    window: Window, haystack_tokens: int, insertions: Sequence[Insertion], *, exact: int | None = None
) -> Planted:
    """Plant sentences into the first tokens of a window.

    Insertions take room: with 40 tokens of others before it in a haystack of 100 tokens, depth 0.5 of all 140
    is depth 0.3 of the haystack. Each keeps its side of the others; where there is no room for all to stand
    where they should, `exact` does and others are moved.
    """
    haystack = window.head(haystack_tokens)
    order = sorted(range(len(insertions)), key=lambda index: insertions[index].depth)
    places = _places(order, insertions, haystack_tokens, exact)
    span = reach(haystack_tokens) / haystack_tokens
    pieces: list[str] = []
    spans = [(0, 0)] * len(insertions)
    chars = previous = 0
    last = "\n"  # what stands before the text is a line of its own

    def put(piece: str) -> None:
        nonlocal chars, last
        if piece:
            pieces.append(piece)
            chars, last = chars + len(piece), piece[-1]

    for index in order:
        low, target, high = (
            window.char_at(min(1.0, max(0.0, places[index] + off)), haystack_tokens)
            for off in (-span, 0.0, span)
        )
        border = max(previous, place_between(haystack, target, low=low, high=high))
        put(haystack[previous:border])
        put("" if last == "\n" else "\n")
        spans[index] = (chars, chars + len(insertions[index].text))
        put(insertions[index].text)
        put("" if haystack.startswith("\n", border) else "\n")
        previous = border
    put(haystack[previous:])
    return Planted("".join(pieces), spans, [each.depth for each in insertions], DEPTH_TOLERANCE + span)


def check_depth(achieved: float, planted: Planted, index: int) -> None:
    """Raise DataError when an insertion stands farther off its depth than a sentence border may be."""
    wanted = planted.depths[index]
    if abs(achieved - wanted) > planted.tolerance:
        raise DataError(
            f"the needle stands at depth {achieved:.3f} instead of {wanted:.3f}",
            allowed=f"{planted.tolerance:.3f} off",
        )


def _places(
    order: Sequence[int], insertions: Sequence[Insertion], haystack_tokens: int, exact: int | None
) -> list[float]:
    """Return where in the bare haystack each insertion goes, 0..1."""
    sizes = [insertion.tokens for insertion in insertions]
    places = [0.0] * len(insertions)
    before = 0
    for index in order:
        around = haystack_tokens + sum(sizes) - sizes[index]
        place = (insertions[index].depth * around - before) / haystack_tokens
        places[index] = min(1.0, max(0.0, place))
        before += sizes[index]
    pivot = order.index(exact) if exact is not None else 0
    for number in range(pivot + 1, len(order)):
        places[order[number]] = max(places[order[number]], places[order[number - 1]])
    for number in reversed(range(pivot)):
        places[order[number]] = min(places[order[number]], places[order[number + 1]])
    return places
