"""Prompts of published needle tests to the letter: how their own code cuts the haystack and where it puts the needle.

Both count in tokens of parts that are tokenised apart, join the files with nothing between them, and start them again
where they are too short. Given a tokenizer of bytes (Llama 3, Qwen, GPT), prompts are those of the originals character
by character, save the BOS tokens that `fu-2024` writes in front of the context and of the needle: a prompt has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from longspan.core.errors import DataError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.haystack import Window
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.needle_config import Original
from longspan.eval.planting import Planted

FU_2024_SPARE = 200
"""Tokens that `fu-2024` leaves for prompt, question and answer."""


class Parts(NamedTuple):
    """What stands around the haystack; each is counted in tokens on its own, without BOS."""

    before: str
    needle: str
    after: str


class OriginalHaystack:
    """The documents as one text, long enough for every length.

    Raises:
        DataError: the documents hold no text.
    """

    def __init__(self, documents: Sequence[HeldOutDocument], tokenizer: Tokenizer, num_tokens: int) -> None:
        text = "".join(document.text for document in documents)
        ends = tokenizer.encode_with_offsets(text).ends
        if len(ends) == 0:
            raise DataError("the haystack holds no text", found=f"{len(documents)} documents")
        while len(ends) < num_tokens:
            text *= 2
            ends = tokenizer.encode_with_offsets(text).ends
        self._window, self._tokenizer = Window(text, ends), tokenizer

    def planted(self, original: Original, parts: Parts, length: int, depth: float) -> Planted:
        """Return the haystack of a stated length with the needle in it. Raises DataError: there is no room."""
        place = {"fu-2024": self._at_full_stop, "longllm": self._at_token}[original]
        tokens, before = place(parts, length, depth)
        head, start = self._window.head(tokens), len(self._window.head(before))
        text = head[:start] + parts.needle + head[start:]
        return Planted(text, [(start, start + len(parts.needle))], [depth], tolerance=1.0)

    def _at_full_stop(self, parts: Parts, length: int, depth: float) -> tuple[int, int]:
        """Return tokens of the haystack, and those before the needle: up to the last full stop before the depth."""
        # Their needle begins with a BOS, and their haystack with two: its text is cut, decoded and encoded again.
        bos = int(self._tokenizer.adds_bos)
        tokens = self._room(length, length - FU_2024_SPARE - self._count(parts.needle) - 3 * bos)
        if depth == 1.0:
            return tokens, tokens
        before = max(0, int((tokens + 2 * bos) * depth) - 2 * bos)
        while before > 0 and self._token(before - 1).strip() != ".":
            before -= 1
        return tokens, before

    def _at_token(self, parts: Parts, length: int, depth: float) -> tuple[int, int]:
        """Return tokens of the haystack, and those before the needle: the depth, and once more what stands before."""
        before, needle, after = (self._count(part) for part in parts)
        tokens = self._room(length, length - before - needle - after)
        # Their place is one of the whole prompt, and they look for it in the haystack.
        return tokens, min(tokens, before + round((tokens - 1) * round(100 * depth, 6) / 100))

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def _token(self, index: int) -> str:
        start = int(self._window.ends[index - 1]) if index else 0
        return self._window.text[start : int(self._window.ends[index])]

    @staticmethod
    def _room(length: int, tokens: int) -> int:
        if tokens < 1:
            raise DataError(f"no room for a haystack in {length} tokens", found=f"{tokens} tokens")
        return tokens
