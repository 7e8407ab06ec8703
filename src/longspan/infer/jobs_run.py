"""Jobs on their way through a model: the batches of their prefix tree, what is held of it, and what comes of them.

What reads and writes for them is the engine (`infer.engine`).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.infer.jobs import Job, JobOutcome
from longspan.infer.kv import KvBlock, StrandPlace
from longspan.infer.length_rope import fixed_frequencies
from longspan.infer.prefix_tree import PrefixTree, Strand
from longspan.infer.states import TreeStates
from longspan.infer.tree_passes import DecodePass

if TYPE_CHECKING:
    from longspan.infer.engine import Engine

FIRST_ROOM = 256
"""Tokens of an answer for which there is room from the start; it doubles when it is full."""

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
    """Jobs on their way: what is held of their tree, and what has come of them."""

    def __init__(self, engine: Engine, jobs: Sequence[Job], tree: PrefixTree, length: int) -> None:
        self.tree = tree
        self.places: dict[Strand, StrandPlace] = {}
        self.states = TreeStates()
        self.progress = [JobProgress(job) for job in jobs]
        self.wanted: dict[Strand, list[Wanted]] = {}
        self.limit = 0
        self._engine, self._length = engine, length
        self._ending: dict[Strand, list[int]] = {}
        self._spent = 0.0
        for index, (job, end) in enumerate(zip(jobs, tree.ends)):
            for place in range(job.wanted):
                position = len(job.ids) - job.wanted + place
                holder = end.holder(position)
                self.wanted.setdefault(holder, []).append(Wanted(position - holder.start, index, place))
            self._ending.setdefault(self._answering(job, end), []).append(index)
        self._tokens = self._count()

    def _answering(self, job: Job, end: Strand) -> Strand:
        """Return the strand that the job ends with, and that its answer is appended to if one is generated."""
        position = len(job.ids)
        if job.max_new_tokens <= 1:
            return end
        if position == end.end and not end.children and end not in self._ending:
            return end
        # Other prompts go on from here, so the answer has a strand of its own, with no token of the prompt.
        own = Strand(end, position, end.ids[:0])
        end.children.append(own)
        return own

    def _count(self) -> dict[Strand, int]:
        """Return for each strand the rows of its subtree."""
        found: dict[Strand, int] = {}
        for strand in reversed(list(self.tree.strands())):
            found[strand] = self.room(strand) + sum(found[child] for child in strand.children)
        return found

    def room(self, strand: Strand) -> int:
        """Return the rows of a strand, on every rank as many: of its tokens, and of an answer's first ones."""
        said = max((self.progress[job].job.max_new_tokens for job in self._ending.get(strand, ())), default=0)
        # The last token of an answer is not read.
        most = self._engine.stripes.most
        return (
            most(len(strand.ids))
            if said <= 1
            else _rounded(most(len(strand.ids) + min(said - 1, FIRST_ROOM)))
        )

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

    def steps(self, jobs: Iterable[int]) -> int:
        """Return the steps of decoding that the answers of some jobs take at most."""
        return max(max((self.progress[job].job.max_new_tokens for job in jobs), default=0) - 1, 0)

    def work(self) -> float:
        """Return the work that is to be done, in operations: of what is read, and of the steps of decoding."""
        share = self._engine.share
        total = sum(share.reading(strand.start, len(strand.ids)) for strand in self.tree.strands())
        for batch, opened in self._all_batches(self.limit):
            strands = batch if opened else [strand for top in batch for strand in _below(top)]
            total += share.steps(
                self.steps(job for strand in strands for job in self._ending.get(strand, ()))
            )
        return total

    def branches(self, siblings: Sequence[Strand]) -> Iterator[tuple[int, JobOutcome]]:
        """Answer the jobs of subtrees whose ancestors have been read."""
        for batch, opened in self._batches(siblings, self.limit):
            strands = batch if opened else [strand for top in batch for strand in _below(top)]
            with self._held(strands):
                yield from self._read(strands)
                if opened:
                    yield from self.branches(batch[0].children)

    def _read(self, strands: Sequence[Strand]) -> Iterator[tuple[int, JobOutcome]]:
        """Read strands and write the answers of the jobs that end with them; yield each as it is done."""
        ending = [(job, strand) for strand in strands for job in self._ending.get(strand, ())]
        answering = [each for each in ending if self.progress[each[0]].job.max_new_tokens > 0]
        engine, left, going_on = self._engine, [job for job, _ in ending], True
        steps = itertools.chain(engine.prefill(self, strands), engine.decode(self, answering))
        while going_on:
            started = time.monotonic()
            # Nothing is yielded in here: between two answers the model is as its owner knows it.
            with fixed_frequencies(engine.model, self._length):
                going_on = next(steps, _END) is not _END
            self._spent += time.monotonic() - started
            done = [job for job in left if self.progress[job].decoded and not self.progress[job].missing]
            if done:
                left = [job for job in left if job not in done]
                share, self._spent = self._spent / len(done), 0.0
            for job in done:
                yield job, self._outcome(job, share)

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

    def most_held(self, limit: int, token_bytes: int, state_bytes: int) -> HeldAtOnce:
        """Return what is held at once at most, if batches have at most `limit` tokens."""
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
        return max(found, key=lambda held: held.num_bytes(token_bytes, state_bytes))

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

    @contextlib.contextmanager
    def _held(self, strands: Sequence[Strand]) -> Iterator[None]:
        """Give strands their places in a new block, those of one size together, and take them back."""
        rooms = {strand: self.room(strand) for strand in strands}
        block, row = KvBlock(sum(rooms.values()), self._engine.kernel, self._engine.kv_dtype), 0
        for strand in sorted(strands, key=rooms.__getitem__):
            self.places[strand] = StrandPlace(block, row, rooms[strand])
            row += rooms[strand]
        try:
            yield
        finally:
            for strand in strands:
                del self.places[strand]
                self.states.drop(strand)

    def decoding(self, live: Sequence[tuple[int, Strand]]) -> DecodePass:
        """Return the table for the next steps of some answers."""
        strands, engine = [strand for _, strand in live], self._engine
        return DecodePass(strands, self.places, self.states, engine.kernel, engine.stripes)

    def said(self, live: Sequence[tuple[int, Strand]]) -> NDArray[np.int64]:
        """Return how many tokens of each answer have been read; one more is to be."""
        return np.array([len(self.progress[job].generated) for job, _ in live], dtype=np.int64) - 1

    def make_room(self, live: Sequence[tuple[int, Strand]]) -> bool:
        """Let each answer have room for its next token; return whether anything was moved."""
        most = self._engine.stripes.most
        full = {
            strand
            for (_, strand), count in zip(live, self.said(live).tolist())
            if most(len(strand.ids) + count + 1) > self.places[strand].room
        }
        if not full:
            return False
        block = self.places[live[0][1]].block
        rooms = {strand: place.room for strand, place in self.places.items() if place.block is block}
        for strand in full:
            rooms[strand] = _rounded(2 * rooms[strand] - most(len(strand.ids)))
        moves, row = [], 0
        for strand in sorted(rooms, key=rooms.__getitem__):
            place = self.places[strand]
            moves.append((place.row, row, place.room))
            self.places[strand] = StrandPlace(block, row, rooms[strand])
            row += rooms[strand]
        block.move(row, moves)
        return True

    def side_by_side(self, live: Iterable[tuple[int, Strand]]) -> list[tuple[int, Strand]]:
        """Return answers in the order of their places, of which those of one size are next to each other.

        An answer that is done changes places with the last of its size that goes on.
        """
        jobs = {strand: job for job, strand in live}
        sizes: dict[tuple[int, int], list[Strand]] = {}
        for strand, (block, _, room) in self.places.items():
            sizes.setdefault((id(block), room), []).append(strand)
        for strands in sizes.values():
            strands.sort(key=lambda strand: self.places[strand].row)
            going_on = sum(strand in jobs for strand in strands)
            ended = [strand for strand in strands[:going_on] if strand not in jobs]
            for strand, other in zip(ended, (each for each in strands[going_on:] if each in jobs)):
                mine, its = self.places[strand], self.places[other]
                mine.block.exchange(mine.row, its.row, mine.room)
                self.places[strand], self.places[other] = its, mine
        return [(jobs[strand], strand) for strand in sorted(jobs, key=lambda strand: self.places[strand].row)]

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
