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


def cut_middle(text: str, tokenizer: Tokenizer, max_tokens: int, *, before: int = 0) -> Cut:
    """Keep the first and the last `max_tokens // 2` tokens of a text that has more than `max_tokens`.

    "a b c d e f" with 4 tokens allowed is "a b" + " e f". Cost: a text that may be too long is tokenised once
    with offsets; one of no more bytes than tokens allowed is not.

    Args:
        before: tokens in front of the text, such as a BOS, that are counted as its first.

    Raises:
        ArgumentError: fewer than 2 tokens are allowed.
    """
    if max_tokens < 2:
        raise ArgumentError("a text cannot be cut to fewer than 2 tokens", found=max_tokens)
    if len(text.encode("utf-8", "surrogatepass")) + before <= max_tokens:
        return Cut(text, 0)
    found = tokenizer.encode_with_offsets(text)
    tokens = len(found.ids)
    if tokens + before <= max_tokens:
        return Cut(text, 0)
    half = max_tokens // 2
    head = int(found.ends[half - before - 1]) if half > before else 0
    tail = int(found.starts[max(0, tokens - half)])
    return Cut(text[:head] + text[max(head, tail) :], tokens + before - 2 * half)


def cut_end(text: str, tokenizer: Tokenizer, remove: int) -> Cut:
    """Take the last `remove` tokens off a text, all of them where it has no more."""
    if remove <= 0:
        return Cut(text, 0)
    found = tokenizer.encode_with_offsets(text)
    kept = len(found.ids) - remove
    if kept <= 0:
        return Cut("", len(found.ids))
    return Cut(text[: int(found.ends[kept - 1])], remove)
