"""Progress of long work: a bar on a terminal, plain lines with rate and time left elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from longspan.core.log import get_logger
from longspan.core.units import format_count, format_seconds

LINE_INTERVAL_SECONDS = 10.0


class Progress(Protocol):
    """What `progress` yields: count work as it is done."""

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units as done."""

    def note(self, text: str) -> None:
        """Show a short text (the current loss, say) beside the rate."""


@contextmanager
def progress(title: str, *, total: int | None, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show how far `title` has come, at what rate, and how long it will take; `done` counts earlier work."""
    if sys.stderr.isatty():
        with _bar(title, total, unit, done) as bar:
            yield bar
    else:
        lines = _Lines(title, total, unit, done)
        yield lines
        lines.finish()


class _Lines:
    def __init__(self, title: str, total: int | None, unit: str, done: int) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.before, self.done = done, done
        self.text = ""
        self.started = self.spoken = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        if time.monotonic() - self.spoken >= LINE_INTERVAL_SECONDS:
            self._say()

    def note(self, text: str) -> None:
        self.text = text

    def finish(self) -> None:
        elapsed = time.monotonic() - self.started
        rate = (self.done - self.before) / elapsed if elapsed > 0 else 0.0
        get_logger("progress").info(
            "%s: done, %s %s in %s (%s %s/s)%s",
            self.title,
            format_count(self.done),
            self.unit,
            format_seconds(elapsed),
            format_count(rate),
            self.unit,
            f", {self.text}" if self.text else "",
        )

    def _say(self) -> None:
        self.spoken = time.monotonic()
        rate = (self.done - self.before) / (self.spoken - self.started)
        parts = [f"{format_count(self.done)} {self.unit}", f"{format_count(rate)} {self.unit}/s"]
        if self.total:
            parts.insert(0, f"{100 * self.done / self.total:.0f}%")
            if rate > 0:
                parts.append(f"{format_seconds((self.total - self.done) / rate)} left")
        if self.text:
            parts.append(self.text)
        get_logger("progress").info("%s: %s", self.title, ", ".join(parts))


@contextmanager
def _bar(title: str, total: int | None, unit: str, done: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),  # a file name may hold [brackets]
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task(title, total=total, completed=done, rate="", note="")
        started = time.monotonic()
        count = 0

        class Bar:
            def advance(self, amount: int = 1) -> None:
                nonlocal count
                count += amount
                elapsed = time.monotonic() - started
                rate = f"{format_count(count / elapsed)} {unit}/s" if elapsed > 0 else ""
                display.update(task, advance=amount, rate=rate)

            def note(self, text: str) -> None:
                display.update(task, note=text)

        yield Bar()
