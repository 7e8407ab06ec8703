"""Processes of this machine that work with this one, where no launcher has started any.

    peers = Peers(follow, 4, spec)      starts ranks 1..3, each of which calls follow(rank, device, spec)
    ...                                 this process is rank 0, and torch.distributed knows all four
    peers.close()

On GPUs each rank has one, and they communicate by NCCL; else all compute on the CPU, over gloo. A peer that fails
says why and ends. What that breaks here is then explained by its message; should this process wait for it in vain,
it is ended with that message after some seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longspan.core.errors import ArgumentError, LongspanError, RunError
from longspan.parallel.launch import collective_timeout, lost_ranks

__all__ = ["Peers"]

GRACE_SECONDS = 30.0
"""How long this process may go on after a peer has failed: it should notice by itself, but NCCL may not."""


class Peers:
    """Ranks 1 .. world - 1; this process becomes rank 0.

    Args:
        function: called in each peer with its rank, its device and `args`; a function of a module.
        world: processes, this one included.
        args: what multiprocessing can send.
        timeout_seconds: how long a collective waits for the others.

    Raises:
        ArgumentError: fewer GPUs than processes.
        RunError: the peers do not come.
    """

    def __init__(self, function: Callable[..., None], world: int, *args: Any, timeout_seconds: float) -> None:
        if torch.cuda.is_available() and torch.cuda.device_count() < world:
            raise ArgumentError(
                f"{world} processes need a GPU each",
                found=f"{torch.cuda.device_count()} on this machine",
                fix="ask for fewer processes, start them on several machines with torchrun, or compute on the CPU "
                "with CUDA_VISIBLE_DEVICES=",
            )
        context = multiprocessing.get_context("spawn")
        self.world = world
        self._failures: dict[int, str] = {}
        self._noticed, self._closing = threading.Event(), threading.Event()
        self._threads = torch.get_num_threads()
        self._folder = tempfile.TemporaryDirectory(prefix="longspan-")
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        store = str(Path(self._folder.name, "store"))
        threads = max(1, self._threads // world)
        try:
            for rank in range(1, world):
                ours, theirs = context.Pipe()
                process: BaseProcess = context.Process(
                    target=_peer,
                    args=(function, rank, world, args, store, theirs, timeout_seconds, threads),
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._ranks.append((process, ours))
            self._watch = threading.Thread(target=self._listen, name="longspan-peers", daemon=True)
            self._watch.start()
            torch.set_num_threads(threads)
            with lost_ranks("starting the other processes"):
                self.device = _join(0, world, store, timeout_seconds)
        except BaseException:
            self.close()
            raise

    def failure(self, *, wait_seconds: float = 0.0) -> str | None:
        """Return the message of the first peer that failed by itself, waiting for one; None: no peer has failed."""
        deadline = time.monotonic() + wait_seconds
        while not self._failures and time.monotonic() < deadline:
            time.sleep(0.05)
        if not self._failures:
            return None
        self._noticed.set()
        rank = next(iter(self._failures))
        return f"rank {rank} of {self.world}: {self._failures[rank]}"

    def close(self) -> None:
        """End the peers, and this process' part in the group."""
        self._noticed.set()
        self._closing.set()
        for process, _ in self._ranks:
            process.kill()
        for process, connection in self._ranks:
            process.join()
            connection.close()
        self._ranks.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(self._threads)
        self._folder.cleanup()

    def _listen(self) -> None:
        """Read the messages of peers until one fails, and end this process if it does not notice that."""
        by_connection: dict[object, int] = {
            connection: rank for rank, (_, connection) in enumerate(self._ranks, start=1)
        }
        lost: dict[int, str] = {}
        deadline: float | None = None
        while by_connection and not self._failures:
            ready = wait([self._ranks[rank - 1][1] for rank in by_connection.values()], timeout=0.2)
            if self._closing.is_set():
                return
            for connection in ready:
                rank = by_connection.pop(connection)
                try:
                    is_loss, message = self._ranks[rank - 1][1].recv()
                except (EOFError, OSError):
                    is_loss, message = False, "the process ended without a message, as when memory runs out"
                if is_loss:
                    # It lost another process: the message of that one is the cause, if it comes.
                    lost[rank] = message
                    deadline = time.monotonic() + 5.0
                else:
                    self._failures[rank] = message
            if deadline is not None and time.monotonic() > deadline:
                self._failures.update(lost)
        if not self._failures:
            self._failures.update(lost)
        if self._noticed.wait(GRACE_SECONDS):
            return
        sys.stderr.write(f"error: {RunError('another process failed', found=self.failure())}\n")
        sys.stderr.flush()
        os._exit(RunError.exit_code)


def _join(rank: int, world: int, store: str, timeout_seconds: float) -> torch.device:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=collective_timeout(timeout_seconds, device.type)),
    )
    return device


def _peer(
    function: Callable[..., None],
    rank: int,
    world: int,
    args: tuple[Any, ...],
    store: str,
    parent: Connection,
    timeout_seconds: float,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    # What transformers binds a process' device by.
    os.environ["LOCAL_RANK"] = str(rank)
    threading.Thread(target=_end_with, args=(parent,), name="longspan-first", daemon=True).start()
    try:
        device = _join(rank, world, store, timeout_seconds)
        with lost_ranks("computing"):
            function(rank, device, *args)
    # Whatever the error is, the first process has to be told, or it would wait.
    except BaseException as error:  # noqa: BLE001
        is_loss = isinstance(error, RunError) and isinstance(error.__cause__, RuntimeError)
        is_loss = is_loss and not isinstance(error.__cause__, torch.OutOfMemoryError)
        message = str(error) if isinstance(error, LongspanError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # the first process may be gone
            parent.send((is_loss, message))
        sys.stderr.flush()
        # At once, so that others that wait for this rank are told by their connections; not through the
        # clean-up of NCCL, which may wait for them.
        os._exit(RunError.exit_code)
    dist.destroy_process_group()


def _end_with(parent: Connection) -> None:
    """End this process when the first one is gone; in a collective it might wait for that for a long time."""
    with contextlib.suppress(OSError, EOFError):
        parent.recv()  # nothing is ever sent
    os._exit(RunError.exit_code)
