"""Chains: a number is handed on from name to name all over a text, and all names that have it are asked for.

Several chains stand in one text, in the same words, so that an answer has to follow the one that is asked for. It is
the task of variable tracking (RULER, arXiv:2404.06654), in other words and with answers in sentences.
"""

from __future__ import annotations

import string
from itertools import pairwise
from typing import NamedTuple

import numpy as np

NAMES = (2, 5)
"""Fewest and most names of a chain."""
_LETTERS = (3, 6)
_TRIES = 20
"""After so many a name or number gets longer: a table may hold all of five digits."""


class _Wording(NamedTuple):
    statement: str
    question: str
    answer: str


WORDINGS = (
    _Wording(
        "The code {name} stands for {value}.", "Which codes stand for {value}?", "{names} stand for {value}."
    ),
    _Wording("Let {name} be {value}.", "Which names are {value}?", "{names} are {value}."),
    _Wording("{name} is set to {value}.", "Which names are set to {value}?", "{names} are set to {value}."),
)


class NameChain(NamedTuple):
    """Names of which the first has a number, and each other one what the name before it has."""

    names: tuple[str, ...]
    value: str
    wording: _Wording

    @property
    def statements(self) -> list[str]:
        """What a text says of it, a sentence for each name, in their order."""
        handed_on = pairwise((self.value, *self.names))
        return [self.wording.statement.format(name=name, value=value) for value, name in handed_on]

    @property
    def question(self) -> str:
        """It asks for all names that have the number."""
        return self.wording.question.format(value=self.value)

    def answer(self, *, in_sentences: bool) -> str:
        """Return all names, in their order."""
        names = f"{', '.join(self.names[:-1])} and {self.names[-1]}"
        return self.wording.answer.format(names=names, value=self.value) if in_sentences else names


def draw_chains(draw: np.random.Generator, text: str, number: int) -> list[NameChain]:
    """Draw `number` chains for a text, all in one wording, with names and numbers that it does not hold."""
    wording = WORDINGS[draw.integers(len(WORDINGS))]
    used: set[str] = set()

    def new(letters: str, least: int, most: int) -> str:
        attempt = 0
        while True:
            size = int(draw.integers(least, most + 1)) + attempt // _TRIES
            found = "".join(letters[at] for at in draw.integers(len(letters), size=size))
            if found not in text and found not in used and found[0] != "0":
                used.add(found)
                return found
            attempt += 1

    return [
        NameChain(
            tuple(
                new(string.ascii_uppercase, *_LETTERS) for _ in range(draw.integers(NAMES[0], NAMES[1] + 1))
            ),
            new(string.digits, 5, 5),
            wording,
        )
        for _ in range(number)
    ]
