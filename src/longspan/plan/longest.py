"""The longest context that something fits with, by halving."""

from __future__ import annotations

from collections.abc import Callable

from longspan.core.errors import ArgumentError

__all__ = ["MISSING", "longest"]

CONTEXT_UNIT = 4096
"""Tokens to which it is found."""
MOST = 1 << 30
"""Tokens above which nobody asks: memory of models with windows and states alone does not grow."""
MISSING = "nothing fits: take more GPUs, GPUs with more memory, a shorter context, LoRA or QLoRA"


def longest(fits: Callable[[int], bool], *, found: str) -> int:
    """Return the most tokens that fit, to CONTEXT_UNIT and a 64th, at most MOST.

    Args:
        fits: whether so many tokens do.
        found: the machines, for the message.

    Raises:
        ArgumentError: not even CONTEXT_UNIT tokens fit.
    """
    if not fits(CONTEXT_UNIT):
        raise ArgumentError(f"{MISSING} ({CONTEXT_UNIT:,} tokens do not fit)", found=found)
    low, high = 1, 2
    while high * CONTEXT_UNIT <= MOST and fits(high * CONTEXT_UNIT):
        low, high = high, 2 * high
    if high * CONTEXT_UNIT > MOST:
        return MOST
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * CONTEXT_UNIT) else (low, middle)
    return low * CONTEXT_UNIT
