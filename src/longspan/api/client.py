"""Ask an endpoint many things at once, within limits and a budget, and never the same thing twice.

    with Client(Endpoint(model="qwen3-8b", base_url="http://node7:8000/v1"), cache="answers.sqlite") as client:
        for name, result in client.complete((name, ChatRequest(prompt=text)) for name, text in documents):
            ...                                     # in the order in which answers come
        print(client.report().describe())

Requests are an iterator and answers are an iterator: only what is under way is in memory. The network's event loop
runs in a thread of its own, so work done between two answers holds nothing up.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import queue
import random
import threading
import time
from collections.abc import Callable, Coroutine, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from longspan.api.budget import Meter, SpendingLimits
from longspan.api.cache import AnswerCache, request_key
from longspan.api.client_report import ClientReport, Counts
from longspan.api.clock import Clock
from longspan.api.endpoint import Endpoint
from longspan.api.failures import Retry
from longspan.api.limits import Limits, Throttle, usable
from longspan.api.messages import ChatRequest, ChatResult, ParsedAnswer, Usage, estimate_tokens
from longspan.api.protocol import WireProtocol
from longspan.api.providers import PROVIDERS
from longspan.api.transport import Transport
from longspan.core.errors import LongspanError, RunError, UserError
from longspan.core.log import get_logger
from longspan.core.places import load_place

_log = get_logger("api")
_Id = TypeVar("_Id", bound=Hashable)
_NEVER_ANSWERED = 10
"""A job ends when this many requests were rejected, or failed, before or since any was answered."""
_GRACE_SECONDS = 10.0


class _Job:
    """One request on its way."""

    def __init__(self, key: str, request: ChatRequest, body: Mapping[str, Any]) -> None:
        self.key, self.request, self.body = key, request, body
        self.reserved = Usage(request.estimate_prompt_tokens(), request.max_tokens)
        self.on_text: Callable[[str], None] | None = None
        self.streamed: list[str] = []
        self.task: asyncio.Task[Any] | None = None
        self.sent = self.called_off = False


class _Waiting(NamedTuple):
    """A job and the ids of those that asked it."""

    job: _Job
    names: list[Any]


class _Done(NamedTuple):
    """The end of a job: a result, nothing when it was called off, or the error that broke it."""

    job: _Job
    result: ChatResult | None
    error: BaseException | None = None


class Client:
    """Asks one endpoint.

    Raises:
        ConfigError: the key is missing.
        MissingDependencyError: the extra `api` is not installed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        limits: Limits | None = None,
        cache: str | Path | None = None,
        budget: SpendingLimits | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.limits = limits or Limits()
        self._clock = clock or Clock()
        self._protocol: WireProtocol = load_place(f"longspan.api.{PROVIDERS[endpoint.kind].protocol}")()
        self._transport = Transport(
            endpoint, self._protocol, connections=self.limits.concurrency, clock=self._clock
        )
        self._cache = AnswerCache(cache) if cache is not None else None
        self._meter = Meter(budget or SpendingLimits())
        self._counts = Counts()
        # Jitter keeps processes apart, so no two may draw the same: the seed is the machine's.
        self._random = random.Random()
        self._jobs: set[_Job] = set()
        self._fatal: LongspanError | None = None
        self._rejected = self._failed = 0
        self._answered = False
        self._loop = _LoopThread()
        self._loop.run(self._open())
        self._server = (endpoint.address, "" if self._cache is None else self._said(self._cache))

    def _said(self, cache: AnswerCache) -> str:
        """Return what the server says of its model, which is part of what answers are recorded by."""
        endpoint = self.endpoint
        said, before = cache.known_server(
            endpoint.address, endpoint.model, self._loop.run(self._transport.describe())
        )
        if before is not None:
            _log.warning(
                "%s at %s is not what it was when answers were recorded (then %s, now %s): it is asked again",
                *(endpoint.model, endpoint.address, before, said),
            )
        return said

    async def _open(self) -> None:
        self._slots = asyncio.Semaphore(self.limits.concurrency)
        self._throttle = Throttle(self.limits, self._clock)
        await self._transport.open()

    def complete(self, requests: Iterable[tuple[_Id, ChatRequest]]) -> Iterator[tuple[_Id, ChatResult]]:
        """Ask each request; yield its id and result as it is ready, recorded answers at once.

        A request that cannot be answered has a result with `error`; others go on. When the budget is used up, what is
        under way is still yielded, the rest has no result, and `report().stopped` says why. Memory is that of twice
        `concurrency` requests. Leaving the iterator early lets requests under way end, for 10 seconds at most.

        Raises:
            UserError: no request can succeed (bad key, unknown model, no credit); what was under way is yielded
                first.
            RunError: the endpoint has answered nothing for several requests in a row, or asks for too long a pause.
            ArgumentError: a request cannot be asked at this kind of endpoint.
        """
        source = iter(requests)
        finished: queue.SimpleQueue[_Done] = queue.SimpleQueue()
        waiting: dict[str, _Waiting] = {}
        try:
            while self._fatal is None and self._counts.stopped is None:
                asked = sum(len(entry.names) for entry in waiting.values())
                if asked >= 2 * self.limits.concurrency or not finished.empty():
                    yield from self._collect(finished, waiting)
                    continue
                item = next(source, None)
                if item is None:
                    break
                name, request = item
                job = self._job(request)
                known = self._recorded(job)
                if known is not None:
                    yield name, known
                elif job.key in waiting:
                    waiting[job.key].names.append(name)
                else:
                    while (verdict := self._meter.begin(job.reserved)) == "later" and waiting:
                        yield from self._collect(finished, waiting)
                    if verdict != "yes":
                        self._stop("max_cost" if verdict == "later" else verdict)
                        break
                    waiting[job.key] = _Waiting(job, [name])
                    self._start(job, finished)
            while waiting:
                yield from self._collect(finished, waiting)
        finally:
            if waiting:
                self._abandon(finished, [entry.job for entry in waiting.values()])
        if self._fatal is not None:
            raise self._fatal

    def ask(self, request: ChatRequest) -> ChatResult:
        """Ask one request. Raises as `complete`; RunError: the budget is used up."""
        for _, result in self.complete([(0, request)]):
            return result
        raise RunError(f"the request was not sent: {self._counts.stopped} is reached")

    def stream(self, request: ChatRequest, on_text: Callable[[str], None]) -> ChatResult:
        """Ask one request and give its text to `on_text` piece by piece, in the caller's thread.

        An answer that breaks off after its first piece is not asked for again: the result has `error` and the
        text that had come. Raises as `ask`.
        """
        job = self._job(request)
        known = self._recorded(job)
        if known is not None:
            if known.text:
                on_text(known.text)
            return known
        verdict = self._meter.begin(job.reserved)
        if verdict != "yes":
            raise RunError(f"the request was not sent: {verdict} is reached")
        pieces: queue.SimpleQueue[str | _Done] = queue.SimpleQueue()
        job.on_text = pieces.put
        self._start(job, pieces)
        while isinstance(piece := pieces.get(), str):
            on_text(piece)
        if piece.error is not None:
            raise piece.error
        if piece.result is None:
            raise self._fatal or RunError("the request was called off")
        self._counts.result(piece.result)
        return piece.result

    def report(self) -> ClientReport:
        """Return what was done so far."""
        return self._counts.report(self._meter.spent)

    def close(self) -> None:
        """End what is under way and close connections and the file of answers."""
        if self._loop.is_running:
            self._loop.run(self._shut())
            self._loop.stop()
        if self._cache is not None:
            self._cache.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.endpoint.kind} {self.endpoint.model!r} at {self.endpoint.address})"

    # Below: the caller's thread.

    def _job(self, request: ChatRequest) -> _Job:
        body = self._protocol.body(self.endpoint, request)
        return _Job(request_key(self._server, self.endpoint.kind, body, request.sample), request, body)

    def _recorded(self, job: _Job) -> ChatResult | None:
        """Return the result that needs no request: a recorded answer, or that the request cannot be sent."""
        reading = self._cache.get(job.key) if self._cache is not None else None
        if reading is not None:
            result = _result(reading, job.reserved)._replace(cached=True, cost=self._meter.cost(Usage(0, 0)))
        else:
            refused = self._refuse(job)
            if refused is None:
                return None
            result = refused
        self._counts.result(result)
        return result

    def _refuse(self, job: _Job) -> ChatResult | None:
        """Return a result when a request could never be sent: waiting for its turn would be forever."""
        window, per_minute = self.endpoint.max_length, self.limits.tokens_per_minute
        tokens = job.request.estimate_tokens()
        if window is not None and job.request.prompt_tokens is not None and tokens > window:
            detail = (
                f"{job.request.prompt_tokens:,} prompt + {job.request.max_tokens:,} answer tokens; "
                f"the endpoint's window is {window:,}"
            )
            return ChatResult("", error="too long", detail=detail)
        if per_minute is not None and tokens > usable(per_minute):
            detail = (
                f"it may take {tokens:,} tokens; of tokens_per_minute, {per_minute:,}, "
                f"{usable(per_minute):,} are used"
            )
            return ChatResult("", error="rejected", detail=detail)
        return None

    def _start(self, job: _Job, finished: queue.SimpleQueue[Any]) -> None:
        self._jobs.add(job)
        self._loop.start(self._work(job, finished))

    def _collect(
        self, finished: queue.SimpleQueue[_Done], waiting: dict[str, _Waiting]
    ) -> Iterator[tuple[Any, ChatResult]]:
        """Wait for the end of one job and yield its result to all who asked it."""
        done = finished.get()
        names = waiting.pop(done.job.key).names
        if done.error is not None:
            raise done.error
        if done.result is None:
            return
        result = done.result
        for name in names:
            self._counts.result(result)
            yield name, result
            nothing = Usage(0, 0)
            result = result._replace(
                cached=result.error is None, usage=nothing, cost=self._meter.cost(nothing), attempts=0
            )

    def _stop(self, reason: str) -> None:
        self._counts.stopped = reason
        _log.warning("%s is reached: no more requests are begun", reason)

    def _abandon(self, finished: queue.SimpleQueue[_Done], jobs: list[_Job]) -> None:
        """Call off what is not sent and give what is sent some time to be recorded: it is paid for."""
        if not self._loop.is_running:
            return
        self._loop.call(functools.partial(_call_off, jobs))
        end = time.monotonic() + _GRACE_SECONDS
        for _ in jobs:
            try:
                finished.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break

    # Below: the event loop's thread.

    async def _work(self, job: _Job, finished: queue.SimpleQueue[Any]) -> None:
        job.task = asyncio.current_task()
        result: ChatResult | None = None
        failure: BaseException | None = None
        try:
            if self._fatal is None and not job.called_off:
                result = await self._answer(job)
        except asyncio.CancelledError:
            pass
        except LongspanError as error:
            self._give_up(error)
        except BaseException as error:
            failure = error
            raise
        finally:
            self._jobs.discard(job)
            self._meter.end(job.reserved, result.usage if result is not None else Usage(0, 0))
            finished.put(_Done(job, result, failure))

    async def _answer(self, job: _Job) -> ChatResult | None:
        """Make attempts until one succeeds, record the answer, and return it; None: called off meanwhile."""
        attempts = 0
        while True:
            async with self._slots:
                tokens = job.reserved.prompt_tokens + job.reserved.completion_tokens
                ticket = await self._throttle.acquire(tokens)
                self._counts.wait("limited", ticket.waited)
                job.sent = True
                attempts += 1
                self._counts.attempt()
                began = self._clock.now()
                outcome = await self._attempt(job)
                seconds = self._clock.now() - began
                usage = outcome.usage if isinstance(outcome, ParsedAnswer) else None
                if usage is not None:
                    self._throttle.settle(ticket, usage.prompt_tokens + usage.completion_tokens)
                if isinstance(outcome, ParsedAnswer) and outcome.error in (None, "refused"):
                    self._record(job, outcome)
                job.sent = False
            if isinstance(outcome, Retry):
                if job.called_off:
                    return None
                if attempts < self.limits.max_attempts:
                    await self._before_retry(outcome, attempts)
                    continue
                detail = f"{outcome.cause} in the last of {attempts} attempts: {outcome.detail}"
                outcome = ParsedAnswer("", error="failed", detail=detail)
            self._watch(outcome)
            result = _result(outcome, job.reserved)
            return result._replace(attempts=attempts, cost=self._meter.cost(result.usage), seconds=seconds)

    def _record(self, job: _Job, reading: ParsedAnswer) -> None:
        if self._cache is not None:
            self._cache.put(job.key, self.endpoint.model, reading)

    async def _attempt(self, job: _Job) -> ParsedAnswer | Retry:
        if job.on_text is None:
            return await self._transport.ask(job.body, job.request)

        def on_text(piece: str) -> None:
            job.streamed.append(piece)
            assert job.on_text is not None
            job.on_text(piece)

        outcome = await self._transport.stream(job.body, on_text)
        if isinstance(outcome, Retry) and job.streamed:
            detail = f"the answer broke off ({outcome.cause}): {outcome.detail}"
            return ParsedAnswer("".join(job.streamed), error="failed", detail=detail)
        return outcome

    async def _before_retry(self, retry: Retry, attempts: int) -> None:
        """Wait as long as the server asks, all of us, or for a random time that doubles with every attempt."""
        self._counts.retry(retry.cause)
        _log.debug("attempt %d: %s: %s", attempts, retry.cause, retry.detail)
        if retry.after is not None and retry.after > self.limits.max_pause:
            raise RunError(
                f"{self.endpoint.address} asks to wait {retry.after:,.0f} s ({retry.cause})",
                allowed=f"at most {self.limits.max_pause:,.0f} s (max_pause)",
                fix="run again later: recorded answers are not asked for again",
            )
        if retry.after:
            self._throttle.pause(retry.after)
            return
        longest = min(self.limits.backoff_limit, self.limits.backoff_seconds * 2.0 ** (attempts - 1))
        seconds = self._random.uniform(0.0, longest)
        self._counts.wait("backoff", seconds)
        await self._clock.sleep(seconds)

    def _watch(self, reading: ParsedAnswer) -> None:
        """Raise RunError or UserError when nothing but rejections, or nothing at all, comes back."""
        self._failed = self._failed + 1 if reading.error == "failed" else 0
        self._rejected = self._rejected + 1 if reading.error == "rejected" else 0
        self._answered = self._answered or reading.error is None
        if self._failed >= _NEVER_ANSWERED:
            raise RunError(
                f"{self.endpoint.address} has not answered the last {self._failed} requests",
                found=reading.detail,
                fix="run again when it does: recorded answers are not asked for again",
            )
        if self._rejected >= _NEVER_ANSWERED and not self._answered:
            raise UserError(
                f"{self.endpoint.address} has rejected the first {self._rejected} requests",
                found=reading.detail,
            )

    def _give_up(self, error: LongspanError) -> None:
        if self._fatal is None:
            self._fatal = error
            _call_off(list(self._jobs))

    async def _shut(self) -> None:
        tasks = [job.task for job in list(self._jobs) if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.close()


def _call_off(jobs: Iterable[_Job]) -> None:
    """Cancel the jobs that wait for their turn; those that are sent may end, but make no further attempt."""
    for job in jobs:
        job.called_off = True
        if not job.sent and job.task is not None and job.task is not asyncio.current_task():
            job.task.cancel()


def _result(reading: ParsedAnswer, reserved: Usage) -> ChatResult:
    """Return what the caller sees; an answer without usage is estimated from its texts, a failure counts as nothing."""
    usage = reading.usage
    if usage is None:
        answered = reading.error in (None, "refused") and reading.finish is not None
        guess = Usage(reserved.prompt_tokens, estimate_tokens(reading.text), estimated=True)
        usage = guess if answered else Usage(0, 0)
    return ChatResult(
        reading.text,
        reading.finish,
        usage,
        error=reading.error,
        detail=reading.detail,
        logprobs=reading.logprobs,
        thoughts=reading.thoughts,
    )


class _LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="longspan-api", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def start(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.start(work).result()

    def call(self, function: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
