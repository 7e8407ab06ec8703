"""Text windows of a given number of tokens, cut out of held-out documents.

Each document is tokenised when it is first drawn, with the character offset of every token. A window of n
tokens is then a slice of text: nothing is decoded, and no haystack is tokenised again for every cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from longspan.core.errors import DataError
from longspan.data.texts.sentences import place_between
from longspan.data.tokenizer import Tokenizer
from longspan.eval.held_out import HeldOutDocument

SEPARATOR = "\n\n"
_START_CHARS = 500


class Window(NamedTuple):
    """Running text and the character position at which each of its tokens ends, `[tokens]`."""

    text: str
    ends: np.ndarray

    def head(self, num_tokens: int) -> str:
        """Return the text of the first `num_tokens` tokens (at most all of them)."""
        if num_tokens <= 0:
            return ""
        return self.text[: int(self.ends[min(num_tokens, len(self.ends)) - 1])]

    def char_at(self, fraction: float, num_tokens: int) -> int:
        """Return the character position at which `fraction` of the first `num_tokens` tokens have ended."""
        tokens = round(fraction * min(num_tokens, len(self.ends)))
        return int(self.ends[tokens - 1]) if tokens > 0 else 0


class Haystack:
    """Draws windows of running text from documents.

    A window never holds the same text twice, unless `repeat` allows it where the documents are too short.
    """

    def __init__(
        self, documents: Sequence[HeldOutDocument], tokenizer: Tokenizer, *, repeat: bool = False
    ) -> None:
        self._texts = [document.text for document in documents if document.text]
        self._tokenizer = tokenizer
        self._repeat = repeat

    def window(self, generator: np.random.Generator, num_tokens: int) -> Window:
        """Draw a window of at least `num_tokens` tokens.

        It begins at a sentence of a random document, goes on with other documents in random order, and ends
        where the tokens suffice. Cost: the documents that it touches are tokenised if they never were.

        Raises:
            DataError: all documents together have fewer tokens.
        """
        order = [int(document) for document in generator.permutation(len(self._texts))]
        return self._join(self._spans(order, generator), num_tokens)

    def first(self, num_tokens: int) -> Window:
        """Return the documents in their order, up to where the tokens suffice. Raises DataError as `window`."""
        spans = [(document, 0, len(text)) for document, text in enumerate(self._texts)]
        return self._join(spans, num_tokens)

    def _join(
        self, spans: Iterator[tuple[int, int, int]] | list[tuple[int, int, int]], num_tokens: int
    ) -> Window:
        pieces: list[str] = []
        ends: list[np.ndarray] = []
        counted = chars = 0
        for document, start, stop in itertools.cycle(spans) if self._repeat and self._texts else spans:
            token_ends = self._token_ends(document)
            first, last = np.searchsorted(token_ends, [start, stop], side="right")
            token_ends = token_ends[first : min(last, first + num_tokens - counted)]
            if len(token_ends) == 0:
                continue
            pieces.append(self._texts[document][start : int(token_ends[-1])] + SEPARATOR)
            ends.append(token_ends - start + chars)
            counted += len(token_ends)
            chars += len(pieces[-1])
            if counted >= num_tokens:
                return Window("".join(pieces), np.concatenate(ends))
        raise DataError(
            "the haystack is too short",
            found=f"{counted:,} tokens in {len(self._texts):,} held-out documents",
            allowed=f"at least {num_tokens:,} tokens for the longest context",
            fix="give more held-out documents, leave out the longest lengths, or let them be repeated "
            "(--repeat)",
        )

    def _spans(self, order: list[int], generator: np.random.Generator) -> Iterator[tuple[int, int, int]]:
        """Yield (document, start, stop) in characters; the head skipped in the first document comes last."""
        if not order:
            return
        first = order[0]
        token_ends = self._token_ends(first)
        token = int(generator.integers(len(token_ends)))
        end = int(token_ends[token])
        start = place_between(self._texts[first], end, low=max(0, end - _START_CHARS), high=end)
        yield first, start, len(self._texts[first])
        for document in order[1:]:
            yield document, 0, len(self._texts[document])
        yield first, 0, start

    def _token_ends(self, document: int) -> np.ndarray:
        return _token_ends(self._tokenizer, self._texts[document])


# Several models are evaluated on the same documents, one run after the other.
@lru_cache(maxsize=1024)
def _token_ends(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the character position at which each token of a text ends, int32 `[tokens]`."""
    return tokenizer.encode_with_offsets(text).ends.astype(np.int32)
