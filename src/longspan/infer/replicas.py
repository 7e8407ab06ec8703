"""Copies of a model that share out what is asked: each answers its part, the first process has all answers.

    rank     0    1    2    3        two replicas of two processes each (--replicas 2 --cp 2)
    replica  0    0    1    1
    leads    *         *             the first of a replica; that of replica 1 sends its answers to rank 0

All processes hear all requests and divide them alike. Prompts that begin alike stay in one replica where that is less
work, so that what they share is read once.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from longspan.infer.distributed import IDLE, Member
from longspan.infer.requests import Answer, Request, Watched, work_of

_Indexed = tuple[int, Any]


class Replica:
    """This process' part in one of several copies; all ranks call it together, and of each method the same.

    Args:
        member: this process' part of its copy.
        copies: number of replicas; each has as many processes as the others, side by side.
    """

    def __init__(self, member: Member, *, copies: int) -> None:
        self.copies = copies
        self.identity, self.max_length = member.identity, member.max_length
        self._member = member
        size = dist.get_world_size() // copies
        self._number, place = divmod(dist.get_rank(), size)
        self._is_lead = place == 0
        self._leads = range(0, dist.get_world_size(), size)
        # A group of its own: answers come while the replicas' own groups are at work.
        self._answers = dist.new_group(backend="gloo", timeout=IDLE)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Continue each prompt greedily; in the first process all answers, in the others none. See `Answerer`."""
        shares = divide(
            [_ids(request) for request in requests], [each.max_new_tokens for each in requests], self.copies
        )
        yield from self._gather(self._own("generate", requests, shares))

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Measure each given answer after its prompt; answers as of `generate`."""
        answers = [0 if request.answer_ids is None else len(request.answer_ids) for request in requests]
        shares = divide([_ids(request) for request in requests], answers, self.copies)
        yield from self._gather(self._own("score", requests, shares))

    def work_of(self, tokens: int) -> float:
        """Return the work of reading a prompt; see `infer.requests.work_of`."""
        return work_of(self._member, tokens)

    def watch(self, on_share: Callable[[float], None] | None) -> bool:
        """Report progress: the share of this replica's part that is done, about that of all as parts are alike."""
        return isinstance(self._member, Watched) and self._member.watch(on_share)

    def token_nll(self, windows: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Return the losses of windows in the first process, nothing in the others; see `GivesLosses`."""
        # Windows are read whole, whatever they have in common.
        own = divide([np.empty(0, np.int64)] * len(windows), [len(ids) for ids in windows], self.copies)[
            self._number
        ]
        losses = self._member.token_nll([windows[index] for index in own]) if own else []
        found = dict(self._gather(iter(zip(own, losses))))
        return [found[index] for index in range(len(windows))] if dist.get_rank() == 0 else []

    def close(self) -> None:
        """Close this process' part."""
        self._member.close()

    def _own(
        self, method: str, requests: Sequence[Request], shares: Sequence[Sequence[int]]
    ) -> Iterator[_Indexed]:
        """Yield what this replica answers, with the index among all requests."""
        own = shares[self._number]
        if own:
            for index, answer in getattr(self._member, method)([requests[index] for index in own]):
                yield own[index], answer

    def _gather(self, own: Iterator[_Indexed]) -> Iterator[_Indexed]:
        """Yield in the first process what all replicas have, as it comes; the others send what is theirs."""
        if dist.get_rank() == 0:
            yield from self._receive(own)
            return
        for one in own:
            if self._is_lead:
                self._send(one)
        if self._is_lead:
            self._send(None)

    def _send(self, one: _Indexed | None) -> None:
        dist.send_object_list([one], dst=0, group=self._answers)

    def _receive(self, own: Iterator[_Indexed]) -> Iterator[_Indexed]:
        """Yield this replica's answers and those of the others, which threads take in while this one computes.

        Raises:
            RuntimeError: another replica is gone.
        """
        came: queue.SimpleQueue[_Indexed | Exception | None] = queue.SimpleQueue()
        for lead in self._leads[1:]:
            threading.Thread(
                target=self._listen, args=(lead, came), name=f"longspan-{lead}", daemon=True
            ).start()
        working = len(self._leads) - 1

        def others(*, wait: bool) -> Iterator[_Indexed]:
            nonlocal working
            while working and (wait or not came.empty()):
                one = came.get()
                if isinstance(one, Exception):
                    raise one
                if one is None:
                    working -= 1
                else:
                    yield one

        for mine in own:
            yield mine
            yield from others(wait=False)
        yield from others(wait=True)

    def _listen(self, lead: int, came: queue.SimpleQueue[_Indexed | Exception | None]) -> None:
        """Take in what a replica sends until it has no more."""
        received: list[Any] = [None]
        while True:
            try:
                dist.recv_object_list(received, src=lead, group=self._answers)
            except Exception as error:  # noqa: BLE001 - raised again where the answers are wanted
                came.put(error)
                return
            came.put(received[0])
            if received[0] is None:
                return


def divide(prompts: Sequence[NDArray[Any]], answers: Sequence[int], copies: int) -> list[list[int]]:
    """Return the indices that each of several copies gets, so that the one with the most work has little.

    The work of a copy is the tokens that it reads, those at the start of several of its prompts once, and those of its
    answers. Prompts are put in the order of their ids, where those that begin alike stand together, and this order is
    cut: where the least is read twice, for the sake of the same total.
    """
    ids = [np.asarray(prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: (ids[index].astype(">u4").tobytes(), -answers[index]))
    shared = [0, *(_common(ids[left], ids[right]) for left, right in itertools.pairwise(order))]
    alone = [len(ids[index]) + answers[index] for index in order]
    low, high = max(alone, default=0), sum(alone)
    while low < high:  # the least work of the busiest copy with which all is done
        middle = (low + high) // 2
        if len(_cut(alone, shared, middle)) <= copies:
            high = middle
        else:
            low = middle + 1
    pieces = _cut(alone, shared, low)
    shares = [sorted(order[start:end]) for start, end in pieces]
    return shares + [[] for _ in range(copies - len(shares))]


def _cut(alone: Sequence[int], shared: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Return pieces (start, end) of an order, each as long as its work is at most `most`."""
    pieces: list[tuple[int, int]] = []
    start, work = 0, 0
    for place, whole in enumerate(alone):
        more = whole - (shared[place] if place > start else 0)
        if place > start and work + more > most:
            pieces.append((start, place))
            start, work, more = place, 0, whole
        work += more
    return [*pieces, (start, len(alone))] if alone else []


def _common(left: NDArray[Any], right: NDArray[Any]) -> int:
    length = min(len(left), len(right))
    differing = left[:length] != right[:length]
    return int(differing.argmax()) if differing.any() else length


def _ids(request: Request) -> NDArray[Any]:
    return np.empty(0, np.int64) if request.prompt_ids is None else request.prompt_ids
