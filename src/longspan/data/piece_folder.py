"""A folder made of pieces: by several processes, again from where a killed run stopped, by one job at a time.

    .OUT.pieces/job.json       what is being made; other settings do not continue it
    .OUT.pieces/lock           held while a job works; the second one stops
    .OUT.pieces/done/7.json    written when the files of piece 7 are whole

When all pieces are there, the caller adds what belongs to the whole and the folder is renamed to OUT.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longspan.core.errors import DataError, RunError
from longspan.core.files import disk_errors, read_json, remove_leftovers, write_json
from longspan.core.progress import progress

PieceWriter = Callable[[Path, int], dict[str, Any]]
"""Writes the files of piece `number` into a folder, each atomically; returns its entry. Sent to processes."""


def make_pieces(
    folder: Path, num_pieces: int, write: PieceWriter, *, num_workers: int, title: str
) -> list[dict[str, Any]]:
    """Write the pieces that are missing in a folder of `open_pieces`; return the entries of all, in order.

    Raises:
        RunError: a worker died, or the disk refuses; pieces that are done stay.
    """
    done = folder / "done"
    with disk_errors(folder):
        done.mkdir(exist_ok=True)
    missing = [number for number in range(num_pieces) if not (done / f"{number}.json").is_file()]
    with progress(title, total=num_pieces, unit="pieces", done=num_pieces - len(missing)) as bar:
        for number, entry in _written(folder, missing, write, num_workers):
            write_json(done / f"{number}.json", entry)
            bar.advance()
    return [read_json(done / f"{number}.json") for number in range(num_pieces)]


@contextmanager
def open_pieces(out: Path, job: dict[str, Any]) -> Iterator[Path]:
    """Yield the folder beside `out` in which its pieces are made; at the end it is renamed to `out`.

    After an error, or a kill, the folder stays, and the same job goes on with it.

    Raises:
        DataError: something stands at `out`, another job is at work on it, or other settings began it.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} already exists", fix="choose another place or remove it first")
    aside = out.with_name(f".{out.name}.pieces")
    with disk_errors(aside):
        aside.mkdir(parents=True, exist_ok=True)
        lock = open(aside / "lock", "w")  # noqa: SIM115 (closed below, the lock with it)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another job is writing {out}", fix="wait for it to end, or choose another place"
            ) from None
        _check_job(aside, job)
        for leftover in (aside, aside / "done"):
            remove_leftovers(leftover)
        yield aside
        with disk_errors(out):
            for path in (aside / "job.json", aside / "lock"):
                path.unlink()
            shutil.rmtree(aside / "done")
            if out.exists():
                out.rmdir()
            os.replace(aside, out)
    finally:
        lock.close()


def _check_job(aside: Path, job: dict[str, Any]) -> None:
    path = aside / "job.json"
    if not path.exists():
        write_json(path, job)
        return
    begun = read_json(path)
    if begun != job:
        names = [name for name in job if not isinstance(begun, dict) or begun.get(name) != job[name]]
        raise DataError(
            f"{aside} holds unfinished work with other settings",
            found=f"other {', '.join(names) or 'settings'}",
            fix="go on with the same settings, or remove that folder",
        )


def _written(
    folder: Path, numbers: Sequence[int], write: PieceWriter, num_workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the entry of each piece as it is finished."""
    if num_workers == 1 or len(numbers) < 2:
        for number in numbers:
            yield number, write(folder, number)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_workers, len(numbers)), mp_context=context, initializer=_start_worker)
    try:
        jobs = {pool.submit(write, folder, number): number for number in numbers}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process died",
            found=str(error),
            fix="look for an out-of-memory kill; run the same command again to go on",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone, even killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
