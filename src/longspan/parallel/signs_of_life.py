"""Signs of life from work that makes none itself: files that are written, a model that is read or built."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from longspan.core.errors import LongspanError, RunError
from longspan.core.heartbeat import beat

__all__ = ["first_reads", "growing", "reading"]

GROWTH_SECONDS = 1.0
"""Between two looks at what has been done."""

Result = TypeVar("Result")


@contextlib.contextmanager
def growing(folder: Path) -> Iterator[None]:
    """Beat whenever the bytes below `folder` change, by this process or another: waiting is progress."""
    with _while_moving(lambda: _bytes_below(folder), beat):
        yield


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Beat whenever this process takes memory that it has not had: a model that is read or built goes on."""
    with _while_moving(_pages_taken, beat):
        yield


def first_reads(action: Callable[[], Result], *, group: dist.ProcessGroup | None) -> Result | None:
    """Return what `action` returns on the first rank, and None on the others, which wait for as long as it goes on.

    They are told that it does, so their watchdogs wait too, and theirs alone end a first rank that has stopped. `group`
    is one of all ranks with `PATIENCE`, which nobody uses meanwhile.

    Raises:
        LongspanError: what `action` raised, on every rank.
    """

    def tell(news: tuple[str, type[LongspanError] | None, str]) -> None:
        dist.broadcast_object_list([news], src=0, group=group)

    def sign() -> None:
        beat()
        tell(("goes on", None, ""))

    if dist.get_rank() == 0:
        news: tuple[str, type[LongspanError] | None, str] = ("failed", RunError, "the first rank failed")
        try:
            with _while_moving(_pages_taken, sign):
                result = action()
            news = ("done", None, "")
            return result
        except LongspanError as error:
            news = ("failed", type(error), str(error))
            raise
        finally:
            tell(news)
    heard: list[Any] = [None]
    while True:
        dist.broadcast_object_list(heard, src=0, group=group)
        what, kind, message = heard[0]
        beat()
        if kind is not None:
            raise kind(message)
        if what == "done":
            return None


@contextlib.contextmanager
def _while_moving(measure: Callable[[], int], moved: Callable[[], None]) -> Iterator[None]:
    """Call `moved` in another thread whenever the measure is another than a moment ago."""
    done = threading.Event()
    before = measure()

    def look() -> None:
        nonlocal before
        while not done.wait(GROWTH_SECONDS):
            if (now := measure()) != before:
                before = now
                moved()

    thread = threading.Thread(target=look, name="longspan-moving", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _pages_taken() -> int:
    """Return pages of memory that this process has touched for the first time, or that came from the disk, over 256."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    # This look takes a few pages itself.
    return (used.ru_minflt + used.ru_majflt + used.ru_inblock) // 256


def _bytes_below(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # moved away in between
                total += os.stat(os.path.join(place, name)).st_size
    return total
