r"""Headings of a text, and which one follows another: only where nothing that may be a heading stands between.

    # Scope, Scope underlined with === or ---, CHAPTER IV., 1.2 Scope, \section{Scope}

A heading of plain words has empty lines around it, so that items of a list and lines of a table of contents are
none. A pair is given where the numbers of both follow one another (1.2 after 1.1.3, 1.2 or 1.1, not after 1) and no
line of its own between them may be a heading of another kind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from longspan.data.texts.sentences import is_whole
from longspan.synth.sections import Span

MAX_TITLE = 80
_LINE = re.compile(r"[^\n]*\n?")
_FENCE = re.compile(r"[ ]{0,3}(?:```|~~~)")
_UNDERLINE = re.compile(r"([=\-~^*#+\"'.:])\1{2,}\s*$")
_MARKED = re.compile(r"(#{1,6})[ \t]+(\S.*?)[ \t]*#*$")
_LATEX = re.compile(r"\\((?:sub)*)section\*?\{([^{}]+)\}$")
_NUMBERED = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3}){0,5})\.?[ \t]+\S.*$")
_PART = re.compile(
    r"(CHAPTER|Chapter|PART|Part|BOOK|Book|SECTION|Section)[ \t]+([0-9]+|[IVXLCivxlc]+|[A-Za-z]+)\b.*$"
)
_ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}
_NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_WORDS = _NUMBERS.split()
_BY_ITSELF = re.compile(r"[A-Z0-9\"'\u201c*_`]|[^\x00-\x7f]")


_PARTS = {"CHAPTER", "PART", "BOOK", "SECTION"}


class Heading(NamedTuple):
    """A heading; `number` is () where it has none, `kind` how it is marked."""

    title: str
    span: Span
    kind: str
    number: tuple[int, ...]


def heading_pairs(text: str) -> list[tuple[str, Heading]]:
    """Return the titles that stand once, each with the heading right behind it."""
    found = list(_headings(text))
    if any(heading.kind in ("#", "underlined", "latex") for heading in found):
        # Then plain numbered lines are items of lists.
        found = [heading for heading in found if heading.kind != "numbered"]
    count = Counter(heading.title for heading in found if heading.kind != "?")
    return [
        (one.title, two)
        for one, two in pairwise(found)
        if "?" not in (one.kind, two.kind)
        and count[one.title] == 1
        and one.title != two.title
        and _follows(one, two)
    ]


def _follows(one: Heading, two: Heading) -> bool:
    """Return whether no number is left out between two headings."""
    if not two.number:
        return not one.number or one.kind != two.kind
    if not one.number or (one.kind != two.kind and {one.kind, two.kind} & _PARTS):
        # The first chapter of a part; later ones go on counting or begin again.
        return True
    if two.number == (*one.number, 1):
        return True
    level = len(two.number)
    return level <= len(one.number) and two.number == (*one.number[: level - 1], one.number[level - 1] + 1)


class _Line(NamedTuple):
    text: str
    start: int
    alone: bool
    """Whether empty lines, or an end of the text, stand before and behind it."""
    begins: bool
    """Whether an empty line stands before it."""


def _headings(text: str) -> Iterator[Heading]:
    """Yield headings in order, and as kind "?" lines that may be some of another kind."""
    lines = list(_lines(text))
    marks = [line for line in lines if _MARKED.match(line.text)]
    # Of code the lines with # are comments: most stand right on other lines.
    comments = sum(not line.begins for line in marks) > len(marks) / 2
    fenced = False
    for place, line in enumerate(lines):
        if _FENCE.match(line.text):
            fenced = not fenced
            continue
        if fenced or not line.text.strip():
            continue
        below = lines[place + 1].text if place + 1 < len(lines) else ""
        heading = _heading(line, below, comments=comments)
        if heading is not None:
            yield heading


def _heading(line: _Line, below: str, *, comments: bool) -> Heading | None:
    words = line.text.strip()
    span = Span(line.start + line.text.index(words), line.start + line.text.index(words) + len(words))
    indented = line.text[0].isspace()
    marked, latex = _MARKED.match(line.text), _LATEX.match(words)
    if latex is not None:
        return Heading(latex[2].strip(), span, "latex", ())
    if marked is not None:
        return None if comments else Heading(marked[2], span, "#", _number(marked[2]))
    if indented or len(words) > MAX_TITLE or not any(map(str.isalnum, words)):
        return None
    # A rule of a table is as long as its row too, but has no empty line above.
    if line.begins and _UNDERLINE.match(below) and len(below.rstrip()) >= min(len(words), 3):
        return Heading(words, span, "underlined", _number(words))
    if not line.alone:
        return None
    part = _PART.match(words)
    if part is not None and (value := _value(part[2])):
        return Heading(words, span, part[1].upper(), (value,))
    if _NUMBERED.match(words) and words[-1] not in ".!?":
        return Heading(words, span, "numbered", _number(words))
    if _BY_ITSELF.match(words) and not is_whole(words) and words[-1] not in ":,;":
        return Heading(words, span, "?", ())
    return None


def _lines(text: str) -> Iterator[_Line]:
    found = [(match.start(), match.group().rstrip()) for match in _LINE.finditer(text) if match.group()]
    for place, (start, line) in enumerate(found):
        begins = place == 0 or not found[place - 1][1]
        ends = place + 1 == len(found) or not found[place + 1][1]
        yield _Line(line, start, begins and ends, begins)


def _number(words: str) -> tuple[int, ...]:
    found = _NUMBERED.match(words)
    return tuple(map(int, found[1].split("."))) if found else ()


def _value(number: str) -> int:
    """Return the value of 4, IV or Four; 0 for none of these."""
    if number.isdigit():
        return int(number)
    if number.lower() in _WORDS:
        return _WORDS.index(number.lower()) + 1
    digits = [_ROMAN.get(letter, 0) for letter in number.upper()]
    if 0 in digits:
        return 0
    return sum(-a if a < b else a for a, b in pairwise([*digits, 0]))
