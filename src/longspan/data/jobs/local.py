"""Processes of this machine."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from longspan.core.errors import ArgumentError, RunError
from longspan.data.jobs.base import Result, Unit


class LocalExecutor:
    """Spawns processes at the first run and keeps them until it is closed; one worker is this process itself.

    A script that uses more than one worker needs an `if __name__ == "__main__":` guard.
    """

    def __init__(self, num_workers: int = 1) -> None:
        if num_workers < 1:
            raise ArgumentError("bad number of workers", found=f"num_workers={num_workers}", allowed=">= 1")
        self.num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def run(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
        """See `Executor.run`. Twice as many units as workers are under way at once."""
        if self.num_workers == 1 or (len(units) < 2 and self._pool is None):
            yield from map(function, units)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
            )
        waiting: deque[Future[Any]] = deque()
        try:
            for unit in units:
                waiting.append(self._pool.submit(function, unit))
                if len(waiting) >= 2 * self.num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process died",
                found=str(error),
                fix="look for an out-of-memory kill, and run the same command again to go on; "
                "a script needs an `if __name__ == '__main__':` guard",
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone, even killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
