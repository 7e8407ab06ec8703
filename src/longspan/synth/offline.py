"""Questions without any model: from facts planted in a document, from its names and from its headings.

planted facts      "What is the magic number of glacier?", the facts of `data.facts`, as in the source `recall`
repeated names     a name that returns: the whole sentence in which it stands first, or last
section titles     the heading that follows another one (`synth.headings`)
chains             all names that a number is handed on to (`synth.chains`), where a set asks for them

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
from longspan.synth.chains import WORDINGS, NameChain, draw_chains
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
_CHAIN_EVERY = 4
"""Of so many questions one is on a chain, where a set asks for them."""
_LONG_CHAIN = NameChain(("QXWE", "ZBNK", "RTUV", "OPAS"), "48213", WORDINGS[0])
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
    number: int,
    document: Mapping[str, Any],
    count: int,
    *,
    seed: int,
    in_sentences: bool = False,
    chains: bool = False,
) -> Made:
    """Make about `count` questions on a document, one in each of `count` equal parts of it.

    A third at most ask for titles and a third for names; facts are planted in the parts that these leave. With
    `chains` some of these parts, a quarter of all at most, give way to questions on what stands all over it.
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
    asked: list[_ToPlant] = []
    if chains:
        draw = rng(seed, "synth", "chains", document["id"])
        drawn = draw_chains(draw, text, min(count // _CHAIN_EVERY, len(depths)))
        given_way = set(draw.choice(len(depths), size=len(drawn), replace=False).tolist())
        depths = [depth for place, depth in enumerate(depths) if place not in given_way]
        for chain in drawn:
            where = np.sort(draw.random(len(chain.names))).tolist()
            answer = chain.answer(in_sentences=in_sentences)
            asked.append(_ToPlant(chain.question, answer, chain.statements, where))
    keys = _keys(text)
    draw = rng(seed, "synth", "facts", document["id"])
    facts = draw_facts(draw, keys, min(len(depths), len(keys)))
    asked += [
        _ToPlant(_question(fact), fact.sentence if in_sentences else fact.value, [fact.sentence], [depth])
        for fact, depth in zip(facts, depths)
    ]
    planted = _plant(text, asked)
    # Text without borders may have been parted in the middle of what would be quoted.
    whole = [
        (kind, item)
        for kind, item in found.values()
        if not any(span.start < border < span.end for span in item.evidence for border in planted.borders)
    ]
    moved = [_moved(item, planted.borders, planted.added) for _, item in whole]
    kinds = Counter(kind for kind, _ in whole) + Counter(
        {"planted facts": len(facts), "chains": len(asked) - len(facts)}
    )
    return Made(planted.text, [*planted.items, *moved], dict(kinds))


def turn_tokens(
    tokenizer: Tokenizer, chat: ChatFormat, *, in_sentences: bool = False, chains: bool = False
) -> float:
    """Return about how many tokens a question takes in a conversation, with its answer and what is planted for it."""
    answer = _LONG_FACT.sentence if in_sentences else _LONG_FACT.value
    fact = _turn_tokens(tokenizer, chat, _question(_LONG_FACT), answer, [_LONG_FACT.sentence])
    if not chains:
        return _OTHER_QUESTIONS * fact
    answer = _LONG_CHAIN.answer(in_sentences=in_sentences)
    chain = _turn_tokens(tokenizer, chat, _LONG_CHAIN.question, answer, _LONG_CHAIN.statements)
    return _OTHER_QUESTIONS * (fact + (chain - fact) / _CHAIN_EVERY)


def _turn_tokens(
    tokenizer: Tokenizer, chat: ChatFormat, question: str, answer: str, statements: Sequence[str]
) -> int:
    turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    once, twice = (len(chat.encode(turn * count).ids) for count in (1, 2))
    return twice - once + sum(len(tokenizer.encode(f"{statement}\n")) for statement in statements)


def _question(fact: Fact) -> str:
    return f"What is the magic number of {fact.key}?"


class _ToPlant(NamedTuple):
    question: str
    answer: str
    statements: list[str]
    """Sentences that a text is to say for it."""
    depths: list[float]
    """Where, in order."""


class _Planted(NamedTuple):
    text: str
    items: list[Item]
    borders: list[int]
    """Where in the text before anything was put in."""
    added: list[int]
    """Characters put in at each."""


def _plant(text: str, asked: Sequence[_ToPlant]) -> _Planted:
    """Put what questions rest on at its depths, each statement on a line of its own."""
    lines = [
        (depth, number, statement)
        for number, each in enumerate(asked)
        for depth, statement in zip(each.depths, each.statements)
    ]
    lines.sort(key=lambda line: line[:2])
    pieces: list[str] = []
    spans: list[list[Span]] = [[] for _ in asked]
    borders: list[int] = []
    added: list[int] = []
    length = used = 0
    for depth, number, statement in lines:
        border = max(used, _border(text, round(depth * len(text))))
        before = text[used:border]
        ends_line = (before or (pieces[-1] if pieces else "\n")).endswith("\n")
        lead = "" if ends_line else "\n"
        line = f"{lead}{statement}\n"
        start = length + len(before) + len(lead)
        spans[number].append(Span(start, start + len(statement)))
        pieces += [before, line]
        length += len(before) + len(line)
        borders.append(border)
        added.append(len(line))
        used = border
    items = [Item(each.question, each.answer, tuple(found)) for each, found in zip(asked, spans)]
    return _Planted("".join([*pieces, text[used:]]), items, borders, added)


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
