"""Prompts cut to a number of tokens, at the level of text: what is left is text that stood in the prompt.

    middle   head and tail stay, because instructions and questions stand there (LongBench, InfiniteBench)
    end      the context loses its end, all around it stays (HELMET)

Both count tokens by the text's own tokenisation; a BOS and a chat template come on top.
"""

from __future__ import annotations

from typing import NamedTuple

from longspan.core.errors import ArgumentError
from longspan.data.tokenizer import Tokenizer


class Cut(NamedTuple):
    """A text, shortened or not."""

    text: str
    removed: int
    """Tokens that were taken out; 0: the text is whole."""


def cut_middle(text: str, tokenizer: Tokenizer, max_tokens: int) -> Cut:
    """Keep the first and the last `max_tokens // 2` tokens of a text that has more than `max_tokens`.

    "a b c d e f" with 4 tokens allowed is "a b" + " e f". Cost: a text that may be too long is tokenised once
    with offsets; one of no more bytes than tokens allowed is not.

    Raises:
        ArgumentError: fewer than 2 tokens are allowed.
    """
    if max_tokens < 2:
        raise ArgumentError("a text cannot be cut to fewer than 2 tokens", found=max_tokens)
    if len(text.encode("utf-8", "surrogatepass")) <= max_tokens:
        return Cut(text, 0)
    found = tokenizer.encode_with_offsets(text)
    tokens = len(found.ids)
    if tokens <= max_tokens:
        return Cut(text, 0)
    half = max_tokens // 2
    head, tail = int(found.ends[half - 1]), int(found.starts[tokens - half])
    return Cut(text[:head] + text[max(head, tail) :], tokens - 2 * half)


def cut_end(text: str, tokenizer: Tokenizer, remove: int) -> Cut:
    """Take the last `remove` tokens off a text, all of them where it has no more."""
    if remove <= 0:
        return Cut(text, 0)
    found = tokenizer.encode_with_offsets(text)
    kept = len(found.ids) - remove
    if kept <= 0:
        return Cut("", len(found.ids))
    return Cut(text[: int(found.ends[kept - 1])], remove)
