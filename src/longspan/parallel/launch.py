"""Starting the processes of a run, and ending all of them when one is lost.

A run never hangs for longer than its timeout. Three things see to that:

    a rank dies             its peers' collectives fail, at once on gloo; on NCCL their watchdogs end them
    a rank does not answer  its peers' collectives fail after the timeout, or their watchdogs end them
    a rank is stuck         its own watchdog ends it when it has reported no progress for the timeout

Each ends with one message and a non-zero exit.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longspan.core.errors import ArgumentError, LongspanError, RunError
from longspan.core.heartbeat import watched_by
from longspan.core.launched import Launched, is_first, launched
from longspan.core.log import ROOT

__all__ = [
    "PATIENCE",
    "Watchdog",
    "collective_timeout",
    "is_first_process",
    "lost_ranks",
    "on_all_ranks",
    "on_first_rank",
    "process_group",
    "spawn_local",
]

COLLECTIVE_SHARE = {"cpu": 0.9, "cuda": 1.2}
"""How long a collective waits, as a part of the timeout. A gloo collective that fails says what it waited for, so it
comes before the watchdog; NCCL's own ends the process with a dump, so it comes after."""

PATIENCE = timedelta(days=7)
"""Of a group whose collectives the watchdog ends when nothing moves: writing may take longer than the timeout."""

EXIT_SECONDS = 20.0
"""What a failed process has to end by itself before it is ended: NCCL's clean-up may wait for dead ranks."""

Result = TypeVar("Result")

# What torch.distributed says, through a bare RuntimeError, when another process is gone or does not answer.
_LOST = re.compile(
    r"gloo|nccl|closed by peer|connection (reset|refused|was)|broken pipe|timed? ?out|application timeout"
    r"|process group|socket",
    re.IGNORECASE,
)


@contextlib.contextmanager
def process_group(*, timeout_seconds: float, always: bool = False) -> Iterator[torch.device]:
    """Join the other processes that torchrun or srun started, and yield the device of this one.

    Without them this is one process, and there is no group unless `always`. A group that is there already is
    used and left. On ranks other than the first, only warnings are logged. When an exception leaves the block and
    there are other ranks, this process ends, at the latest some seconds later.

    Args:
        timeout_seconds: how long a collective waits for the other ranks, about.
        always: make a group of this process alone too.

    Raises:
        RunError: the other processes do not come.
    """
    started = launched()
    local_rank = started.local_rank if started is not None else 0
    cuda = torch.cuda.is_available()
    if cuda:
        # Where Slurm shows each task its own GPU only, all of them are number 0.
        local_rank %= torch.cuda.device_count()
        torch.cuda.set_device(local_rank)
        if started is not None:
            # transformers puts what --tp shares on this device; srun does not set it.
            os.environ["LOCAL_RANK"] = str(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if dist.is_initialized() or not (started is not None or always):
        yield device
        return
    # Parameters kept in host memory are reduced there, so a GPU run has both.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(seconds=collective_timeout(timeout_seconds, device.type))
    if started is not None:
        with lost_ranks("joining the other processes"):
            store = _store_of_this_attempt(started, timeout)
            address = f"tcp://{started.address}:{started.port}" if started.address is not None else None
            dist.init_process_group(
                backend,
                timeout=timeout,
                store=store,
                init_method=address if store is None else None,
                rank=started.rank,
                world_size=started.world,
            )
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    logger = logging.getLogger(ROOT)
    level = logger.level
    if dist.get_rank() > 0:
        logger.setLevel(logging.WARNING)
    try:
        yield device
    except BaseException:
        if dist.get_world_size() > 1:
            _end_within(EXIT_SECONDS)
        else:
            dist.destroy_process_group()
        raise
    finally:
        logger.setLevel(level)
    dist.destroy_process_group()


def _store_of_this_attempt(started: Launched, timeout: timedelta) -> dist.Store | None:
    """Return where the processes of a node find each other after torchrun has restarted them; None: anywhere.

    torchrun keeps one store for all attempts, in which the addresses of the processes that are gone still stand. On
    several nodes attempts are not counted alike: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, started.world, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextlib.contextmanager
def lost_ranks(doing: str) -> Iterator[None]:
    """Turn the errors of torch.distributed about other processes into one message.

    Raises:
        RunError: another rank is gone or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if not isinstance(error, dist.DistError) and not (lines and _LOST.search(str(error))):
            raise
        place = f"rank {dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else "a rank"
        raise RunError(
            f"{place} lost the others while {doing}: a process has ended or did not answer in time",
            found=lines[0][:300] if lines else type(error).__name__,
            fix="look for the first message of another rank; the same command goes on from the last checkpoint",
        ) from error


def collective_timeout(timeout_seconds: float, device_type: str) -> float:
    """Return how long collectives wait in a run whose watchdog has this timeout."""
    return timeout_seconds * COLLECTIVE_SHARE[device_type]


def is_first_process() -> bool:
    """Return whether this is the process that logs and writes for the run: rank 0, or the only one."""
    return is_first()


def on_first_rank(action: Callable[[], Result], *, group: dist.ProcessGroup | None = None) -> Result:
    """Return what `action` returns on rank 0, on every rank; it runs there alone.

    `group` is one of all ranks, by which they are told; None = the default one.

    Raises:
        LongspanError: what it raised, on every rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    told: list[Any] = [None, None]
    failure: LongspanError | None = None
    if dist.get_rank() == 0:
        try:
            told[0] = action()
        except LongspanError as error:
            failure = error
            told[1] = (type(error), str(error))
    dist.broadcast_object_list(told, src=0, group=group)
    if failure is not None:
        raise failure
    if told[1] is not None:
        kind, message = told[1]
        raise kind(message)
    return told[0]


def on_all_ranks(action: Callable[[], Result], *, group: dist.ProcessGroup | None = None) -> list[Result]:
    """Run `action` on every rank and return what each returned, by rank.

    `group` is one of all ranks that gloo serves; None = the default one.

    Raises:
        LongspanError: what the first rank that failed raised, on every rank.
        RunError: another kind of failure on another rank; on its own rank it is raised as it is.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [action()]
    failure: Exception | None = None
    mine: tuple[Any, type[LongspanError] | None, str] = (None, None, "")
    try:
        mine = (action(), None, "")
    # Whatever the error is, the others have to be told, or they would wait.
    except Exception as error:  # noqa: BLE001
        failure = error
        if isinstance(error, LongspanError):
            mine = (None, type(error), str(error))
        else:
            mine = (None, RunError, f"rank {dist.get_rank()} failed\n  found: {error!r}")
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine, group=group)
    if failure is not None and not isinstance(failure, LongspanError):
        raise failure
    for _, kind, message in told:
        if kind is not None:
            raise kind(message)
    return [value for value, _, _ in told]


class Watchdog:
    """Ends this process with a message when nothing has moved for the timeout.

    What moves: a call of `beat`, one of `core.heartbeat.beat` inside of what was said, and work on the GPU that
    was queued by then and ends, however far ahead the host is.

    with Watchdog(600) as dog:
        for step in range(1000):
            dog.beat(f"step {step}")
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._stop = threading.Event()
        self._since, self._doing = time.monotonic(), "starting"
        self._queued: deque[torch.cuda.Event] = deque()
        # Other threads, which beat too, have another one.
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._inside = contextlib.ExitStack()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="longspan-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._since = time.monotonic()
        self._inside.enter_context(watched_by(self._goes_on))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._inside.close()
        self._stop.set()
        self._thread.join()

    def beat(self, doing: str) -> None:
        """Report that the process is alive and what it does next."""
        self._doing = doing
        self._goes_on()

    def _goes_on(self) -> None:
        self._since = time.monotonic()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._queued.append(event)

    def _look_at_the_gpu(self) -> None:
        """Take note of queued work that has ended; waits for nothing."""
        while self._queued and self._queued[0].query():
            self._queued.popleft()
            self._since = time.monotonic()

    def _watch(self) -> None:
        while True:
            self._look_at_the_gpu()
            left = self._since + self.timeout_seconds - time.monotonic()
            if left <= 0:
                break
            if self._stop.wait(min(left, 1.0)):
                return
        rank = dist.get_rank() if dist.is_initialized() else 0
        sys.stderr.write(
            f"error: rank {rank} has made no progress for {self.timeout_seconds:g} s ({self._doing})\n"
            f"  found: it stands {self._where()}\n"
            "  to mend it: see what the other ranks say, or raise the timeout if one block takes that long\n"
        )
        sys.stderr.flush()
        os._exit(RunError.exit_code)

    def _where(self) -> str:
        frame = sys._current_frames().get(self._watched)
        if frame is None:
            return "outside Python"
        code = frame.f_code
        return f"in {code.co_name}, {code.co_filename}:{frame.f_lineno}"


def _end_within(seconds: float) -> None:
    """End the process with a failure if it has not ended by itself in time."""
    timer = threading.Timer(seconds, os._exit, (RunError.exit_code,))
    timer.daemon = True
    timer.start()


def spawn_local(
    function: Callable[..., Result], world: int, *args: Any, timeout_seconds: float = 300.0
) -> list[Result]:
    """Run `function(rank, *args)` in `world` processes of this machine, joined by gloo on the CPU.

    Args:
        function: a function of a module, so that a new process can import it.
        world: number of processes; each takes some seconds to import torch.
        args: handed to each process; like the results, what multiprocessing can send.
        timeout_seconds: after that long the processes are ended.

    Returns:
        What each rank returned.

    Raises:
        ArgumentError: no process.
        RunError: a rank failed (with its own message), died, or time is up; the others are ended.
    """
    if world < 1:
        raise ArgumentError("at least one process is needed", found=world)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="longspan-") as folder:
        ranks: list[tuple[BaseProcess, Connection]] = []
        try:
            for rank in range(world):
                ours, theirs = context.Pipe()
                process: BaseProcess = context.Process(
                    target=_local_rank,
                    args=(function, rank, world, args, str(Path(folder, "store")), theirs, timeout_seconds),
                    daemon=True,
                )
                process.start()
                theirs.close()
                ranks.append((process, ours))
            return _gather(ranks, time.monotonic() + timeout_seconds)
        finally:
            for started, _ in ranks:
                if started.is_alive():
                    started.kill()
            for started, connection in ranks:
                started.join()
                connection.close()


def _local_rank(
    function: Callable[..., Any],
    rank: int,
    world: int,
    args: Sequence[Any],
    store: str,
    parent: Connection,
    timeout_seconds: float,
) -> None:
    # What torch was told to use (OMP_NUM_THREADS), or all cores, is shared.
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=collective_timeout(timeout_seconds, "cpu")),
        )
        with lost_ranks("computing"):
            result = function(rank, *args)
    # Whatever the error is, the parent has to be told, or it would wait.
    except BaseException as error:  # noqa: BLE001
        parent.send((False, _is_loss(error), _described(error)))
        # Not through destroy_process_group: the peers may be in the middle of something.
        parent.poll(EXIT_SECONDS)
        return
    parent.send((True, False, result))
    # Tensors are sent as shared memory, which is this process' until the parent has looked.
    parent.poll(None)
    dist.destroy_process_group()


def _described(error: BaseException) -> str:
    """Return one message; with the place where it was raised, unless the message is written for users."""
    described = f"{type(error).__name__}: {error}"
    if isinstance(error, LongspanError) or error.__traceback__ is None:
        return described
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{described} ({frame.filename}:{frame.lineno})"


def _is_loss(error: BaseException) -> bool:
    return isinstance(error, RunError) and isinstance(error.__cause__, RuntimeError)


def _gather(ranks: list[tuple[BaseProcess, Connection]], deadline: float) -> list[Any]:
    """Return the results, or raise for the rank that failed first by itself."""
    results: dict[int, Any] = {}
    lost: dict[int, str] = {}
    while len(results) < len(ranks):
        waiting = {rank for rank in range(len(ranks)) if rank not in results and rank not in lost}
        left = deadline - time.monotonic()
        if lost and (not waiting or left <= 0):
            rank = min(lost)
            raise RunError(f"rank {rank} of {len(ranks)} failed", found=lost[rank])
        if left <= 0:
            raise RunError(f"ranks {sorted(waiting)} of {len(ranks)} did not finish in time")
        connections = {ranks[rank][1]: rank for rank in waiting}
        # A rank that lost another is heard only when none is left that could say what happened there.
        ready = wait(list(connections), timeout=min(left, 5.0) if lost else left)
        if lost and not ready:
            deadline = min(deadline, time.monotonic())
        for connection in ready:
            rank = connections[connection]  # type: ignore[index]
            try:
                done, is_loss, value = ranks[rank][1].recv()
            except (EOFError, ConnectionResetError):
                ranks[rank][0].join()
                code = ranks[rank][0].exitcode
                raise RunError(f"rank {rank} of {len(ranks)} died", found=f"exit code {code}") from None
            if done:
                results[rank] = value
            elif is_loss:
                lost[rank] = value
            else:
                raise RunError(f"rank {rank} of {len(ranks)} failed", found=value)
    for _, connection in ranks:
        connection.send(None)
    for process, _ in ranks:
        process.join(EXIT_SECONDS)
    return [results[rank] for rank in range(len(ranks))]
