"""Questions without any model: from facts planted in a document, from its names and from its headings.

planted facts      "What is the magic number of glacier?", the facts of `data.facts`, as in the source `recall`
repeated names     a name that returns: the sentence in which it stands first, or last
section titles     the heading that follows another one

Every answer stands in the document as it is given, and its place is known exactly.
"""

from __future__ import annotations

import re
from collections import Counter
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
    """Make about `count` questions on a document, one in each of `count` equal parts of it.

    A third at most ask for titles and a third for names; facts are planted in the parts that these leave.
    """
    text = document["text"]
    draw = rng(seed, "synth", "offline", document["id"])
    found: dict[int, Item] = {}
    kinds: dict[str, int] = {}
    for kind, candidates in (("section titles", _titles(text)), ("repeated names", _names(text))):
        kinds[kind] = 0
        for place in draw.permutation(len(candidates)):
            item = candidates[place]
            part = min(count - 1, item.evidence[0].middle * count // max(1, len(text)))
            if part not in found and kinds[kind] < count // 3:
                found[part] = item
                kinds[kind] += 1
    start = float(rng(seed, "synth", "facts").random())
    depths = [
        float(depth) for part, depth in enumerate(stratified(count, number, start)) if part not in found
    ]
    planted = _plant(text, depths, rng(seed, "synth", "facts", document["id"]))
    kinds["planted facts"] = len(planted.items)
    moved = [_moved(item, planted.borders, planted.added) for item in found.values()]
    return Made(planted.text, [*planted.items, *moved], {kind: made for kind, made in kinds.items() if made})


class _Planted(NamedTuple):
    text: str
    items: list[Item]
    borders: list[int]
    """Where in the text before facts were put in."""
    added: list[int]
    """Characters put in at each."""


def _plant(text: str, depths: Sequence[float], draw: np.random.Generator) -> _Planted:
    """Put facts at these depths, in order, each on a line of its own; fewer where words for keys lack."""
    keys = collect_keys([text], split="train")
    facts: list[Fact] = draw_facts(draw, keys, min(len(depths), len(keys)))
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
    return _Planted("".join([*pieces, text[used:]]), items, borders[: len(items)], added)


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


def _titles(text: str) -> list[Item]:
    """Return questions for the heading behind another; headings that stand twice are left out."""
    found = [(_title(match), Span(*match.span())) for match in _HEADING.finditer(text)]
    names = [title for title, _ in found]
    return [
        Item(
            f'Which heading comes right after "{title}"?',
            following,
            (span,),
            subject=rf"(?m)^[^\n]{{0,20}}{re.escape(title)}[^\n]{{0,20}}$",
        )
        for (title, _), (following, span) in pairwise(found)
        if names.count(title) == 1 and title != following
    ]


def _title(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def _names(text: str) -> list[Item]:
    """Return questions for the sentences that name a repeated name first and last."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    mentions: Counter[str] = Counter()
    for match in _NAME.finditer(text):
        name = match.group()
        mentions[name] += 1
        first.setdefault(name, match.start())
        last[name] = match.start()
    items = []
    for name, count in mentions.items():
        if count < MIN_MENTIONS:
            continue
        # A longer name may hold this one: "Ada Stone" in "Ada Stone Bridge".
        for which, at, found in (("first", first, text.find(name)), ("last", last, text.rfind(name))):
            span = _sentence_at(text, found) if at[name] == found else None
            if span is not None and len(name) + 10 < span.end - span.start <= MAX_SENTENCE_CHARACTERS:
                question = f"Quote the sentence in which {name} is named for the {which} time."
                items.append(Item(question, span.of(text), (span,), subject=re.escape(name)))
    return items


def _sentence_at(text: str, at: int) -> Span | None:
    """Return the sentence around a character, without white space at its ends; sentences do not pass line ends."""
    line = text.rfind("\n", 0, at) + 1
    match = next((each for each in _SENTENCE.finditer(text, line) if each.end() > at), None)
    if match is None or match.start() > at:
        return None
    quoted = match.group().strip()
    start = match.start() + match.group().index(quoted)
    return Span(start, start + len(quoted))
