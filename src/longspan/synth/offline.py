"""Questions without any model: from facts planted in a document, from its names and from its headings.

planted facts      "What is the magic number of glacier?", the facts of `data.facts`, as in the source `recall`
repeated names     a name that returns: the whole sentence in which it stands first, or last
section titles     the heading that follows another one (`synth.headings`)

Every answer stands in the document as it is given, line ends included, and its place is known exactly. Where text is
wrapped, sentences and names go on over the ends of lines (`data.sentences`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from longspan.core.seeds import rng
from longspan.data.chat import ChatFormat
from longspan.data.texts.facts import Fact, collect_keys, draw_facts
from longspan.data.texts.sentences import is_whole, place_between, sentence_around
from longspan.data.tokenizer import Tokenizer
from longspan.synth.depth import stratified
from longspan.synth.headings import heading_pairs
from longspan.synth.items import Item
from longspan.synth.language import FUNCTION_WORDS
from longspan.synth.sections import Span

MIN_MENTIONS = 3
MAX_SENTENCE_CHARACTERS = 400
_BORDER_CHARACTERS = 400
_MOST_KEY_MENTIONS = 20
_LONG_FACT = Fact("understand", "48213")
"""Takes about as much room as any."""
_OTHER_QUESTIONS = 1.15
"""Names and titles, a part of what is asked, take more room than facts do."""

_GAP = r"(?: |[ \t]*\n[ \t]*)"
_NAME = re.compile(rf"\b[A-Z][a-z]+(?:{_GAP}(?:(?:of|the|de|van|von){_GAP})?[A-Z][a-z]+)+\b")


class Made(NamedTuple):
    """A document with facts planted in it, and questions on it."""

    text: str
    items: list[Item]
    kinds: dict[str, int]
    """Questions by kind."""


def make_questions(
    number: int, document: Mapping[str, Any], count: int, *, seed: int, in_sentences: bool = False
) -> Made:
    """Make about `count` questions on a document, one in each of `count` equal parts of it.

    A third at most ask for titles and a third for names; facts are planted in the parts that these leave.
    """
    text = document["text"]
    draw = rng(seed, "synth", "offline", document["id"])
    found: dict[int, tuple[str, Item]] = {}
    for kind, candidates in (("section titles", _titles(text)), ("repeated names", _names(text))):
        taken = 0
        for place in draw.permutation(len(candidates)):
            item = candidates[place]
            part = min(count - 1, item.evidence[0].middle * count // max(1, len(text)))
            if part not in found and taken < count // 3:
                found[part] = kind, item
                taken += 1
    start = float(rng(seed, "synth", "facts").random())
    depths = [
        float(depth) for part, depth in enumerate(stratified(count, number, start)) if part not in found
    ]
    planted = _plant(text, depths, rng(seed, "synth", "facts", document["id"]), in_sentences=in_sentences)
    # Text without borders may have been parted in the middle of what would be quoted.
    whole = [
        (kind, item)
        for kind, item in found.values()
        if not any(span.start < border < span.end for span in item.evidence for border in planted.borders)
    ]
    moved = [_moved(item, planted.borders, planted.added) for _, item in whole]
    kinds = Counter(kind for kind, _ in whole) + Counter({"planted facts": len(planted.items)})
    return Made(planted.text, [*planted.items, *moved], dict(kinds))


def turn_tokens(tokenizer: Tokenizer, chat: ChatFormat, *, in_sentences: bool) -> float:
    """Return about how many tokens a question takes in a conversation, with its answer and what is planted for it."""
    turn = [
        {"role": "user", "content": _question(_LONG_FACT)},
        {"role": "assistant", "content": _LONG_FACT.sentence if in_sentences else _LONG_FACT.value},
    ]
    once, twice = (len(chat.encode(turn * count).ids) for count in (1, 2))
    return _OTHER_QUESTIONS * (twice - once + len(tokenizer.encode(f"{_LONG_FACT.sentence}\n")))


def _question(fact: Fact) -> str:
    return f"What is the magic number of {fact.key}?"


class _Planted(NamedTuple):
    text: str
    items: list[Item]
    borders: list[int]
    """Where in the text before facts were put in."""
    added: list[int]
    """Characters put in at each."""


def _plant(text: str, depths: Sequence[float], draw: np.random.Generator, *, in_sentences: bool) -> _Planted:
    """Put facts at these depths, in order, each on a line of its own; fewer where words for keys lack."""
    keys = _keys(text)
    facts: list[Fact] = draw_facts(draw, keys, min(len(depths), len(keys)))
    borders = [_border(text, round(depth * len(text))) for depth in depths]
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
        items.append(Item(_question(fact), fact.sentence if in_sentences else fact.value, (span,)))
        pieces += [before, line]
        length += len(before) + len(line)
        added.append(len(line))
        used = border
    return _Planted("".join([*pieces, text[used:]]), items, borders[: len(items)], added)


def _keys(text: str) -> list[str]:
    """Return words that may be keys: not "their" and "might", and none that is everywhere in the text."""
    words = Counter(re.findall(r"[a-z]+", text))
    return [
        key
        for key in collect_keys([text], split="train")
        if key not in FUNCTION_WORDS and words[key] <= _MOST_KEY_MENTIONS
    ]


def _border(text: str, at: int) -> int:
    return place_between(
        text, at, low=max(0, at - _BORDER_CHARACTERS), high=min(len(text), at + _BORDER_CHARACTERS)
    )


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
    """Return questions for the heading right behind another."""
    return [
        Item(
            f'Which heading comes right after "{title}"?',
            following.title,
            (following.span,),
            subject=rf"(?m)^[^\n]{{0,20}}{re.escape(title)}[^\n]{{0,20}}$",
        )
        for title, following in heading_pairs(text)
    ]


def _names(text: str) -> list[Item]:
    """Return questions for the sentences that name a repeated name first and last."""
    mentions: dict[str, list[int]] = {}
    for match in _NAME.finditer(text):
        name, start = _without_lead(match)
        if " " in name:
            mentions.setdefault(name, []).append(start)
    items = []
    for name, places in mentions.items():
        if len(places) < MIN_MENTIONS:
            continue
        # A longer name may hold this one: "Ada Stone" in "Ada Stone Bridge". It may be wrapped at the end of a line.
        pattern = r"\s+".join(map(re.escape, name.split()))
        found = [match.start() for match in re.finditer(pattern, text)]
        for which, at, place in (("first", found[0], places[0]), ("last", found[-1], places[-1])):
            span = Span(*sentence_around(text, at))
            fits = len(name) + 10 < span.end - span.start <= MAX_SENTENCE_CHARACTERS
            if at == place and fits and is_whole(span.of(text)):
                question = f"Quote the sentence in which {name} is named for the {which} time."
                items.append(Item(question, span.of(text), (span,), subject=pattern))
    return items


def _without_lead(match: re.Match[str]) -> tuple[str, int]:
    """Return a name in one line and its place, without a "When" or "The" that begins its sentence."""
    name, start = match.group(), match.start()
    lead = name.split()[0]
    if lead.lower() in FUNCTION_WORDS:
        rest = name[len(lead) :]
        start += len(lead) + len(rest) - len(rest.lstrip())
        name = rest
    return " ".join(name.split()), start
