"""Several processes that answer as one: the first is asked, the others do what it does.

    rank 0     asked -> tells the others (method, requests) -> runs its part -> answers
    others     follow: hear, run their part, hear the next, until told to close

Under torchrun or srun these are the processes given; otherwise the first starts the others on this machine
(`parallel.peers`). What goes wrong on one rank ends all of them with one message: a process that fails closes its
connections, and what the others then lack makes them fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError, RunError
from longspan.core.launched import launched
from longspan.infer.memory import memory_errors
from longspan.infer.requests import Answer, Answerer, Request, Watched, copies_of, work_of
from longspan.parallel.launch import lost_ranks, process_group
from longspan.parallel.peers import Peers

TIMEOUT_SECONDS = 3600.0
"""How long a rank waits for the others in the middle of something."""
IDLE = timedelta(days=30)
"""How long followers wait for something to do."""
LAST_WORDS_SECONDS = 10.0


@runtime_checkable
class GivesLosses(Protocol):
    """Gives the losses of whole windows of tokens; models that are run here do, servers do not."""

    def token_nll(self, windows: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Return the n - 1 losses in nats of each window of n token ids."""
        ...


class Member(Answerer, GivesLosses, Protocol):
    """One rank's part of a model; all ranks call the same methods with the same arguments."""


Build = Callable[[torch.device, Any], Member]
"""Makes a rank's part from its device and what it was told; a function of a module."""


def join_ranks(world: int, build: Build, spec: Any) -> Leader:
    """Return the model of `world` processes, in the first of them; the others work until it is closed.

    Under torchrun the others end here, with SystemExit.

    Args:
        world: number of processes.
        build: all ranks call it together, with their device and `spec`.
        spec: can be sent to another process.

    Raises:
        ArgumentError: another number of processes was started.
        RunError: another process failed.
        LongspanError: what `build` raises.
    """
    started = launched()
    if started is None:
        peers = Peers(_follow_here, world, build, spec, timeout_seconds=TIMEOUT_SECONDS)
        return _lead(peers.device, build, spec, end=lambda broken: peers.close(), explain=peers.failure)
    if started.world != world:
        raise ArgumentError(
            "the processes that were started are not those asked for",
            found=f"{started.world} processes",
            allowed=f"--replicas x --cp x --tp = {world}",
        )
    stack = contextlib.ExitStack()
    device = stack.enter_context(process_group(timeout_seconds=TIMEOUT_SECONDS))
    if started.rank == 0:
        return _lead(device, build, spec, end=partial(_leave, stack), explain=lambda wait_seconds: None)
    with stack:
        follow(device, build, spec)
    raise SystemExit(0)


def _leave(stack: contextlib.ExitStack, broken: bool) -> None:
    """Leave the group; after a failure in the way that cannot hang."""
    if not broken:
        stack.close()
        return
    failure = RunError("the processes are not all there")
    with contextlib.suppress(RunError):
        stack.__exit__(RunError, failure, None)


def follow(device: torch.device, build: Build, spec: Any) -> None:
    """Do what the first rank says until it is done.

    Raises:
        RunError: the first rank, or another, is gone.
    """
    orders = _orders()
    with lost_ranks("answering"), memory_errors(device, doing=f"answering on rank {dist.get_rank()}"):
        member = build(device, spec)
        while True:
            order: list[Any] = [None]
            dist.broadcast_object_list(order, src=0, group=orders)
            method, argument = order[0]
            if method == "close":
                member.close()
                return
            for _ in getattr(member, method)(argument):
                pass


def is_first_rank() -> bool:
    """Return whether this process is the one that is asked, be it alone or not."""
    return not dist.is_initialized() or dist.get_rank() == 0


class Leader:
    """The first rank, which is asked for all; see `join_ranks`."""

    def __init__(
        self,
        member: Member,
        device: torch.device,
        orders: dist.ProcessGroup,
        *,
        end: Callable[[bool], None],
        explain: Callable[..., str | None],
    ) -> None:
        self._member, self._device, self._orders = member, device, orders
        self._end, self._explain = end, explain
        self._broken = False

    @property
    def identity(self) -> Any:
        """What the header of records says of the model."""
        return self._member.identity

    @property
    def max_length(self) -> int | None:
        """Tokens that prompt and answer may have together; None: no limit."""
        return self._member.max_length

    @property
    def copies(self) -> int:
        """How many requests are answered at the same time; see `infer.requests.copies_of`."""
        return copies_of(self._member)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Continue each prompt greedily; see `Answerer`."""
        yield from self._together("generate", list(requests))

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Measure each given answer after its prompt; see `Answerer`."""
        yield from self._together("score", list(requests))

    def work_of(self, tokens: int) -> float:
        """Return the work of reading a prompt; see `infer.requests.work_of`."""
        return work_of(self._member, tokens)

    def watch(self, on_share: Callable[[float], None] | None) -> bool:
        """Report progress: the share of a call's work that is done, where this rank's part says so; see `Watched`."""
        return isinstance(self._member, Watched) and self._member.watch(on_share)

    def token_nll(self, windows: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Return the losses of windows; see `GivesLosses`."""
        return list(self._together("token_nll", list(windows)))

    def close(self) -> None:
        """Let the other processes end. A model that was left in the middle of something cannot go on."""
        try:
            if not self._broken:
                with self._explained():
                    self._order("close", None)
                self._member.close()
        finally:
            self._end(self._broken)

    def _order(self, method: str, argument: Any) -> None:
        if self._broken:
            raise RunError("a model of several processes cannot go on after a failure", fix="open it again")
        dist.broadcast_object_list([(method, argument)], src=0, group=self._orders)

    def _together(self, method: str, argument: Any) -> Iterator[Any]:
        with self._explained():
            self._order(method, argument)
            found = iter(getattr(self._member, method)(argument))
        while True:
            with self._explained():
                try:
                    one = next(found)
                except StopIteration:
                    return
            try:
                yield one
            except BaseException:
                # Whoever asked has left; the other ranks are still at it.
                self._broken = True
                raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise what another rank said when it failed, instead of what that broke here."""
        try:
            with lost_ranks("answering"), memory_errors(self._device, doing="answering on rank 0"):
                yield
        except BaseException as error:
            # An interrupt too: the other ranks are still at it, and would not hear an order to end.
            self._broken = True
            lost = isinstance(error, RunError) and isinstance(error.__cause__, dist.DistError | RuntimeError)
            lost = lost and not isinstance(error.__cause__, torch.OutOfMemoryError)
            said = self._explain(wait_seconds=LAST_WORDS_SECONDS) if lost else None
            if said is not None:
                raise RunError("a process that shares the model failed", found=said) from error
            raise


def _lead(
    device: torch.device,
    build: Build,
    spec: Any,
    *,
    end: Callable[[bool], None],
    explain: Callable[..., str | None],
) -> Leader:
    try:
        orders = _orders()
        with lost_ranks("loading the model"), memory_errors(device, doing="loading the model on rank 0"):
            member = build(device, spec)
        return Leader(member, device, orders, end=end, explain=explain)
    except BaseException as error:
        said = explain(wait_seconds=LAST_WORDS_SECONDS) if isinstance(error, RunError) else None
        end(True)
        if said is not None:
            raise RunError("a process that shares the model failed", found=said) from error
        raise


def _orders() -> dist.ProcessGroup:
    """Return the group that orders are given through; all ranks call it."""
    return dist.new_group(backend="gloo", timeout=IDLE)


def _follow_here(rank: int, device: torch.device, build: Build, spec: Any) -> None:
    from longspan.models.hf import without_bars

    with without_bars():
        follow(device, build, spec)
