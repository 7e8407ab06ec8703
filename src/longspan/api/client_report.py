"""What a client has done so far: answers, reasons for none, attempts, tokens, cost, waiting."""

from __future__ import annotations

import threading
from collections import Counter
from typing import NamedTuple

from longspan.api.messages import ChatResult
from longspan.core.units import format_count, format_seconds


class ClientReport(NamedTuple):
    """Counts of one client."""

    results: int
    """Requests that came to an end, recorded answers included."""
    answered: int
    """Of these, with an answer."""
    cached: int
    """Of these, taken from the file of answers."""
    reasons: dict[str, int]
    """Of these, without an answer, by reason."""
    retries: dict[str, int]
    """Attempts that failed and were made again, by cause."""
    attempts: int
    """HTTP requests."""
    prompt_tokens: int
    """Of new answers, as the server counts them."""
    completion_tokens: int
    estimated: int
    """New answers of which the server did not say the tokens."""
    cost: float | None
    """Of new answers; None: no prices."""
    seconds_limited: float
    """Spent waiting for the limits and for pauses that the server asked for, summed over requests."""
    seconds_backoff: float
    """Spent waiting before further attempts, summed over requests."""
    stopped: str | None
    """Why requests were left out: `max_cost`, `max_requests`; None: none were."""

    def describe(self) -> str:
        """Return one line for people."""
        parts = [f"{self.answered:,} of {self.results:,} answered"]
        if self.cached:
            parts.append(f"{self.cached:,} of them recorded before")
        parts.extend(f"{number:,} {reason}" for reason, number in sorted(self.reasons.items()))
        retries = ", ".join(f"{cause} {number:,}" for cause, number in sorted(self.retries.items()))
        if retries:
            parts.append(f"asked again after {retries}")
        parts.append(
            f"{format_count(self.prompt_tokens)} + {format_count(self.completion_tokens)} tokens"
            + (f", {self.estimated:,} answers estimated" if self.estimated else "")
        )
        if self.cost is not None:
            parts.append(f"cost {self.cost:.4g}")
        if self.seconds_limited + self.seconds_backoff >= 1:
            parts.append(f"waited {format_seconds(self.seconds_limited + self.seconds_backoff)}")
        if self.stopped:
            parts.append(f"stopped at {self.stopped}")
        return "; ".join(parts)


class Counts:
    """Adds up what a report says; used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        self._seconds = {"limited": 0.0, "backoff": 0.0}
        self.stopped: str | None = None

    def attempt(self) -> None:
        """Count one HTTP request."""
        with self._lock:
            self._numbers["attempts"] += 1

    def retry(self, cause: str) -> None:
        """Count an attempt that is made again."""
        with self._lock:
            self._retries[cause] += 1

    def wait(self, kind: str, seconds: float) -> None:
        """Count time spent `limited` or in `backoff`."""
        with self._lock:
            self._seconds[kind] += seconds

    def result(self, result: ChatResult) -> None:
        """Count the end of a request."""
        with self._lock:
            self._numbers["results"] += 1
            self._numbers["cached"] += result.cached
            if result.error is None:
                self._numbers["answered"] += 1
            else:
                self._reasons[result.error] += 1
            if not result.cached:
                self._numbers["prompt_tokens"] += result.usage.prompt_tokens
                self._numbers["completion_tokens"] += result.usage.completion_tokens
                self._numbers["estimated"] += result.usage.estimated

    def report(self, cost: float | None) -> ClientReport:
        """Return what there is so far."""
        with self._lock:
            number = self._numbers
            return ClientReport(
                results=number["results"],
                answered=number["answered"],
                cached=number["cached"],
                reasons=dict(self._reasons),
                retries=dict(self._retries),
                attempts=number["attempts"],
                prompt_tokens=number["prompt_tokens"],
                completion_tokens=number["completion_tokens"],
                estimated=number["estimated"],
                cost=cost,
                seconds_limited=self._seconds["limited"],
                seconds_backoff=self._seconds["backoff"],
                stopped=self.stopped,
            )
