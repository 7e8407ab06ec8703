"""A clock of which the test holds the hands: sleeping moves it on at once."""

from __future__ import annotations

import asyncio

from longspan.api.clock import Clock


class MadeClock(Clock):
    def __init__(self) -> None:
        self.time = 1000.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)
