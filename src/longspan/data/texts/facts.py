"""Planted facts: sentences that say something nobody could guess, put into real text and asked back.

A fact is `The magic number of <key> is <value>.`; its question is the same sentence up to the value. Training
text states facts and restates them (recall.py); evaluation plants a fact and asks once (eval/needle.py).

Keys are words of the corpus, divided into train, validation and test by a hash, so an evaluated key was
never a key in training (the word itself may have occurred in training text).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from longspan.core.errors import ArgumentError
from longspan.data.texts.python_corpus import split_of

_WORD = re.compile(r"\b[a-z]{4,10}\b")
_BORDER = re.compile(r"\n+|(?<=[.!?]) +")


class Fact(NamedTuple):
    """One planted fact."""

    key: str
    value: str

    @property
    def question(self) -> str:
        """The sentence up to the value, without a trailing space."""
        return f"The magic number of {self.key} is"

    @property
    def sentence(self) -> str:
        """The whole sentence."""
        return f"{self.question} {self.value}."

    @property
    def value_span(self) -> tuple[int, int]:
        """Character span of the value inside `sentence`."""
        start = len(self.question) + 1
        return start, start + len(self.value)


def collect_keys(texts: Iterable[str], *, split: str, limit: int = 20_000) -> list[str]:
    """Return the words of `texts` that serve as keys in `split`, in alphabetical order."""
    words: set[str] = set()
    for text in texts:
        words.update(_WORD.findall(text))
        if len(words) > 4 * limit:
            break
    return [word for word in sorted(words) if split_of(f"key {word}") == split][:limit]


def draw_facts(rng: np.random.Generator, keys: Sequence[str], count: int, *, digits: int = 5) -> list[Fact]:
    """Draw `count` facts with different keys and values; no value begins with 0.

    Raises:
        ArgumentError: there are fewer keys than facts.
    """
    if count > len(keys):
        raise ArgumentError(
            "there are too few keys for so many facts", found=f"{len(keys)} keys, {count} facts"
        )
    chosen = rng.choice(len(keys), size=count, replace=False)
    values: list[str] = []
    while len(values) < count:
        value = str(rng.integers(10 ** (digits - 1), 10**digits))
        if value not in values:
            values.append(value)
    return [Fact(keys[index], value) for index, value in zip(chosen, values)]


def nearest_border(text: str, at: int, *, within: int | None = None) -> int:
    """Return the line or sentence border nearest to character `at`; `at` itself if none is `within` reach.

    The start and the end of the text are borders.
    """
    reach = within if within is not None else 256
    while True:
        low, high = max(0, at - reach), min(len(text), at + reach)
        borders = [match.end() + low for match in _BORDER.finditer(text[low:high])]
        borders += [0] if low == 0 else []
        borders += [len(text)] if high == len(text) else []
        if borders:
            return min(borders, key=lambda border: (abs(border - at), border))
        if within is not None:
            return at
        reach *= 4
