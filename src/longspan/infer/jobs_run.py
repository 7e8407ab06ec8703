"""Jobs on their way through a model: the parts of their prefix tree, what is held of it, and what comes of them.

What reads and writes for them is the engine (`infer.engine`). Parts wait in the order of the tree, and are read when
there is room for them beside what is held, be it that of answers that have ended while others go on:

    held          trunk, a, b      trunk, a, c      trunk, c, d
    written       a b a b a b      a c a c a c      c d c d ...
    b has ended, c is read ----^                ^---- a has ended, d is read
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.infer.jobs import Job, JobOutcome
from longspan.infer.length_rope import fixed_frequencies
from longspan.infer.memory import memory_errors
from longspan.infer.places import StrandPlaces
from longspan.infer.prefix_tree import PrefixTree, Strand
from longspan.infer.states import TreeStates
from longspan.infer.tree_passes import DecodePass

if TYPE_CHECKING:
    from longspan.infer.engine import Engine

FIRST_ROOM = 256
"""Tokens of an answer for which there is room from the start; it doubles when it is full."""
REFILL = 8
"""Beside answers that go on, prompts are read where they fill one part in so many of what may be held: a pass over a
few tokens costs as much as a step of all answers."""
NEARLY_FULL = 8
"""An answer with less than one part in so many left of its room gets more when another has to."""

_END = object()


class JobProgress:
    """The predictions of one job as they arrive."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.argmax_ids = np.zeros(job.wanted, dtype=np.int64)
        self.nll = None if job.targets is None else np.zeros(job.wanted, dtype=np.float32)
        self.generated: list[int] = []
        self.finite = True
        self.missing = job.wanted
        """Predictions that have not come."""
        self.decoded = job.max_new_tokens == 0
        """Whether the answer is all there, if one is generated."""


class Wanted(NamedTuple):
    """A prediction that a pass yields."""

    row: int
    """Of the strand's tokens."""
    job: int
    place: int
    """Among the job's wanted ones."""


class HeldAtOnce(NamedTuple):
    """What is held at once."""

    tokens: int
    states: int
    """Of all layers that have some, together."""

    def with_strands(self, run: JobsRun, strands: Iterable[Strand]) -> HeldAtOnce:
        tokens, states = zip(*((run.room(strand), run.num_states(strand)) for strand in strands))
        return HeldAtOnce(self.tokens + sum(tokens), self.states + sum(states))

    def num_bytes(self, token_bytes: int, state_bytes: int) -> int:
        return self.tokens * token_bytes + self.states * state_bytes


class JobsRun:
    """Jobs on their way: what is held of their tree, and what has come of them.

    Args:
        length: all have the frequencies of RoPE of a prompt of so many tokens.
        sizes: bytes of a token's keys and values, and of a state.
    """

    def __init__(
        self, engine: Engine, jobs: Sequence[Job], tree: PrefixTree, length: int, *, sizes: tuple[int, int]
    ) -> None:
        self.tree, self.sizes = tree, sizes
        self.places = StrandPlaces(engine.kernel, engine.kv_dtype)
        self.states = TreeStates()
        self.progress = [JobProgress(job) for job in jobs]
        self.wanted: dict[Strand, list[Wanted]] = {}
        self.answer_work = 0.0
        """Of a token of an answer, in operations."""
        self._engine, self._length = engine, length
        self._ends: list[Strand] = []
        """The strand that each job ends with; its answer is appended to it."""
        self._ending: dict[Strand, list[int]] = {}
        self._waiting: deque[Strand] = deque()
        """What is to be read, each strand behind its parent."""
        self._trunks: set[Strand] = set()
        """Strands whose branches do not fit beside each other."""
        self._budget = 0
        """Bytes that may be held at once."""
        self._spent = 0.0
        for index, (job, end) in enumerate(zip(jobs, tree.ends)):
            for place in range(job.wanted):
                position = len(job.ids) - job.wanted + place
                holder = end.holder(position)
                self.wanted.setdefault(holder, []).append(Wanted(position - holder.start, index, place))
            self._ends.append(self._answering(job, end))
            self._ending.setdefault(self._ends[index], []).append(index)
        self._tokens: dict[Strand, int] = {}
        """Rows of the subtree of each strand."""
        self._left: dict[Strand, int] = {}
        """Jobs that end in the subtree of each strand and are not done. It is held as long as there are some."""
        for strand in reversed(list(tree.strands())):
            self._tokens[strand] = self.room(strand) + sum(self._tokens[child] for child in strand.children)
            left = sum(self._left[child] for child in strand.children)
            self._left[strand] = left + len(self._ending.get(strand, ()))

    def _answering(self, job: Job, end: Strand) -> Strand:
        """Return the strand that the job ends with, and that its answer is appended to if one is generated."""
        position = len(job.ids)
        if job.max_new_tokens <= 1:
            return end
        if not end.children and self.tree.ends.count(end) == 1:
            return end
        # Other prompts end here or go on from here, so the answer has a strand of its own, with no token of the prompt.
        own = Strand(end, position, end.ids[:0])
        end.children.append(own)
        return own

    def room(self, strand: Strand, said: int | None = None) -> int:
        """Return the rows of a strand, on every rank as many: of its tokens, and of `said` (None: the first) tokens of
        an answer that may be so long.
        """
        jobs = self._ending.get(strand, ())
        # The last token of an answer is not read.
        longest = max((self.progress[job].job.max_new_tokens - 1 for job in jobs), default=0)
        most = self._engine.stripes.most
        if longest <= 0:
            return most(len(strand.ids))
        return _rounded(most(len(strand.ids) + min(longest, FIRST_ROOM if said is None else said)))

    def targets(self, wanted: Wanted) -> int | None:
        """Return the token whose likelihood is asked for."""
        targets = self.progress[wanted.job].job.targets
        return None if targets is None else int(targets[wanted.place])

    def take(self, job: int, token: int) -> bool:
        """Note a generated token; return whether the answer goes on."""
        progress = self.progress[job]
        progress.generated.append(token)
        push = progress.job.push
        ended = bool(push(token)) if push is not None else False
        full = len(progress.generated) >= progress.job.max_new_tokens
        progress.decoded = ended or full or not progress.finite
        return not progress.decoded

    def begin(self, limit: int) -> float:
        """Begin, with at most `limit` tokens of branches side by side; return the work of all, in operations.

        That is what is read, and as many steps as the longest answer of each batch takes, shared out among all tokens
        that are to be generated.
        """
        self._budget = self.most_held(limit).num_bytes(*self.sizes)
        steps = 0
        for batch, opened in self._all_batches(limit):
            strands = batch if opened else [strand for top in batch for strand in _below(top)]
            steps += max(
                (self._steps(job) for strand in strands for job in self._ending.get(strand, ())), default=0
            )
            if opened:
                self._trunks.update(batch)
        self._waiting.extend(self.tree.strands())
        share = self._engine.share
        reading = sum(share.reading(strand.start, len(strand.ids)) for strand in self.tree.strands())
        writing = share.steps(steps)
        self.answer_work = writing / max(1, sum(map(self._steps, range(len(self.progress)))))
        return reading + writing

    def _steps(self, job: int) -> int:
        """Return how many tokens of an answer are still to be generated behind its first, at most."""
        progress = self.progress[job]
        return max(0, progress.job.max_new_tokens - max(1, len(progress.generated)))

    def outcomes(self) -> Iterator[tuple[int, JobOutcome]]:
        """Read and write; yield the outcome of each job as it is done."""
        stretches, left, going_on = self._stretches(), list(range(len(self.progress))), True
        while going_on:
            started = time.monotonic()
            # Nothing is yielded in here: between two answers the model is as its owner knows it.
            with fixed_frequencies(self._engine.model, self._length):
                going_on = next(stretches, _END) is not _END
            self._spent += time.monotonic() - started
            done = [job for job in left if self.progress[job].decoded and not self.progress[job].missing]
            if done:
                left = [job for job in left if job not in done]
                share, self._spent = self._spent / len(done), 0.0
            for job in done:
                self._release(job)
                yield job, self._outcome(job, share)

    def _stretches(self) -> Iterator[None]:
        """Read and write to the end, stopping after each pass over prompts, and where answers have ended."""
        live: list[tuple[int, Strand]] = []
        while self._waiting or live:
            while strands := self._next(beside=bool(live)):
                self._hold(strands)
                yield from self._engine.prefill(self, strands)
                ending = [(job, strand) for strand in strands for job in self._ending.get(strand, ())]
                live += [
                    (job, strand)
                    for job, strand in ending
                    if self.progress[job].job.max_new_tokens > 0
                    and self.take(job, int(self.progress[job].argmax_ids[-1]))
                ]
                yield
            if live:
                live = self._engine.decode(self, live)
                yield

    def _next(self, *, beside: bool) -> list[Strand]:
        """Return what is read next, as much as there is room for: a trunk, or other strands.

        `beside`: answers go on. Then nothing is returned before there is room for much of what waits; see `REFILL`.
        """
        held = sum(map(self._bytes, self.places.of))
        room = found = 0
        for strand in self._waiting:
            wider = room + self._bytes(strand)
            if held + wider > self._budget and (beside or found):
                break
            room, found = wider, found + 1
        trunks = sum(self._bytes(strand) for strand in self._trunks if strand in self.places.of)
        if found == 0 or (beside and found < len(self._waiting) and room * REFILL < self._budget - trunks):
            return []
        strands = [self._waiting.popleft()]
        while len(strands) < found and not self._trunks & {strands[0], self._waiting[0]}:
            strands.append(self._waiting.popleft())
        return strands

    def _bytes(self, strand: Strand) -> int:
        """Return the bytes that a strand takes, or will take from the start."""
        place = self.places.of.get(strand)
        room = self.room(strand) if place is None else place.room
        return HeldAtOnce(room, self.num_states(strand)).num_bytes(*self.sizes)

    def _hold(self, strands: Sequence[Strand]) -> None:
        """Give places to what is read next."""
        rooms = {strand: self.room(strand) for strand in strands}
        doing = memory_errors(self._engine.model.device, doing="room is made for more prompts")
        with torch.inference_mode(), doing:
            if strands[0] in self._trunks:
                self.places.hold_alone(*rooms.popitem())
            else:
                self.places.hold(rooms)

    def _release(self, job: int) -> None:
        """Release what was held for a job alone."""
        self._engine.share.done(self._steps(job) * self.answer_work)  # its answer ended before it had to
        strand: Strand | None = self._ends[job]
        while strand is not None:
            self._left[strand] -= 1
            if not self._left[strand]:
                self.places.release(strand)
                self.states.drop(strand)
            strand = strand.parent

    def _batches(self, siblings: Sequence[Strand], limit: int) -> Iterator[tuple[list[Strand], bool]]:
        """Yield (subtrees to be read together, False), or ([strand to be read before its branches], True)."""
        batch: list[Strand] = []
        size = 0
        for strand in sorted(siblings, key=lambda strand: strand.start):
            tokens = self._tokens[strand]
            if tokens > limit and strand.children:
                yield [strand], True
                continue
            if batch and size + tokens > limit:
                yield batch, False
                batch, size = [], 0
            batch.append(strand)
            size += tokens
        if batch:
            yield batch, False

    def most_held(self, limit: int) -> HeldAtOnce:
        """Return what is held at once at most, if batches have at most `limit` tokens; answers that grow take more."""
        found = [HeldAtOnce(0, 0)]
        waiting: list[tuple[Sequence[Strand], HeldAtOnce]] = [(self.tree.roots, HeldAtOnce(0, 0))]
        while waiting:
            siblings, held = waiting.pop()
            for batch, opened in self._batches(siblings, limit):
                if opened:
                    waiting.append((batch[0].children, held.with_strands(self, batch)))
                else:
                    below = [strand for top in batch for strand in _below(top)]
                    found.append(held.with_strands(self, below))
        return max(found, key=lambda held: held.num_bytes(*self.sizes))

    def num_states(self, strand: Strand) -> int:
        """Return how many states of a layer are held of a strand: at its forks, its end, and of an answer's step."""
        answers = any(self.progress[job].job.max_new_tokens > 1 for job in self._ending.get(strand, ()))
        # The step's own beside the one before it.
        return len(self.states.forks(strand)) + (3 if answers else 1)

    def _all_batches(self, limit: int) -> Iterator[tuple[list[Strand], bool]]:
        """Yield all batches of the tree as `_batches` does."""
        waiting: list[Sequence[Strand]] = [self.tree.roots]
        while waiting:
            for batch, opened in self._batches(waiting.pop(), limit):
                if opened:
                    waiting.append(batch[0].children)
                yield batch, opened

    def decoding(self, live: Sequence[tuple[int, Strand]]) -> DecodePass:
        """Return the table for the next steps of some answers."""
        strands, engine = [strand for _, strand in live], self._engine
        return DecodePass(strands, self.places.of, self.states, engine.kernel, engine.stripes)

    def said(self, live: Sequence[tuple[int, Strand]]) -> NDArray[np.int64]:
        """Return how many tokens of each answer have been read; one more is to be."""
        return np.array([len(self.progress[job].generated) for job, _ in live], dtype=np.int64) - 1

    def make_room(self, live: Sequence[tuple[int, Strand]]) -> bool:
        """Let each answer have room for its next token; return whether anything was moved."""
        most, full, rooms = self._engine.stripes.most, False, {}
        for (_, strand), count in zip(live, self.said(live).tolist()):
            needed, room = most(len(strand.ids) + count + 1), self.places.of[strand].room
            full |= needed > room
            if needed > room - room // NEARLY_FULL:
                rooms[strand] = self.room(strand, 2 * (count + 1))
        if full:
            self.places.hold(
                {strand: room for strand, room in rooms.items() if room > self.places.of[strand].room}
            )
        return full

    def side_by_side(self, live: Sequence[tuple[int, Strand]]) -> list[tuple[int, Strand]]:
        """Return answers in the order of their places, of which those of one size are next to each other."""
        self.places.close_gaps(strand for _, strand in live)
        return sorted(live, key=lambda each: self.places.of[each[1]].row)

    def _outcome(self, job: int, seconds: float) -> JobOutcome:
        progress = self.progress[job]
        ids = progress.argmax_ids
        if progress.job.max_new_tokens:
            ids = np.array(progress.generated, dtype=np.int64)
        return JobOutcome(ids, progress.nll, progress.finite, seconds)


def _rounded(room: int) -> int:
    """Return room for some more rows, so that many answers have as much: places at an even distance are read together.

    At most a quarter more, and 16.
    """
    step = max(16, 1 << max(0, room.bit_length() - 3))
    return -(-room // step) * step


def _below(top: Strand) -> Iterator[Strand]:
    """Yield a strand and all that leave it, each behind its parent."""
    return PrefixTree([top], []).strands()
