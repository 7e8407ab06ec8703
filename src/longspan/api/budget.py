"""What a job may cost, what it has cost, and what it would cost.

Prices are data that the user gives; none are built in, because they change. They are per million tokens, in
any currency, and an answer's cost is its usage times them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import pydantic

from longspan.api.limits import Limits
from longspan.api.messages import Usage
from longspan.core.config import Config, read_yaml
from longspan.core.errors import ConfigError

_PER = 1_000_000


class Price(Config):
    """Prices of one model per million tokens."""

    input: float = pydantic.Field(ge=0, allow_inf_nan=False)
    """Of a million tokens of prompts."""
    output: float = pydantic.Field(ge=0, allow_inf_nan=False)
    """Of a million tokens of answers."""

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the cost of that many tokens."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / _PER


class SpendingLimits(Config):
    """Where a job stops; None: no limit."""

    max_cost: float | None = pydantic.Field(default=None, ge=0, allow_inf_nan=False)
    """Most that new answers may cost. A request is not begun when it could exceed this at its longest answer."""
    max_requests: pydantic.NonNegativeInt | None = None
    """Most requests that are begun; recorded answers and further attempts do not count."""
    price: Price | None = None
    """Prices that `max_cost` and the report are computed with."""
    prices: str | None = None
    """YAML file of prices by model, `NAME: {input: 2.5, output: 10}`, where `price` is not given."""

    @pydantic.model_validator(mode="after")
    def _cost_needs_prices(self) -> SpendingLimits:
        if self.max_cost is not None and self.price is None and self.prices is None:
            raise ConfigError(
                "max_cost is set but there are no prices",
                fix="give the prices of a million tokens (price: {input: ..., output: ...}), or a file of prices",
            )
        return self

    def priced(self, model: str) -> SpendingLimits:
        """Return the limits with the prices of a model. Raises ConfigError: the file has none."""
        if self.price is not None or self.prices is None:
            return self
        return self.model_copy(update={"price": price_of(model, self.prices)})


class CostEstimate(NamedTuple):
    """What a job would take at most, before anything is sent."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """None: no prices."""
    minutes: float | None
    """How long the limits alone would make it; None: there are none."""


def read_prices(path: str | Path) -> dict[str, Price]:
    """Read a YAML file of prices by model, `name: {input: 2.5, output: 10}`. Raises ConfigError."""
    return {
        str(model): Price.from_dict(price if isinstance(price, dict) else {}, where=f"{path}: {model}")
        for model, price in read_yaml(path).items()
    }


def price_of(model: str, path: str | Path) -> Price:
    """Return the prices of a model from such a file. Raises ConfigError naming the models that it has."""
    prices = read_prices(path)
    if model not in prices:
        raise ConfigError(f"{path} has no prices of {model!r}", allowed=sorted(prices))
    return prices[model]


def estimate(
    token_counts: Iterable[tuple[int, int]], *, price: Price | None = None, limits: Limits | None = None
) -> CostEstimate:
    """Add up what requests of (prompt tokens, answer tokens at most) would take, each answered at once."""
    requests = prompt = completion = 0
    for prompt_tokens, completion_tokens in token_counts:
        requests += 1
        prompt += prompt_tokens
        completion += completion_tokens
    minutes = []
    if limits is not None and limits.requests_per_minute:
        minutes.append(requests / limits.requests_per_minute)
    if limits is not None and limits.tokens_per_minute:
        minutes.append((prompt + completion) / limits.tokens_per_minute)
    cost = price.cost(prompt, completion) if price is not None else None
    return CostEstimate(requests, prompt, completion, cost, max(minutes, default=None))


class Meter:
    """Counts what is spent and what requests under way may still cost; used from several threads."""

    def __init__(self, budget: SpendingLimits) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._spent = self._reserved = 0.0
        self._begun = 0

    @property
    def spent(self) -> float | None:
        """Cost of all answers so far; None: no prices."""
        return self._spent if self._budget.price is not None else None

    def cost(self, usage: Usage) -> float | None:
        """Return the cost of an answer; None: no prices."""
        price = self._budget.price
        return price.cost(usage.prompt_tokens, usage.completion_tokens) if price is not None else None

    def begin(self, usage: Usage) -> Literal["yes", "later", "max_cost", "max_requests"]:
        """Reserve the most that a request may cost, or say that it has to wait for others or may not begin."""
        cost = self.cost(usage) or 0.0
        with self._lock:
            if self._budget.max_requests is not None and self._begun >= self._budget.max_requests:
                return "max_requests"
            if self._budget.max_cost is not None:
                if self._spent + cost > self._budget.max_cost:
                    return "max_cost"
                if self._spent + self._reserved + cost > self._budget.max_cost:
                    return "later"
            self._begun += 1
            self._reserved += cost
            return "yes"

    def end(self, reserved: Usage, usage: Usage) -> None:
        """Put the true usage in the place of the reserved one."""
        with self._lock:
            self._reserved -= self.cost(reserved) or 0.0
            self._spent += self.cost(usage) or 0.0
