"""How long an evaluation will take, said once in its first lines, by what its first seconds of work have done."""

from __future__ import annotations

import time
from collections.abc import Callable

from longspan.core.log import get_logger
from longspan.core.units import format_seconds

MEASURED_SECONDS = 5.0
"""Work is watched for so long before anything is said of the rest."""
WORTH_SECONDS = 60.0
"""Less that is left is not worth a line."""


class Forecast:
    """Says once how long the rest of some work will take.

    Args:
        title: what is being done.
        total: work of all, in units of any kind that take about the same time each: operations, not tokens, where
            lengths differ.
        clock: seconds.
    """

    def __init__(self, title: str, total: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._title, self._total, self._clock = title, total, clock
        self._first: tuple[float, float] | None = None
        self._before = 0.0
        self._said = False

    def reach(self, work: float) -> None:
        """Take note that so much of the current part is done."""
        if self._said:
            return
        now, done = self._clock(), self._before + work
        if self._first is None:
            # What comes before the first piece, composing and warming up, is not what the rest takes.
            self._first = now, done
            return
        seconds, gained = now - self._first[0], done - self._first[1]
        if seconds < MEASURED_SECONDS or gained <= 0:
            return
        self._said = True
        left = (self._total - done) / gained * seconds
        if left >= WORTH_SECONDS:
            get_logger("eval").info(
                "%s: about %s for what is left, by the first %s of work",
                self._title,
                format_seconds(left),
                format_seconds(seconds),
            )

    def end_part(self, work: float) -> None:
        """Begin the next part; this one was so much work."""
        self._before += work
        self.reach(0.0)
