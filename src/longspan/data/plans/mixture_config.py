"""What to choose from a length table; `mixture` says by which rules."""

from __future__ import annotations

from typing import Literal, Self

import pydantic

from longspan.core.config import Config, Length, TokenBudget
from longspan.data.plans.where import parse_condition


class MixtureConfig(Config):
    """What to choose from a length table."""

    ADDED_LATER = frozenset({"characters_per_token", "where", "audit"})

    mode: Literal["none", "global", "per_source", "upsample", "proportions", "repeat"] = "per_source"
    """none: every document. global: short documents are kept with probability `keep_short`. per_source: the same, and
    every source keeps its share of the tokens. upsample: some sources get new `weights`. proportions: only the sources
    with `weights`. repeat: sources with `weights` are used so many times, the others once."""
    tokens: TokenBudget | None = pydantic.Field(None, gt=0)
    """Tokens to choose, such as 5B. None: all (none, global), else as many as the scarcest source allows."""
    keep_short: float | None = pydantic.Field(None, ge=0, le=1)
    """Probability that a short document is kept. None: 0.1 for global and per_source, 1 otherwise."""
    threshold: Length = pydantic.Field(4096, ge=0)
    """Documents with fewer tokens than this are short."""
    weights: dict[str, float] = pydantic.Field(default_factory=dict)
    """Share of tokens per source for upsample and proportions, in any unit, normalised; uses for repeat."""
    characters_per_token: float | None = pydantic.Field(None, gt=0)
    """Take a document for as long as its characters divided by this, instead of its tokens, where lengths are compared
    with `threshold` and budgets; 3.68 in slimpajama_packing.py. None: tokens."""
    max_repeat: int = pydantic.Field(1, ge=1)
    """How often one document may be used to fill the budget of its source. 1: never repeated. Mode repeat goes
    by its weights."""
    group: Literal["source", "store"] = "source"
    """What is mixed: sources, or stores, which are then named "0", "1" ... in the order they are given."""
    sources: tuple[str, ...] | None = None
    """Sources to choose from. None: all."""
    part: tuple[float, float] | None = None
    """Part of the documents to choose from, as `data split` cuts them: from and to which share of all, so (0, 0.98)
    is the first of train=0.98,validation=0.02. None: all."""
    where: str | None = None
    """Condition on documents to choose from, such as `near_duplicate == 0 and tokens >= 4096`: `tokens`, `source` and
    what `audit` measured. A comparison with what is not known does not hold. None: all."""
    audit: str | None = None
    """Folder of `data audit` that `where` asks."""

    @pydantic.model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        weighted = self.mode in ("upsample", "proportions", "repeat")
        if weighted and not sum(self.weights.values()) > 0:
            raise ValueError(f"mode {self.mode} needs weights, such as weights: {{books: 0.5, code: 0.5}}")
        if not weighted and self.weights:
            raise ValueError(
                f"weights have no effect in mode {self.mode}; use upsample, proportions or repeat"
            )
        if any(not 0 <= weight < float("inf") for weight in self.weights.values()):
            raise ValueError("weights are finite and not negative")
        if self.mode == "repeat" and (self.tokens is not None or self.max_repeat != 1):
            raise ValueError("tokens and max_repeat have no effect in mode repeat: its weights say how much")
        if self.part is not None and not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError("a part is two shares in order, from 0 to 1, such as [0, 0.98]")
        if self.audit is not None and self.where is None:
            raise ValueError("an audit has an effect only on a condition: give where")
        if self.mode == "none" and self.keep_short is not None:
            raise ValueError("keep_short has no effect in mode none; use global or per_source")
        return self

    @pydantic.field_validator("where")
    @classmethod
    def _is_a_condition(cls, where: str | None) -> str | None:
        if where is not None:
            parse_condition(where)
        return where

    @property
    def keep_probability(self) -> float:
        """Return the probability that a short document is kept, the mode's default filled in."""
        if self.keep_short is not None:
            return self.keep_short
        return 0.1 if self.mode in ("global", "per_source") else 1.0
