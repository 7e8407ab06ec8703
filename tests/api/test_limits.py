"""No minute exceeds a limit, whatever is asked when; and nearly all of what is allowed is used."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.api.limits import Limits, RateBucket, Throttle, usable
from tests.api.made_clock import MadeClock


def most_in_a_minute(sent: list[tuple[float, float]]) -> float:
    """The largest sum of amounts in any half-open 60 seconds."""
    return max(sum(amount for time, amount in sent if start <= time < start + 60 - 1e-6) for start, _ in sent)


def run(
    bucket: RateBucket, amounts: list[float], *, gaps: list[float] | None = None
) -> list[tuple[float, float]]:
    """Take amounts one after the other, each as early as allowed (after `gaps` of idleness)."""
    now, sent = 0.0, []
    for place, amount in enumerate(amounts):
        now += gaps[place] if gaps else 0.0
        while (wait := bucket.delay(amount, now)) > 1e-6:
            now += wait
        bucket.take(amount, now)
        sent.append((now, amount))
    return sent


@settings(max_examples=60, deadline=None)
@given(
    per_minute=st.integers(1, 400),
    work=st.lists(
        st.tuples(st.floats(0.001, 1.0), st.floats(0.0, 90.0) | st.just(0.0)), min_size=1, max_size=60
    ),
)
def test_no_minute_exceeds_the_limit(per_minute, work):
    """Bursts after idleness, large and small amounts: a server that counts any 60 seconds must not refuse."""
    amounts = [share * per_minute for share, _ in work]
    sent = run(RateBucket(per_minute, now=0.0), amounts, gaps=[gap for _, gap in work])
    assert most_in_a_minute(sent) <= per_minute * (1 + 1e-9)


@pytest.mark.parametrize("per_minute", [1, 3, 10, 60, 1000])
def test_requests_use_what_is_allowed(per_minute):
    """From the second request on, at least 99 % of the rate; the first goes at once, without a burst after it."""
    sent = run(RateBucket(per_minute, now=0.0, start=1.0), [1.0] * (3 * per_minute + 1))
    assert sent[0][0] == 0.0
    assert (len(sent) - 1) / sent[-1][0] >= 0.99 * per_minute / 60
    within_a_second = [time for time, _ in sent if time < 1.0]
    assert len(within_a_second) <= 1 + per_minute / 60


def test_a_late_timer_loses_nothing():
    """Every wait ends 2 ms late: the bucket makes up for it instead of adding it to every interval."""
    bucket, now, number = RateBucket(6000, now=0.0, start=1.0), 0.0, 0
    while now < 120:
        wait = bucket.delay(1, now)
        if wait > 1e-6:
            now += wait + 0.002
            continue
        bucket.take(1, now)
        number += 1
    assert number / 120 >= 0.98 * 100


def test_large_amounts_wait_for_their_debt():
    """Of 600 a minute: 300 at once after the start, then 30 s until the next; never 900 in a minute."""
    sent = run(RateBucket(600, now=0.0), [300.0] * 4)
    times = [time for time, _ in sent]
    assert times[0] <= 1.0
    assert all(later - earlier >= 29.9 for earlier, later in itertools.pairwise(times))
    assert most_in_a_minute(sent) <= 600


def test_what_was_not_used_is_given_back():
    """An answer of 10 tokens of which 300 were reserved leaves room for the next at once."""
    bucket = RateBucket(600, now=0.0, start=10.0)
    sent = bucket.take(300.0, 0.0)
    assert bucket.delay(300.0, 0.0) > 29
    bucket.settle(sent, 10.0, 0.0)
    assert bucket.delay(10.0, 0.0) == pytest.approx(1.0)
    assert bucket.delay(590.0, 1.0) < 1.0


def test_a_settlement_after_its_minute_changes_nothing():
    bucket = RateBucket(60, now=0.0, start=1.0)
    sent = bucket.take(30.0, 0.0)
    assert bucket.delay(1.0, 100.0) == 0.0
    bucket.settle(sent, 1.0, 100.0)
    assert bucket.delay(60.0, 100.0) == 0.0, "the window is empty, neither less nor more"


def test_a_pause_holds_everybody_and_the_longest_counts():
    clock = MadeClock()

    async def three() -> list[float]:
        throttle = Throttle(Limits(), clock)
        throttle.pause(5)
        throttle.pause(2)
        return [(await throttle.acquire(1)).waited for _ in range(3)]

    assert asyncio.run(three()) == pytest.approx([5, 0, 0])


@pytest.mark.parametrize(("limit", "used"), [(1, 1), (99, 99), (100, 99), (6000, 5940)])
def test_a_hundredth_of_a_large_limit_is_left(limit, used):
    """Delays on the way can move requests from one minute of the server's into the next."""
    clock = MadeClock()

    async def times() -> list[float]:
        throttle = Throttle(Limits(requests_per_minute=limit), clock)
        found = []
        while not found or found[-1] < 1060:
            await throttle.acquire(1)
            found.append(clock.now())
        return found

    found = asyncio.run(times())
    assert usable(limit) == used
    assert used - 1 <= sum(time < 1060 for time in found) <= used + 1


def test_tickets_are_handed_out_in_order():
    """A large request is not overtaken for ever by small ones."""
    clock = MadeClock()
    order = []

    async def one(throttle: Throttle, name: str, tokens: int) -> None:
        await throttle.acquire(tokens)
        order.append(name)

    async def race() -> None:
        throttle = Throttle(Limits(tokens_per_minute=600), clock)
        await asyncio.gather(
            one(throttle, "first", 10), one(throttle, "large", 590), one(throttle, "small", 1)
        )

    asyncio.run(race())
    assert order == ["first", "large", "small"]
