"""How long a grid will take, said while there is time to stop it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from longspan.eval.forecast import Forecast
from longspan.infer.requests import work_of
from tests.infer.engines import local


@pytest.fixture()
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "longspan")
    return lambda: [record.message for record in caplog.records]


def test_the_rest_is_told_once_by_the_first_seconds(lines: Callable[[], list[str]]) -> None:
    """A day's grid that says so after its first part; composing that is taken for the pace of reading."""
    now = [100.0]
    forecast = Forecast("needle x", 1000.0, clock=lambda: now[0])
    for second, work in ((90.0, 1.0), (92.0, 2.0), (96.0, 5.0)):
        now[0] = 100.0 + second
        forecast.reach(work)
    # 4 of work in 6 seconds, 995 are left.
    assert lines() == ["needle x: about 24 min 52 s for what is left, by the first 6.0 s of work"]
    forecast.end_part(500.0)
    now[0] = 900.0
    forecast.reach(10.0)
    assert len(lines()) == 1


def test_parts_add_up_and_short_work_is_not_worth_a_line(lines: Callable[[], list[str]]) -> None:
    now = [0.0]
    forecast = Forecast("needle x", 12.0, clock=lambda: now[0])
    for second in range(8):
        now[0] = float(second)
        forecast.end_part(1.0)
    assert lines() == []
    slow = Forecast("ruler x", 100.0, clock=lambda: now[0])
    slow.end_part(1.0)
    now[0] += 10
    slow.end_part(1.0)
    assert lines() == ["ruler x: about 16 min 20 s for what is left, by the first 10.0 s of work"]


def test_long_prompts_weigh_more_than_their_tokens() -> None:
    """Pairs of tokens grow with the square: a grid that begins with its longest prompts seemed to take far too long."""
    answerer = local("llama")
    assert work_of(answerer, 4000) > 3 * work_of(answerer, 2000)
    assert work_of(object(), 4000) == 2 * work_of(object(), 2000)
