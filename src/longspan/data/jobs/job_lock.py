"""One job at a time: a lock file that names its holder and outlives no crash.

The file is locked with flock, which ends with the process however it ends. Where machines share a disk and
not its locks, the file's content counts: who holds it, and that it was touched in the last minutes.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from longspan.core.errors import RunError
from longspan.core.files import disk_errors
from longspan.data.jobs import ArrayJob

BEAT_SECONDS = 30.0
STALE_SECONDS = 300.0


def share_lock(folder: Path, share: ArrayJob) -> Path:
    """Return the lock of one job of an array."""
    return folder / f"job-{share.index}-of-{share.count}.lock"


@contextmanager
def hold_share(folder: Path, share: ArrayJob, *, what: str) -> Iterator[None]:
    """Hold the lock of a job; jobs of one array may run side by side, others may not.

    Raises:
        BusyError: this job runs already, or one that is not of this array.
    """
    with JobLock(share_lock(folder, share), what=what):
        for other in sorted(folder.glob("job-*.lock")):
            kin = other.name.endswith(f"-of-{share.count}.lock")
            if not kin and JobLock(other, what=what).is_held():
                raise BusyError(
                    f"another job is at work on {what}",
                    found=f"{other.name} is held",
                    fix="wait for it to end, or choose another --out",
                )
        yield


class BusyError(RunError):
    """Another job holds the lock."""


class JobLock:
    """Held while a `with` block runs. Raises BusyError, naming the holder, where another job holds it."""

    def __init__(self, path: Path, *, what: str) -> None:
        self.path, self._what = path, what
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self._handle = self._lock()
        holder = self._holder()
        if holder and holder.get("host") != socket.gethostname() and self._is_fresh():
            error = self._busy()
            os.close(self._handle)
            raise error
        own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._write(json.dumps(own).encode())
        self._beat = threading.Thread(target=self._touch, daemon=True)
        self._beat.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._beat.join()
        self._write(b"")
        os.close(self._handle)

    def is_held(self) -> bool:
        """Whether another process holds it now; looks, and takes nothing that a job about to start may want."""
        try:
            self._handle = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            holder = self._holder()
            if not holder:
                return False
            if holder.get("host") != socket.gethostname():
                return self._is_fresh()
            fcntl.flock(self._handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(self._handle)

    def _lock(self) -> int:
        while True:
            with disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The job before may have removed the folder after this file was opened.
                if os.stat(self.path).st_ino == os.fstat(self._handle).st_ino:
                    return self._handle
            except BlockingIOError:
                error = self._busy()
                os.close(self._handle)
                raise error from None
            except FileNotFoundError:
                pass
            os.close(self._handle)

    def _write(self, content: bytes) -> None:
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, content, 0)

    def _holder(self) -> dict[str, Any] | None:
        try:
            content = json.loads(os.pread(self._handle, 1000, 0) or b"null")
        except ValueError:
            return None
        return content if isinstance(content, dict) else None

    def _is_fresh(self) -> bool:
        """Whether the holder gave a sign of life lately, by the clock of the disk that all machines share."""
        touched = os.fstat(self._handle).st_mtime
        probe = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with disk_errors(probe):
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
        return now - touched < STALE_SECONDS

    def _busy(self) -> BusyError:
        holder = self._holder() or {}
        known = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
        return BusyError(
            f"another job is at work on {self._what}",
            found=known if holder else "a process of this machine",
            fix="wait for it to end, or choose another --out",
        )

    def _touch(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            os.utime(self._handle)
