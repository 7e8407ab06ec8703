"""A folder made of pieces: by processes or jobs of an array, again from where a killed run stopped.

    .OUT.pieces/job.json            what is being made; other settings do not continue it
    .OUT.pieces/job-0-of-1.lock     held while a job works; a second one like it stops
    .OUT.pieces/done/7.json         written when the files of piece 7 are whole

The job that finds all pieces there adds what belongs to the whole and renames the folder to OUT.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import DataError
from longspan.core.files import disk_errors, read_json, remove_leftovers, write_json
from longspan.core.log import get_logger
from longspan.core.progress import progress
from longspan.data.jobs import ArrayJob, Executor
from longspan.data.jobs.job_lock import BusyError, JobLock, hold_share

PieceWriter = Callable[[Path, int], dict[str, Any]]
"""Writes the files of piece `number` into a folder, each atomically; returns its entry. Sent to processes."""


class PieceFolder(NamedTuple):
    """A folder to be made."""

    out: Path
    settings: dict[str, Any]
    """What decides the pieces; they say whether unfinished work is of the same folder."""
    num_pieces: int
    write: PieceWriter
    finish: Callable[[Path, list[dict[str, Any]]], None]
    """Adds what belongs to the whole, given the entries of all pieces."""
    is_done: Callable[[], bool]
    """Whether `out` is complete. Raises DataError if it holds something else."""
    title: str = "write"

    @property
    def aside(self) -> Path:
        """The folder beside `out` in which the pieces are made."""
        return self.out.with_name(f".{self.out.name}.pieces")

    def make(self, executor: Executor, share: ArrayJob | None = None) -> bool:
        """Make the missing pieces of a share, and the whole if then all are there; return whether it is.

        After an error, or a kill, finished pieces stay, and the same job goes on with them.

        Raises:
            DataError: something stands at `out`, or other settings began it.
            RunError: another job is at work on it, a worker died, or the disk refuses.
        """
        share = ArrayJob() if share is None else share
        if self._is_there():
            get_logger("data.pieces").info("%s is complete: kept as it is", self.out)
            return True
        with hold_share(self.aside, share, what=str(self.out)):
            # Another job may have ended between the look at `out` and the lock.
            if self._is_there():
                shutil.rmtree(self.aside, ignore_errors=True)
                return True
            begin_work(
                self.aside / "job.json",
                self.settings,
                how="with other settings",
                fix="go on with the same settings, or remove that folder",
            )
            if share.count == 1:
                self._remove_leftovers()
            self._make_pieces(executor, share.share(range(self.num_pieces)))
            if share.count == 1:
                self._complete()
                return True
        return self._complete_share()

    def missing(self) -> int:
        """Return how many pieces are not there; 0 where the whole is."""
        if self._is_there():
            return 0
        return sum(not self._done(number).is_file() for number in range(self.num_pieces))

    def _done(self, number: int) -> Path:
        return self.aside / "done" / f"{number}.json"

    def _is_there(self) -> bool:
        if self.is_done():
            return True
        if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
            raise DataError(f"{self.out} already exists", fix="choose another place or remove it first")
        return False

    def _remove_leftovers(self) -> None:
        for folder in (self.aside, self.aside / "done"):
            remove_leftovers(folder)

    def _make_pieces(self, executor: Executor, numbers: Sequence[int]) -> None:
        with disk_errors(self.aside):
            (self.aside / "done").mkdir(exist_ok=True)
        missing = [number for number in numbers if not self._done(number).is_file()]
        with progress(self.title, total=len(numbers), unit="pieces", done=len(numbers) - len(missing)) as bar:
            for number, entry in zip(missing, executor.run(partial(self.write, self.aside), missing)):
                write_json(self._done(number), entry)
                bar.advance()

    def _complete_share(self) -> bool:
        """Make the whole, if this job of an array ended last."""
        if self.missing():
            # Or another job has renamed them away.
            return self.is_done()
        try:
            with JobLock(self.aside / "merge.lock", what=str(self.out)):
                if self._is_there():
                    shutil.rmtree(self.aside, ignore_errors=True)
                else:
                    self._remove_leftovers()
                    self._complete()
        except BusyError:
            return self.is_done()
        return True

    def _complete(self) -> None:
        self.finish(self.aside, [read_json(self._done(number)) for number in range(self.num_pieces)])
        with disk_errors(self.out):
            for path in (self.aside / "job.json", *self.aside.glob("*.lock")):
                path.unlink()
            shutil.rmtree(self.aside / "done")
            if self.out.exists():
                self.out.rmdir()
            os.replace(self.aside, self.out)


def begin_work(path: Path, settings: Mapping[str, Any], *, how: str, fix: str) -> None:
    """Write down what decides the pieces of a folder, or compare it with what began them.

    Raises:
        DataError: other settings did, which the message calls `how`.
    """
    if not path.exists():
        write_json(path, settings)
        return
    begun = read_json(path)
    if begun != settings:
        known = begun if isinstance(begun, dict) else {}
        names = [name for name in {**settings, **known} if known.get(name) != settings.get(name)]
        raise DataError(
            f"{path.parent} holds unfinished work {how}",
            found=f"other {', '.join(names) or 'settings'}",
            fix=fix,
        )
