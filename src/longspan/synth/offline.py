"""Questions without any model: from facts planted in a document, from its names and from its headings.

planted facts      "What is the magic number of glacier?", the facts of `data.facts`, as in the source `recall`
repeated names     a name that returns: the sentence in which it stands first
section titles     the heading that follows another one

Every answer stands in the document as it is given, and its place is known exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from longspan.core.seeds import rng
from longspan.data.facts import Fact, collect_keys, draw_facts, nearest_border
from longspan.synth.depth import stratified
from longspan.synth.items import Item
from longspan.synth.sections import Span

MIN_MENTIONS = 3
MAX_SENTENCE_CHARACTERS = 400

_NAME = re.compile(r"\b[A-Z][a-z]+(?: (?:of |the |de |van |von )?[A-Z][a-z]+)+\b")
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+(?=\s|\Z)|(?=\n)|\Z)")
_HEADING = re.compile(
    r"^(?:#{1,6} +(?P<marked>[^\n#]{3,80}?) *#*"
    r"|(?P<chapter>(?:CHAPTER|Chapter|PART|Part|BOOK|Book) [^\n]{1,60})"
    r"|(?P<numbered>[0-9]{1,2}(?:\.[0-9]{1,2}){0,2}\.? {1,3}[A-Z][^\n.]{2,60})"
    r"|\\(?:sub)*section\*?\{(?P<latex>[^\n{}]{3,80})\})[ \t]*$",
    re.MULTILINE,
)


class Made(NamedTuple):
    """A document with facts planted in it, and questions on it."""

    text: str
    items: list[Item]
    kinds: dict[str, int]
    """Questions by kind."""


def make_questions(number: int, document: Mapping[str, Any], count: int, *, seed: int) -> Made:
    """Make about `count` questions on a document: a third each, facts for what the others do not give."""
    text = document["text"]
    draw = rng(seed, "synth", "offline", document["id"])
    titles = _titles(text, draw, count // 3)
    names = _names(text, draw, count // 3)
    planted = _plant(text, number, document["id"], count - len(titles) - len(names), seed=seed)
    moved = [_moved(item, planted.borders, planted.added) for item in (*titles, *names)]
    items = [*planted.items, *moved]
    kinds = {"planted facts": len(planted.items), "section titles": len(titles), "repeated names": len(names)}
    return Made(planted.text, items, {kind: number for kind, number in kinds.items() if number})


class _Planted(NamedTuple):
    text: str
    items: list[Item]
    borders: list[int]
    """Where in the text before facts were put in."""
    added: list[int]
    """Characters put in at each."""


def _plant(text: str, number: int, name: str, count: int, *, seed: int) -> _Planted:
    """Put facts at even depths, each on a line of its own."""
    keys = collect_keys([text], split="train")
    draw = rng(seed, "synth", "facts", name)
    facts: list[Fact] = draw_facts(draw, keys, min(count, len(keys)))
    start = float(rng(seed, "synth", "facts").random())
    depths = stratified(len(facts), number, start)
    borders = [nearest_border(text, round(depth * len(text))) for depth in depths]
    pieces: list[str] = []
    items: list[Item] = []
    added: list[int] = []
    length = used = 0
    for fact, border in zip(facts, borders):
        before = text[used:border]
        ends_line = (before or (pieces[-1] if pieces else "\n")).endswith("\n")
        lead = "" if ends_line else "\n"
        line = f"{lead}{fact.sentence}\n"
        start_of_fact = length + len(before) + len(lead)
        span = Span(start_of_fact, start_of_fact + len(fact.sentence))
        items.append(Item(f"What is the magic number of {fact.key}?", fact.value, (span,)))
        pieces += [before, line]
        length += len(before) + len(line)
        added.append(len(line))
        used = border
    return _Planted("".join([*pieces, text[used:]]), items, borders, added)


def _moved(item: Item, borders: Sequence[int], added: Sequence[int]) -> Item:
    """Return an item of the text before planting with its places after it."""

    def place(at: int, *, is_end: bool) -> int:
        # What is planted where a span begins stands before it, where it ends behind it.
        passed = [
            more for border, more in zip(borders, added) if border < at or (border == at and not is_end)
        ]
        return at + sum(passed)

    spans = [Span(place(span.start, is_end=False), place(span.end, is_end=True)) for span in item.evidence]
    return item._replace(evidence=tuple(spans))


def _titles(text: str, draw: np.random.Generator, count: int) -> list[Item]:
    """Return questions for the heading behind another; headings that stand twice are left out."""
    found = [(_title(match), Span(*match.span())) for match in _HEADING.finditer(text)]
    names = [title for title, _ in found]
    pairs = [
        Item(f'Which heading comes right after "{title}"?', following, (span,))
        for (title, _), (following, span) in pairwise(found)
        if names.count(title) == 1 and title != following
    ]
    return _drawn(pairs, draw, count)


def _title(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def _names(text: str, draw: np.random.Generator, count: int) -> list[Item]:
    """Return questions for the sentence that names a repeated name first."""
    first: dict[str, int] = {}
    mentions: dict[str, int] = {}
    for match in _NAME.finditer(text):
        first.setdefault(match.group(), match.start())
        mentions[match.group()] = mentions.get(match.group(), 0) + 1
    items = []
    for name, at in first.items():
        if mentions[name] < MIN_MENTIONS or text.find(name) != at:
            continue
        line = text.rfind("\n", 0, at) + 1
        sentence = next((each for each in _SENTENCE.finditer(text, line) if each.end() > at), None)
        if sentence is None or sentence.end() < at + len(name):
            continue
        quoted = sentence.group().strip()
        if not len(name) + 10 < len(quoted) <= MAX_SENTENCE_CHARACTERS:
            continue
        start = sentence.start() + sentence.group().index(quoted)
        question = f"Quote the sentence in which {name} is named for the first time."
        items.append(Item(question, quoted, (Span(start, start + len(quoted)),)))
    return _drawn(items, draw, count)


def _drawn(items: list[Item], draw: np.random.Generator, count: int) -> list[Item]:
    if len(items) <= count:
        return items
    return [items[place] for place in sorted(draw.choice(len(items), count, replace=False))]
