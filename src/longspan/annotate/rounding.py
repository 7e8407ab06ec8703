"""Fewer words and fewer bits for what a teacher predicts, with the masses still summing to 1."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.infer.teacher import TopK

__all__ = ["cut_to_mass", "round_masses", "words_for_mass"]


def words_for_mass(logprobs: NDArray[np.floating], mass: float) -> NDArray[np.int64]:
    """Return the fewest words of each token [N] that together hold `mass`; all k where k hold less.

    masses 0.6 0.3 0.05 (0.05 beyond) with mass 0.9 -> 2
    """
    reached = np.cumsum(np.exp(logprobs, dtype=np.float64), axis=1)
    # A hair's breadth below counts: sums of fp32 logarithms are not exact.
    return np.minimum((reached < mass - 1e-6).sum(1) + 1, logprobs.shape[1])


def cut_to_mass(found: TopK, mass: float) -> tuple[TopK, NDArray[np.int64]]:
    """Drop the words beyond `mass` into the tail; return the rest, -inf for what was dropped, and words kept [N]."""
    counts = words_for_mass(found.logprobs, mass)
    dropped = np.arange(found.logprobs.shape[1]) >= counts[:, None]
    lost = np.where(dropped, np.exp(found.logprobs, dtype=np.float64), 0.0).sum(1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(found.tail, dtype=np.float64) + lost).astype(np.float32)
    logprobs = np.where(dropped, np.float32(-np.inf), found.logprobs)
    return TopK(found.ids, logprobs, np.minimum(tail, np.float32(0.0))), counts


def round_masses(found: TopK, dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return logprobs [N, k] and tail [N] in float16 or float32.

    In float16 a logarithm between -4 and -8 is off by up to 0.2 %: words that are equally likely would all be off
    alike. Each is rounded up or down, whichever keeps the sum of the masses so far nearer to what it was, so the
    masses sum to 1 within 4e-4, whatever k is. Words within a step of float16 of one another may change places.
    """
    columns = np.concatenate([found.logprobs, found.tail[:, None]], axis=1)
    if dtype == "float32":
        return found.logprobs.astype(np.float32), found.tail.astype(np.float32)
    near = columns.astype(np.float16)
    away = np.where(near > columns, np.float16(-np.inf), np.float16(0.0))
    other = np.where(near == columns, near, np.nextafter(near, away))
    mass, near_mass, other_mass = (np.exp(each, dtype=np.float64) for each in (columns, near, other))
    error = np.zeros(len(columns))
    for column in range(columns.shape[1]):
        stay = error + near_mass[:, column] - mass[:, column]
        move = error + other_mass[:, column] - mass[:, column]
        moved = np.abs(move) < np.abs(stay)
        near[moved, column] = other[moved, column]
        error = np.where(moved, move, stay)
    return near[:, :-1], near[:, -1]
