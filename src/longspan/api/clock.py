"""Time as the client sees it; tests put their own in its place and wait for nothing."""

from __future__ import annotations

import asyncio
import time


class Clock:
    """The machine's clock."""

    def now(self) -> float:
        """Return seconds that only go forward."""
        return time.monotonic()

    def wall(self) -> float:
        """Return the time of day in seconds since 1970."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Let other work run for that long."""
        await asyncio.sleep(seconds)
