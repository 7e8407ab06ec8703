"""How NeedleBench lays needles into a haystack: texts in a drawn order, cut to tokens, and needles put between them.

Places are counted in tokens, as the released code does, of texts and needles that are tokenised apart. A text is a list
of what its tokens say, so nothing is decoded: characters of several tokens are never parted, where the release leaves
marks of broken ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from longspan.core.errors import DataError
from longspan.data.tokenizer import Tokenizer

_SPREAD = 0.1
"""Of the haystack, between the needles of a chain."""


class Texts:
    """The texts of a haystack file, each tokenised when it is first wanted."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        self._texts, self._tokenizer = texts, tokenizer
        self._tokens: dict[int, list[str]] = {}

    def orders(self, samples: int) -> list[list[int]]:
        """Return the order of the texts for each sample: the order before it, shuffled by its number."""
        order, orders = list(range(len(self._texts))), []
        for sample in range(samples):
            random.Random(sample).shuffle(order)
            orders.append(list(order))
        return orders

    def require(self, tokens: int) -> None:
        """Raise DataError where all texts together have fewer tokens."""
        found = 0
        for text in range(len(self._texts)):
            if found >= tokens:
                return
            found += len(self._of(text))
        if found < tokens:
            raise DataError(
                f"the haystack is shorter than the {tokens:,} tokens that are wanted of it",
                found=f"{found:,} tokens",
                fix="leave out the lengths that are longer: the released code asks shorter prompts in their place",
            )

    def first(self, order: Sequence[int], tokens: int) -> list[str]:
        """Return so many tokens of the texts in an order, nothing between them."""
        found: list[str] = []
        for text in order:
            found += self._of(text)
            if len(found) >= tokens:
                break
        return found[:tokens]

    def _of(self, text: int) -> list[str]:
        if text not in self._tokens:
            self._tokens[text] = token_texts(self._tokenizer, self._texts[text])
        return self._tokens[text]


def token_texts(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return what each token says; of several that make one character the first that ends it has it."""
    ends = np.maximum.accumulate(tokenizer.encode_with_offsets(text).ends).tolist()
    if ends:
        ends[-1] = len(text)
    return [text[start:end] for start, end in pairwise([0, *ends])]


def with_several(haystack: list[str], needles: Sequence[list[str]], depths: Sequence[float]) -> list[str]:
    """Return a haystack with each needle at a depth of its own, what stands before it not counted."""
    found, behind = list(haystack), 0
    for needle, depth in zip(needles, depths, strict=True):
        place = min(int(len(haystack) * depth) + behind, len(found))
        found[place:place] = needle
        behind += len(needle)
    return found


def with_chain(haystack: list[str], needles: Sequence[list[str]], depth: float) -> list[str]:
    """Return a haystack with the first needle at a depth, and each other a tenth of the haystack behind the last.

    As released, needles before one count twice; what would stand behind the end stands at it.
    """
    before = [0, *accumulate(map(len, needles))]
    places: list[int] = []
    for number in range(len(needles)):
        if number == 0:
            place = int(len(haystack) * depth)
        else:
            place = int(places[-1] + len(needles[number - 1]) + len(haystack) * _SPREAD)
        places.append(min(place, len(haystack) + before[number]))
    found = list(haystack)
    for needle, place, earlier in zip(needles, places, before):
        found[place + earlier : place + earlier] = needle
    return found
