"""Heartbeats from deep inside a step, for the watchdog of the process: one step of long rows may take minutes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["beat", "watched_by"]

_watchers: list[Callable[[], None]] = []


def beat() -> None:
    """Say that work goes on: called once per micro-batch, chunk and checkpointed block, in any thread."""
    for watcher in _watchers:
        watcher()


@contextlib.contextmanager
def watched_by(watcher: Callable[[], None]) -> Iterator[None]:
    """Call `watcher` at every beat."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
