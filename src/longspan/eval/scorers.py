"""Scorers: pure functions of the expected and the given text, named and versioned.

The name and version stand in every records file, so a changed rule never mixes with older scores, and
records can be scored again from their texts without running a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from longspan.core.errors import ArgumentError


class Scorer(NamedTuple):
    """A scoring rule; `score(expected, output)` lies in 0..1 and a perfect output scores 1."""

    name: str
    version: int
    score: Callable[[str, str], float]


def exact_match(expected: str, output: str) -> float:
    """Return 1.0 when the whole value is right, else 0.0; surrounding white space does not count."""
    return 1.0 if output.strip() == expected.strip() else 0.0


SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in (Scorer("exact_match", 1, exact_match),)}
"""Every scoring rule by name."""


def scorer_named(name: str) -> Scorer:
    """Return a scorer. Raises ArgumentError listing the names that exist."""
    if name not in SCORERS:
        raise ArgumentError("there is no such scorer", found=repr(name), allowed=sorted(SCORERS))
    return SCORERS[name]
