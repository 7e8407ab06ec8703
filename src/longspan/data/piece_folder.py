"""A folder made of pieces: by several processes, again from where a killed run stopped, by one job at a time.

    .OUT.pieces/job.json       what is being made; other settings do not continue it
    .OUT.pieces/lock           held while a job works; the second one stops
    .OUT.pieces/done/7.json    written when the files of piece 7 are whole

When all pieces are there, the caller adds what belongs to the whole and the folder is renamed to OUT.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from longspan.core.errors import DataError
from longspan.core.files import disk_errors, read_json, remove_leftovers, write_json
from longspan.core.progress import progress
from longspan.data.executor import LocalExecutor
from longspan.data.job_lock import JobLock

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
    with (
        progress(title, total=num_pieces, unit="pieces", done=num_pieces - len(missing)) as bar,
        LocalExecutor(num_workers) as executor,
    ):
        for number, entry in zip(missing, executor.run(partial(write, folder), missing)):
            write_json(done / f"{number}.json", entry)
            bar.advance()
    return [read_json(done / f"{number}.json") for number in range(num_pieces)]


@contextmanager
def open_pieces(out: Path, job: dict[str, Any]) -> Iterator[Path]:
    """Yield the folder beside `out` in which its pieces are made; at the end it is renamed to `out`.

    After an error, or a kill, the folder stays, and the same job goes on with it.

    Raises:
        DataError: something stands at `out`, or other settings began it.
        RunError: another job is at work on it.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} already exists", fix="choose another place or remove it first")
    aside = out.with_name(f".{out.name}.pieces")
    with JobLock(aside / "lock", what=str(out)):
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
