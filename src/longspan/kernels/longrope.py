"""LongRoPE: an evolutionary search for how much each pair of channels is slowed (arXiv:2402.13753, section 3.2).

Pair i rotates by position * theta**(-2i/d) / factor_i. The factors rise with i (slow pairs are interpolated more), lie
between 1 and 1.25 times the ratio of the contexts, in steps of 0.01. The search begins with position interpolation,
NTK-aware and YaRN factors and changed copies of them; each generation keeps the best, mutates some and crosses others.

The paper also searches for a number of first positions that stay as they are; transformers' `longrope` cannot say
that, so it is left out, as in the released models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from longspan.core.errors import ArgumentError
from longspan.core.seeds import rng

__all__ = [
    "PAPER",
    "LongRopeResult",
    "LongRopeSearch",
    "attention_scaling",
    "search_factors",
    "starting_factors",
]

HEADROOM = 1.25
STEP = 0.01
BETA_FAST, BETA_SLOW = 32.0, 1.0
"""YaRN's: pairs with more turns than the first in the own context stay, with fewer than the second are interpolated."""


class LongRopeSearch(NamedTuple):
    """Sizes of the search; the defaults, `PAPER`, are the paper's."""

    population: int = 64
    mutations: int = 16
    crossovers: int = 16
    generations: int = 40
    probability: float = 0.3
    """Of each factor, to be mutated."""


PAPER = LongRopeSearch()


class LongRopeResult(NamedTuple):
    """What was found."""

    factors: list[float]
    """One for each pair of channels."""
    score: float
    history: list[float]
    """Best score after each generation, the starting population first."""
    started_at: dict[str, float]
    """Scores of the known methods: "linear", "ntk", "yarn"."""
    evaluations: int

    def rope(self, *, theta: float, own_context: int, context: int) -> dict[str, Any]:
        """Return them as `rope_parameters`; up to the own context nothing changes."""
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "factor": context / own_context,
            "original_max_position_embeddings": own_context,
            "short_factor": [1.0] * len(self.factors),
            "long_factor": self.factors,
        }


def attention_scaling(ratio: float, own_context: int) -> float:
    """Return the factor on cos and sin for a context `ratio` times the own one, as transformers has it."""
    return math.sqrt(1 + math.log(ratio) / math.log(own_context)) if ratio > 1 else 1.0


def starting_factors(*, theta: float, head_dim: int, own_context: int, context: int) -> dict[str, np.ndarray]:
    """Return the factors of position interpolation, NTK-aware scaling and YaRN, each float64 [head_dim / 2]."""
    ratio = context / own_context
    pair = np.arange(head_dim // 2)
    turns = own_context / (2 * np.pi * theta ** (2 * pair / head_dim))
    stays = np.clip((turns - BETA_SLOW) / (BETA_FAST - BETA_SLOW), 0, 1)
    return {
        "linear": np.full(len(pair), ratio),
        "ntk": ratio ** (2 * pair / (head_dim - 2)),
        "yarn": 1 / (stays + (1 - stays) / ratio),
    }


def search_factors(
    score: Callable[[Sequence[float]], float],
    *,
    theta: float,
    head_dim: int,
    own_context: int,
    context: int,
    search: LongRopeSearch = PAPER,
    seed: int = 0,
) -> LongRopeResult:
    """Return the factors with the lowest score; no factors are scored twice.

    Args:
        score: what factors are worth, lower is better, such as the perplexity of long texts.
        theta: the model's own base.
        head_dim: rotated channels.
        own_context: positions that the model knows.
        context: positions it shall know.
        search: how much is tried: population + generations * (mutations + crossovers) scores at most.
        seed: of all choices.

    Raises:
        ArgumentError: the context is not longer than the own one, or fewer than four candidates are kept.
    """
    if context <= own_context or head_dim < 4 or search.population < 4:
        raise ArgumentError(
            "a LongRoPE search needs a longer context, two pairs of channels and four candidates",
            found=f"{context} positions of {own_context}, head_dim {head_dim}, population {search.population}",
        )
    generator = rng(seed, "longrope")
    highest = HEADROOM * context / own_context
    known = {
        name: _legal(factors, highest)
        for name, factors in starting_factors(
            theta=theta, head_dim=head_dim, own_context=own_context, context=context
        ).items()
    }
    scores: dict[tuple[float, ...], float] = {}

    def scored(factors: np.ndarray) -> float:
        key = tuple(factors.tolist())
        if key not in scores:
            value = float(score(key))
            # A model that overflows is worth nothing, and NaN would win every comparison.
            scores[key] = value if math.isfinite(value) else math.inf
        return scores[key]

    starts = list(known.values())
    population = [*starts]
    while len(population) < search.population:
        population.append(_mutated(starts[len(population) % len(starts)], generator, search, highest))
    population.sort(key=scored)
    started_at = {name: scored(factors) for name, factors in known.items()}
    history = [scored(population[0])]
    for _ in range(search.generations):
        parents = population[: max(2, search.population // 2)]
        children = [
            _mutated(parents[int(generator.integers(len(parents)))], generator, search, highest)
            for _ in range(search.mutations)
        ]
        for _ in range(search.crossovers):
            first, second = generator.choice(len(parents), 2, replace=False)
            takes = generator.random(len(parents[0])) < 0.5
            children.append(_legal(np.where(takes, parents[first], parents[second]), highest))
        population = sorted([*population, *children], key=scored)[: search.population]
        history.append(scored(population[0]))
    best = population[0]
    return LongRopeResult(best.tolist(), scored(best), history, started_at, len(scores))


def _mutated(
    factors: np.ndarray, generator: np.random.Generator, search: LongRopeSearch, highest: float
) -> np.ndarray:
    changes = generator.random(len(factors)) < search.probability
    drawn = factors * np.exp(generator.normal(0.0, 0.25, len(factors)))
    return _legal(np.where(changes, drawn, factors), highest)


def _legal(factors: np.ndarray, highest: float) -> np.ndarray:
    """Return the nearest factors that rise, within bounds, in whole steps."""
    bounded = np.clip(np.round(factors / STEP) * STEP, 1.0, highest)
    return np.round(np.maximum.accumulate(bounded), 2)
