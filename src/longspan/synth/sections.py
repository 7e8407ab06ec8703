"""Sections of a document: cut at paragraphs, sentences or words, each within a number of tokens, together the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.data.texts.sentences import sentence_borders
from longspan.data.tokenizer import Tokenizer

_PARAGRAPH, _SPACE = re.compile(r"\n\s*\n"), re.compile(r"\n|\s+")
_BACK = 0.2
"""A cut may lie this share of a section before the place where the section would be full."""
_FIRST_GUESS = 4.0
_RULER_CHARACTERS = 1024


class Span(NamedTuple):
    """Characters of a text, half open."""

    start: int
    end: int

    @property
    def middle(self) -> int:
        """The character in its middle."""
        return (self.start + self.end) // 2

    def of(self, text: str) -> str:
        """Return the characters."""
        return text[self.start : self.end]


def cut_sections(text: str, capacity: int, tokenizer: Tokenizer) -> list[Span]:
    """Return spans that together are exactly the text, each of at most `capacity` tokens when encoded by itself.

    A single character may have more tokens than that. Each section is encoded a few times.
    """
    spans: list[Span] = []
    start, ratio = 0, _FIRST_GUESS
    while start < len(text):
        end = _longest(text, start, capacity, tokenizer, ratio)
        if end < len(text):
            end = _border(text, start, end)
        spans.append(Span(start, end))
        ratio = max(0.1, (end - start) / capacity)
        start = end
    return spans


def _longest(text: str, start: int, capacity: int, tokenizer: Tokenizer, ratio: float) -> int:
    """Return the end of about the longest piece from `start` that has no more than `capacity` tokens."""
    fits, low = start + 1, start + 1
    high = len(text)
    guess = start + max(1, round(1.05 * ratio * capacity))
    while low <= high:
        end = min(max(guess, low), high)
        tokens = len(tokenizer.encode(text[start:end]))
        if tokens <= capacity:
            fits, low = end, end + 1
            if tokens >= 0.98 * capacity or end == len(text):
                break
        else:
            high = end - 1
        # Where the piece would be full if all of it were as dense as what was measured.
        guess = start + round((end - start) * (0.99 * capacity / max(1, tokens)))
        if not low <= guess <= high:
            guess = (low + high) // 2
    return fits


def _border(text: str, start: int, end: int) -> int:
    """Return the last good place for a cut in the last fifth before `end`; `end` where there is none.

    Best behind a paragraph, else a sentence or a line that stands by itself, else any line or word.
    """
    earliest = max(start + 1, end - round(_BACK * (end - start)))
    for border in (_PARAGRAPH, None, _SPACE):
        places = (
            [match.end() for match in border.finditer(text, earliest, end)]
            if border is not None
            else [earliest + place for place in sentence_borders(text[earliest:end])[1:]]
        )
        places = [place for place in places if place < end]
        if places:
            return places[-1]
    return end


def spread_groups(count: int, size: int, groups: int) -> list[tuple[int, ...]]:
    """Return up to `groups` different groups of `size` section numbers, each spread from start to end.

    10 sections, size 4, 2 groups: (0, 3, 5, 8) and (1, 4, 7, 9): one of each quarter, another one each time.
    """
    size = min(size, count)
    edges = [round(number * count / size) for number in range(size + 1)] if size else []
    found: list[tuple[int, ...]] = []
    for group in range(groups):
        members = tuple(
            low + int((group + (place / size) / groups) * (high - low) / groups) % (high - low)
            for place, (low, high) in enumerate(pairwise(edges))
        )
        if members and members not in found:
            found.append(members)
    return found


class TokenRuler:
    """Tells how many tokens lie before a character of a text, and back, from counts every 1024 characters.

    Pieces are encoded by themselves, so a count is too large by at most a token a piece.
    """

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self.text, self._tokenizer = text, tokenizer
        marks = [0]
        while marks[-1] < len(text):
            end = min(len(text), marks[-1] + _RULER_CHARACTERS)
            if end < len(text):
                newline = text.rfind("\n", marks[-1] + 1, end)
                end = newline + 1 if newline > marks[-1] else end
            marks.append(end)
        self._marks = np.array(marks)
        counts = [len(tokenizer.encode(text[low:high])) for low, high in pairwise(marks)]
        self._tokens = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @property
    def tokens(self) -> int:
        """Tokens of the whole text."""
        return int(self._tokens[-1])

    def before(self, characters: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the tokens before each of these characters."""
        return np.interp(np.asarray(characters, dtype=float), self._marks, self._tokens)

    def last_before(self, tokens: float) -> int:
        """Return the last good place for a cut (line, sentence, word) with at most so many tokens before it."""
        place = int(np.searchsorted(self._tokens, tokens, side="right")) - 1
        mark, left = int(self._marks[place]), int(tokens - self._tokens[place])
        if left < 1 or mark == len(self.text):
            return mark
        end = _longest(self.text, mark, left, self._tokenizer, _FIRST_GUESS)
        return _border(self.text, mark, end) if end < len(self.text) else end
