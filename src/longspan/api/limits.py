"""Rate limits: requests at once, requests and tokens a minute, none during a pause.

A bucket refills continuously and never holds more than a second's worth, so requests are spread evenly instead
of coming in waves; and what was sent in any 60 seconds is added up, so that no minute exceeds the limit. Of limits
of 100 and more one per cent is left unused, for what the network delays.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

import pydantic

from longspan.api.clock import Clock
from longspan.core.config import Config
from longspan.core.log import get_logger

_log = get_logger("api")
_MINUTE = 60.0
_INSTANT = 1e-6
_SPOKEN_PAUSE_SECONDS = 5.0


class Limits(Config):
    """What the endpoint allows; None: no limit of ours."""

    concurrency: pydantic.PositiveInt = 8
    """Requests under way at the same time; after a kill at most that many are asked again."""
    requests_per_minute: pydantic.PositiveInt | None = None
    """HTTP requests in any 60 seconds, further attempts included."""
    tokens_per_minute: pydantic.PositiveInt | None = None
    """Tokens of prompts and answers in any 60 seconds; an answer counts with its limit until its length is known."""
    max_attempts: pydantic.PositiveInt = 8
    """Attempts for one request before it counts as failed."""
    backoff_seconds: pydantic.PositiveFloat = 1.0
    """Attempt n waits a random time up to this times 2^(n-1), but no longer than `backoff_limit`."""
    backoff_limit: pydantic.PositiveFloat = 60.0
    max_pause: pydantic.PositiveFloat = 3600.0
    """Longest Retry-After in seconds that is waited for; a longer one ends the job."""


def usable(per_minute: int) -> int:
    """Return how much of a limit is used: requests do not arrive quite as evenly as they are sent."""
    return per_minute - per_minute // 100


class _Sent:
    """An amount that was sent at a time."""

    __slots__ = ("amount", "inside", "time")

    def __init__(self, time: float, amount: float) -> None:
        self.time, self.amount, self.inside = time, amount, True


class RateBucket:
    """At most `per_minute` in any 60 seconds, evenly spread; times are given, none is read.

    It begins empty but for `start`. An amount larger than a second's worth may be taken when the bucket is full and
    leaves a debt that the next one waits for.
    """

    def __init__(self, per_minute: float, *, now: float, start: float = 0.0) -> None:
        self.per_minute = per_minute
        self._rate = per_minute / _MINUTE
        self._capacity = max(1.0, self._rate)
        self._level, self._time = start, now
        self._recent: deque[_Sent] = deque()
        self._recent_sum = 0.0

    def delay(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` may be taken; 0: now. `amount` is at most `per_minute`."""
        self._refill(now)
        wait = max(0.0, (min(amount, self._capacity) - self._level) / self._rate)
        excess = self._recent_sum + amount - self.per_minute
        for sent in self._recent:
            if excess <= 0:
                break
            wait = max(wait, sent.time + _MINUTE - now)
            excess -= sent.amount
        return wait

    def take(self, amount: float, now: float) -> _Sent:
        """Take `amount`; what is returned is given to `settle` when the true amount is known."""
        self._refill(now)
        self._level -= amount
        sent = _Sent(now, amount)
        self._recent.append(sent)
        self._recent_sum += amount
        return sent

    def settle(self, sent: _Sent, amount: float, now: float) -> None:
        """Put the true amount in the place of the one that was taken."""
        self._refill(now)
        self._level = min(self._capacity, self._level + sent.amount - amount)
        if sent.inside:
            self._recent_sum += amount - sent.amount
        sent.amount = amount

    def _refill(self, now: float) -> None:
        self._level = min(self._capacity, self._level + (now - self._time) * self._rate)
        self._time = now
        while self._recent and self._recent[0].time + _MINUTE <= now:
            gone = self._recent.popleft()
            gone.inside = False
            self._recent_sum -= gone.amount


class Ticket(NamedTuple):
    """Permission to send one request."""

    tokens: _Sent | None
    waited: float
    """Seconds that it was waited for."""


class Throttle:
    """Hands out tickets in the order in which they are asked for; lives in one event loop."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._clock = clock
        self._turn = asyncio.Lock()
        self._resume = now = clock.now()
        rpm, tpm = limits.requests_per_minute, limits.tokens_per_minute
        self._requests = RateBucket(usable(rpm), now=now, start=1.0) if rpm else None
        self._tokens = RateBucket(usable(tpm), now=now) if tpm else None

    async def acquire(self, tokens: int) -> Ticket:
        """Wait until a request of that many tokens may be sent, and take it from the buckets."""
        asked = self._clock.now()
        async with self._turn:
            while (wait := self._delay(tokens)) > _INSTANT:
                # No longer than a second at once: answers shorter than their limit make room meanwhile.
                await self._clock.sleep(min(wait, 1.0))
            now = self._clock.now()
            if self._requests:
                self._requests.take(1, now)
            sent = self._tokens.take(tokens, now) if self._tokens else None
            return Ticket(sent, now - asked)

    def settle(self, ticket: Ticket, tokens: int) -> None:
        """Say how many tokens a request has really taken."""
        if self._tokens and ticket.tokens:
            self._tokens.settle(ticket.tokens, min(tokens, self._tokens.per_minute), self._clock.now())

    def pause(self, seconds: float) -> None:
        """Send nothing for that long: what one request is told holds for all."""
        until = self._clock.now() + seconds
        if until > self._resume:
            if seconds >= _SPOKEN_PAUSE_SECONDS and until - self._resume >= _SPOKEN_PAUSE_SECONDS:
                _log.info("the server asks for a pause of %.0f s", seconds)
            self._resume = until

    def _delay(self, tokens: int) -> float:
        now = self._clock.now()
        waits = [self._resume - now]
        if self._requests:
            waits.append(self._requests.delay(1, now))
        if self._tokens:
            waits.append(self._tokens.delay(tokens, now))
        return max(waits)
