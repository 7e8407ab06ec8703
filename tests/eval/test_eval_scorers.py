from __future__ import annotations

import pytest

from longspan.core.errors import ArgumentError
from longspan.eval.scorers import SCORERS, scorer_named


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_perfect_output_scores_one(name: str) -> None:
    """A scorer whose maximum is below 1 makes perfect models look flawed."""
    assert SCORERS[name].score("48213", "48213") == 1.0


@pytest.mark.parametrize(
    ("output", "score"),
    [(" 48213", 1.0), ("48213\n", 1.0), ("4821", 0.0), ("482130", 0.0), ("48 213", 0.0), ("", 0.0)],
)
def test_exact_match_wants_the_whole_value(output: str, score: float) -> None:
    """A part of the value, or more than the value, is not the value."""
    assert SCORERS["exact_match"].score("48213", output) == score


def test_unknown_scorer_lists_the_known_ones() -> None:
    """A typing mistake must not select another rule."""
    with pytest.raises(ArgumentError, match="exact_match"):
        scorer_named("exact")
