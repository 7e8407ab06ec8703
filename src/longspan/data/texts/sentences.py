r"""Where the sentences of a text begin and end, in any script: for planting between them and for quoting them.

A border stands where a sentence begins; these are Unicode's sentence rules (UAX 29), tailored to running text:

    "He came. She left."     after ". "          "3.14", "main.py", "e.g. this", "Dr. Stone": none
    "\u4ed6\u6765\u4e86\u3002\u5979"      after "\u3002"     full stops of most scripts need no space behind them
    "one line\nof a wrapped paragraph"    none: the next word had no room on the line
    "a heading\n\nText", "- item\n- item"    at the line

Newlines are hard or soft by the block of lines that they stand in: soft where the line is about as long as the
longest and the next line goes on, with no mark or deeper indentation of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import regex

_MARKS = r"[\p{SB=ATerm}\p{SB=STerm}]"
_END = regex.compile(rf"(?P<marks>{_MARKS}+)(?P<closed>[\p{{Pe}}\p{{Pf}}\"'*_`]*)(?P<space>\s*\n|\s*)")
_LINE = regex.compile(r"[^\n]*\n?")
_OWN_STOP = regex.compile(r"[\p{SB=STerm}\p{SB=ATerm}--.!?]", regex.V1)
_GOES_ON = regex.compile(r"\p{SB=SContinue}|[;)\]}]")
_THEN_LOWER = regex.compile(r"[^\p{L}\p{N}\n.!?]*\p{Lower}")
_LAST_WORD = regex.compile(r"(?:^|[^\p{L}\p{N}.])((?:\p{L}\.)*\p{L}+|\p{N}+)$")
_NUMBERED = regex.compile(r"(?:^|\n)[ \t]*\p{N}{1,3}$")
_CHAPTER = regex.compile(r"(?i:chapter|part|book|act|scene|section) [IVXLC\p{N}]+$")
_LINE_MARK = regex.compile(r"(?:[-*+\u2022>|#=~:]|\.\. |(?:\p{N}{1,3}|\p{L})[.)]\s)")
_RULE = regex.compile(r"[\W_]+$")
_BARE_END = regex.compile(rf"{_MARKS}[\p{{Pe}}\p{{Pf}}\"'*_`]*$")
_BEGINS_LOWER = regex.compile(r"[^\p{L}\p{N}]*\p{Lower}")
_COMBINING = regex.compile(r"[\p{M}\u200d]+")
_TITLES = "mr mrs ms dr prof st rev hon gen col capt lt sgt sen gov jr sr messrs mme mlle"
_SHORT = "vs cf viz e.g i.e ca bzw z.b d.h"
_ABBREVIATIONS = frozenset((*_TITLES.split(), *_SHORT.split()))
_BEFORE_NUMBERS = frozenset(("no", "nos", "nr", "fig", "figs", "p", "pp", "vol", "ch", "sec", "eq", "art"))
MIN_WRAP, MAX_WRAP = 40, 140
"""Characters of the longest line of a paragraph that may be wrapped; shorter and longer lines end where they end."""
_FILLED = 0.85
_CONTEXT = 1000
"""Characters read around a place: what is longer than that is no sentence that anybody quotes."""


def sentence_borders(text: str) -> list[int]:
    """Return where sentences and lines of their own begin, in order; the start and the end of the text too."""
    found = {0, len(text)}
    found.update(match.end() for match in _END.finditer(text) if _ends_sentence(text, match))
    found.update(_hard_lines(text))
    return sorted(found)


def has_own_stops(text: str) -> bool:
    """Return whether a text has full stops of a script that has others than `.`, `!` and `?`."""
    return _OWN_STOP.search(text) is not None


def parted(text: str, *, most: int) -> list[str]:
    """Return the sentences of a text, those of more than `most` characters in pieces; together they are the text."""
    parts: list[str] = []
    for start, end in pairwise(sentence_borders(text)):
        while end - start > most:
            cut = place_between(text, start + most * 3 // 4, low=start + most // 2, high=start + most)
            parts.append(text[start:cut])
            start = cut
        parts.append(text[start:end])
    return [part for part in parts if part]


def sentence_around(text: str, at: int) -> tuple[int, int]:
    """Return the sentence that holds character `at`, without white space at its ends."""
    low, high = max(0, at - _CONTEXT), min(len(text), at + _CONTEXT)
    borders = [low + border for border in sentence_borders(text[low:high])]
    after = next((place for place, border in enumerate(borders) if border > at), len(borders) - 1)
    start, end = borders[max(0, after - 1)], borders[after]
    found = text[start:end]
    return start + len(found) - len(found.lstrip()), end - (len(found) - len(found.rstrip()))


def is_whole(sentence: str) -> bool:
    """Return whether a text has the beginning and the end of a sentence: no heading, no item of a list, no piece."""
    begins = _BEGINS_LOWER.match(sentence) is None and _LINE_MARK.match(sentence) is None
    return begins and _BARE_END.search(sentence) is not None


def place_between(text: str, at: int, *, low: int, high: int) -> int:
    """Return the best place to put a line in, between characters `low` and `high`, nearest to `at`.

    A sentence border, else the end of a line, else white space, else `at` itself.
    """
    reach = 256
    while True:
        first, last = max(low, at - reach), min(high, at + reach)
        found = [border for border in _borders_near(text, first, last) if first <= border <= last]
        if found:
            return _nearest(found, at)
        if (first, last) == (low, high):
            break
        reach *= 4
    for space in (r"\n+", r"\s+"):
        places = [match.end() for match in regex.finditer(space, text, pos=low, endpos=high)]
        if places:
            return _nearest(places, at)
    joined = _COMBINING.match(text, at)
    return joined.end() if joined else at


def _nearest(places: list[int], at: int) -> int:
    return min(places, key=lambda place: (abs(place - at), place))


def _borders_near(text: str, low: int, high: int) -> Iterator[int]:
    """Yield borders around a stretch; the ends of what was looked at are none."""
    start, end = max(0, low - _CONTEXT), min(len(text), high + _CONTEXT)
    for border in sentence_borders(text[start:end]):
        if (border > 0 or start == 0) and (border < end - start or end == len(text)):
            yield start + border


def _ends_sentence(text: str, match: regex.Match) -> bool:
    """Return whether a sentence ends at these marks."""
    marks, space, after = match["marks"], match["space"], match.end()
    rest = text[after : after + 80].lstrip()
    if not rest or space.count("\n") > 1:
        return True
    if _OWN_STOP.search(marks):
        return _GOES_ON.match(rest) is None
    if not space:
        # "page?id", "3.5", "x.y" are no ends; between letters of scripts without spaces a full stop is one.
        return regex.match(r"\p{SB=OLetter}", rest) is not None
    if _GOES_ON.match(rest) or _THEN_LOWER.match(rest):
        return False
    return marks != "." or not _abbreviates(text[max(0, match.start() - 24) : match.start()], rest)


def _abbreviates(before: str, rest: str) -> bool:
    """Return whether the full stop after `before` belongs to its last word: an initial, a title, a number in a list."""
    found = _LAST_WORD.search(before)
    if found is None:
        return False
    word = found[1]
    if len(word) == 1 and word.isupper():
        return True
    if word.lower() in _ABBREVIATIONS or (word.lower() in _BEFORE_NUMBERS and rest[0].isdigit()):
        return True
    return _NUMBERED.search(before) is not None or _CHAPTER.search(before) is not None


def _hard_lines(text: str) -> Iterator[int]:
    """Yield where a line begins that does not go on with the one before it."""
    block: list[tuple[int, str]] = []
    for match in _LINE.finditer(text):
        line = match.group()
        if line.strip():
            block.append((match.start(), line.rstrip()))
            continue
        yield from _block_borders(block)
        block = []
    yield from _block_borders(block)


def _block_borders(block: list[tuple[int, str]]) -> Iterator[int]:
    """Yield the hard lines of a run of lines without an empty one between them, its first line too."""
    width = max((len(line) for _, line in block), default=0)
    for place, (start, line) in enumerate(block):
        if place == 0 or not _wrapped(block[place - 1][1], line, width):
            yield start


def _wrapped(line: str, following: str, width: int) -> bool:
    """Return whether a line ends only because the next word had no room in `width` characters."""
    if not MIN_WRAP <= width <= MAX_WRAP:
        return False
    own, text = line.lstrip(), following.lstrip()
    if _LINE_MARK.match(text) or _RULE.match(text) or _RULE.match(own) or own.endswith(("{", "}")):
        return False
    deeper = len(following) - len(text) > len(line) - len(own)
    if deeper and not _LINE_MARK.match(own):
        return False
    word = text.split(None, 1)[0]
    # Text without spaces goes on with its next character.
    room = 1 if regex.match(r"\p{SB=OLetter}", word) else 1 + len(word)
    return len(line) + room > _FILLED * width
