"""Prompts of a wanted number of tokens, made of a number of like units (sentences, words, documents), or cut to it.

A prompt is tokenised as a whole, mostly once: how many units fit is known from the prompts before it and from
counts of single units. It is never grown unit by unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from longspan.core.errors import DataError
from longspan.eval.prompts import PromptForm
from longspan.eval.truncation import cut_middle

T = TypeVar("T")
_MAX_TRIES = 64
_GUESSES = 4


class Fitted(NamedTuple, Generic[T]):
    """A prompt that fits."""

    made: T
    units: int
    tokens: int


def fit_units(
    make: Callable[[int], tuple[T, int]],
    *,
    budget: int,
    slack: int,
    start: float,
    tokens_per_unit: float,
    least: int = 1,
) -> Fitted[T]:
    """Return what `make` gives for about the largest number of units that fits.

    Args:
        make: units -> (the prompt, its tokens), about linear in the units.
        budget: tokens at most.
        slack: tokens that may be left unused; where units are larger than that, one unit less than too many
            is taken whatever it leaves.
        start: a guess of the units.
        least: units without which there is no prompt.

    Raises:
        DataError: not even the least fits.
    """
    ceiling: int | None = None  # the most units that are not known to be too many
    best: Fitted[T] | None = None
    units, slope = max(least, int(start)), tokens_per_unit
    before: tuple[int, int] | None = None
    for attempt in range(_MAX_TRIES):
        units = max(least, units if ceiling is None else min(units, ceiling))
        made, tokens = make(units)
        if tokens > budget:
            if units <= least:
                raise DataError(
                    f"a prompt has {tokens} tokens at the least, and {max(0, budget)} are left for it"
                )
            ceiling = units - 1
        elif best is None or units > best.units:
            best = Fitted(made, units, tokens)
        if best is not None and (budget - best.tokens <= slack or best.units == ceiling):
            break
        if before is not None and (tokens - before[1]) * (units - before[0]) > 0:
            slope = (tokens - before[1]) / (units - before[0])
        before = units, tokens
        units += math.floor((budget - slack / 3 - tokens) / slope)
        floor = least if best is None else best.units + 1
        if ceiling is not None and attempt >= _GUESSES:
            units = (floor + ceiling + 1) // 2  # sizes that jump: halve what is left
        units = max(floor, units)
    if best is None:
        raise DataError(f"the text could not be cut to {budget} tokens", found=f"{tokens} tokens")
    return best


def cut_prompt(prompt: str, form: PromptForm, room: int) -> tuple[str, int]:
    """Return a prompt of at most `room` tokens, BOS and chat template counted, and how many its middle lost.

    Raises:
        DataError: there is no room for a prompt.
    """
    around = form.count("a") - len(form.tokenizer.encode("a"))
    if room - around < 2:
        raise DataError(f"an answer leaves {max(0, room - around)} tokens for the prompt")
    removed, allowed = 0, room - around
    for _ in range(3):  # where the halves meet, tokenised anew, there can be a few tokens more
        cut = cut_middle(prompt, form.tokenizer, allowed)
        removed = cut.removed
        excess = form.count(cut.text) - room if removed else 0
        if excess <= 0:
            return cut.text, removed
        allowed -= excess + 1
    raise DataError(f"a prompt could not be cut to {room} tokens")
