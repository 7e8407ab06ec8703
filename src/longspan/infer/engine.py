"""Runs sequences that begin alike: what they share is read once, and answers are generated side by side.

    tree        every token of the sequences stands in it once              (infer.prefix_tree)
    batch       subtrees whose keys are held at once, at most `cache_tokens`
    pass        at most `batch_tokens` tokens of a batch in one forward pass, each batch front to end
    decoding    one forward pass a step for all answers of a batch          (infer.kv)

A subtree that is too large for a batch is opened: its trunk is read and kept, its branches go on in batches, and then
the trunk is released. So memory is that of the longest trunk and one batch. Logits exist at the positions that are
asked for.

Shape legend: T = tokens of a pass, A = positions asked for, D = model width, V = vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from longspan.core.log import log_once
from longspan.infer.flops import ModelFlops
from longspan.infer.jobs import Counters, Job, JobOutcome
from longspan.infer.kv import DecodePass, KvBlock, PrefillPass, Segment, StrandPlace
from longspan.infer.length_rope import fixed_frequencies
from longspan.infer.memory import (
    LOGIT_ROWS,
    available_memory,
    cache_bytes_per_token,
    dense_bytes,
    memory_errors,
    pass_bytes,
    refuse_excess,
)
from longspan.infer.packed import inference
from longspan.infer.prefix_tree import PrefixTree, Strand, build_tree
from longspan.infer.share import Share
from longspan.infer.states import TreeStates
from longspan.kernels.attention import choose_kernel
from longspan.kernels.head import predict
from longspan.models.head import backbone, output_head

CPU_PASS_TOKENS = 2048
"""Tokens of a pass at most on a CPU: activations of more leave its cache, which makes 16,384 a fifth slower."""
CACHE_PASSES = 4
"""A batch holds the keys of so many full passes, where nothing else is asked for."""
FIRST_ROOM = 256
"""Tokens of an answer for which there is room from the start; it doubles when it is full."""

_END = object()


class _Progress:
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


class _Wanted(NamedTuple):
    """A prediction that a pass yields."""

    row: int
    """Of the strand's tokens."""
    job: int
    place: int
    """Among the job's wanted ones."""


class Engine:
    """Reads and continues sequences.

    Args:
        model: with longspan's attention; nothing about it is changed.
        batch_tokens: tokens of a forward pass at most; on a CPU no more than `CPU_PASS_TOKENS`.
        cache_tokens: tokens of branches whose keys are held at once; None = `CACHE_PASSES` full passes, fewer where
            memory is short.
        available: tells the free bytes of a device; None: no limit. All ranks have to be told the same.

    Raises:
        ArgumentError: a model with layers behind its last hidden states; see `models.head`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_tokens: int,
        cache_tokens: int | None = None,
        available: Callable[[torch.device], int | None] = available_memory,
    ) -> None:
        self.counters = Counters()
        self.share = Share(model)
        """Told while `run` reads and writes, how much of its work is done."""
        self.model, self._batch_tokens, self._cache_tokens = model, batch_tokens, cache_tokens
        self._available = available
        self._pass_tokens = batch_tokens
        if model.device.type == "cpu":
            self._pass_tokens = min(batch_tokens, CPU_PASS_TOKENS)
        self._head = output_head(model)
        self._flops = ModelFlops.of(model.config)
        self.kernel = choose_kernel(model.device)

    @property
    def flops(self) -> float:
        """Floating-point operations of all forward passes so far; a multiplication and an addition are two."""
        counters = self.counters
        return (
            self._flops.per_token * counters.tokens
            + self._flops.per_logit_row * counters.logit_rows
            + counters.attention_flops
        )

    def run(self, jobs: Sequence[Job], *, length: int) -> Iterator[tuple[int, JobOutcome]]:
        """Yield (index of the job, outcome) as each is done.

        The frequencies of RoPE are those of a prompt of `length` tokens (`infer.length_rope`).

        Raises:
            RunError: not enough memory, before anything is run or on the way.
        """
        if not jobs:
            return
        run = _JobsRun(self, jobs, build_tree([job.ids for job in jobs]), length)
        run.limit = self._check_memory(run)
        self.share.begin(run.work())
        yield from run.branches(run.tree.roots)

    def _check_memory(self, run: _JobsRun) -> int:
        """Return how many tokens of branches are held at once."""
        device = self.model.device
        available = self._available(device)
        limit = CACHE_PASSES * self._batch_tokens if self._cache_tokens is None else self._cache_tokens
        if available is None:
            return limit
        cache_bytes = cache_bytes_per_token(self.model, upcasts=self.kernel.upcasts)
        total = sum(len(strand.ids) for strand in run.tree.strands())
        activations = pass_bytes(self.model, min(self._pass_tokens, total)) + dense_bytes(self.model, total)
        while True:
            held = run.most_held(limit)
            if held * cache_bytes + activations <= available:
                return limit
            if limit <= 1:
                break
            limit //= 2
            log_once("infer", "memory is short: fewer branches of a shared prefix are read at once")
        refuse_excess(
            cache_tokens=held,
            cache_bytes=cache_bytes,
            activations=activations,
            available=available,
            device=device,
        )
        return limit

    def prefill(self, run: _JobsRun, strands: Sequence[Strand]) -> Iterator[None]:
        """Read the tokens of strands, parents first, in passes; yield after each."""
        segments: list[Segment] = []
        room = self._pass_tokens
        for strand in strands:
            first = 0
            while first < len(strand.ids):
                last = min(len(strand.ids), first + room)
                segments.append(Segment(strand, first, last))
                room -= last - first
                first = last
                if room == 0:
                    self._prefill_pass(run, segments)
                    yield
                    segments, room = [], self._pass_tokens
        if segments:
            self._prefill_pass(run, segments)
            yield

    def _prefill_pass(self, run: _JobsRun, segments: Sequence[Segment]) -> None:
        device = self.model.device
        documents = PrefillPass(segments, run.places, run.states, self.kernel)
        wanted = [
            (offset + each.row - first, each)
            for (strand, first, last), offset in zip(segments, documents.offsets.tolist())
            for each in run.wanted.get(strand, ())
            if first <= each.row < last
        ]
        with inference(self.model), memory_errors(device, doing=f"{documents.num_tokens:,} tokens are read"):
            hidden_TD = self._hidden(documents.ids(), documents)
            for start in range(0, len(wanted), LOGIT_ROWS):
                part = wanted[start : start + LOGIT_ROWS]
                rows_A = torch.tensor([row for row, _ in part], device=device)
                self._predict(hidden_TD[rows_A], run, [each for _, each in part])
        self.counters.attention_flops += documents.attention_flops
        for strand, first, last in segments:
            self.share.done(self.share.reading(strand.start + first, last - first))

    def decode(self, run: _JobsRun, answering: Sequence[tuple[int, Strand]]) -> Iterator[None]:
        """Generate the answers of (job, strand) whose prompts have been read; yield when some are done."""
        live = [
            (job, strand) for job, strand in answering if run.take(job, int(run.progress[job].argmax_ids[-1]))
        ]
        if len(live) < len(answering):
            yield
        steps = run.steps(job for job, _ in answering)
        while live:
            doing = memory_errors(self.model.device, doing="answers are generated")
            with inference(self.model), doing:
                documents = run.decoding(live)
                going_on = live
                while len(going_on) == len(live):
                    said = np.array([len(run.progress[job].generated) for job, _ in live]) - 1
                    if run.make_room(live, said + 1):
                        documents.hand_back()
                        documents = run.decoding(live)
                    going_on = self._step(run, live, documents, said)
                    steps -= 1
                    self.share.done(self.share.steps(1))
                documents.hand_back()
            live = going_on
            yield
        self.share.done(self.share.steps(steps))  # answers ended before they had to

    def _step(
        self,
        run: _JobsRun,
        live: Sequence[tuple[int, Strand]],
        documents: DecodePass,
        said: NDArray[np.int64],
    ) -> list[tuple[int, Strand]]:
        """Give each answer its next token; return those that go on."""
        documents.step(said)
        ids_T = np.array([run.progress[job].generated[-1] for job, _ in live], dtype=np.int64)
        before = documents.attention_flops
        found = predict(self._head, self._hidden(ids_T, documents))
        self.counters.attention_flops += documents.attention_flops - before
        self.counters.logit_rows += len(live)
        self.counters.decoded_tokens += len(live)
        going_on = []
        for (job, strand), token, value in zip(live, found.ids.tolist(), found.highest.tolist()):
            run.progress[job].finite &= bool(np.isfinite(value))
            if run.take(job, token):
                going_on.append((job, strand))
        return going_on

    def _hidden(self, ids: NDArray[np.int64], documents: PrefillPass | DecodePass) -> torch.Tensor:
        """Return the last hidden states [T, D]."""
        device = self.model.device
        self.counters.tokens += len(ids)
        self.counters.passes += 1
        # No document table but what stands in its place, as for a row in chunks.
        states_1TD = backbone(self.model)(
            input_ids=torch.from_numpy(ids).to(device)[None],
            position_ids=documents.positions(device)[None],
            documents=documents,
            use_cache=False,
        ).last_hidden_state
        return states_1TD[0]

    def _predict(self, hidden_AD: torch.Tensor, run: _JobsRun, wanted: Sequence[_Wanted]) -> None:
        self.counters.logit_rows += len(wanted)
        targets = [run.targets(each) for each in wanted]
        given = any(target is not None for target in targets)
        found = predict(
            self._head, hidden_AD, torch.tensor([target or 0 for target in targets]) if given else None
        )
        nll = [0.0] * len(wanted) if found.nll is None else found.nll.tolist()
        for each, value, token, loss in zip(wanted, found.highest.tolist(), found.ids.tolist(), nll):
            progress = run.progress[each.job]
            progress.finite &= bool(np.isfinite(value))
            progress.argmax_ids[each.place] = token
            progress.missing -= 1
            if progress.nll is not None:
                progress.nll[each.place] = loss


class _JobsRun:
    """Jobs on their way: what is held of their tree, and what has come of them."""

    def __init__(self, engine: Engine, jobs: Sequence[Job], tree: PrefixTree, length: int) -> None:
        self.tree = tree
        self.places: dict[Strand, StrandPlace] = {}
        self.states = TreeStates()
        self.progress = [_Progress(job) for job in jobs]
        self.wanted: dict[Strand, list[_Wanted]] = {}
        self.limit = 0
        self._engine, self._length = engine, length
        self._ending: dict[Strand, list[int]] = {}
        self._spent = 0.0
        for index, (job, end) in enumerate(zip(jobs, tree.ends)):
            for place in range(job.wanted):
                position = len(job.ids) - job.wanted + place
                holder = end.holder(position)
                self.wanted.setdefault(holder, []).append(_Wanted(position - holder.start, index, place))
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
            found[strand] = self._room(strand) + sum(found[child] for child in strand.children)
        return found

    def _room(self, strand: Strand) -> int:
        said = max((self.progress[job].job.max_new_tokens for job in self._ending.get(strand, ())), default=0)
        # The last token of an answer is not read.
        return len(strand.ids) + min(max(said - 1, 0), FIRST_ROOM)

    def targets(self, wanted: _Wanted) -> int | None:
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

    def most_held(self, limit: int) -> int:
        """Return how many tokens are held at once at most, if batches have at most `limit`."""
        most = 0
        waiting: list[tuple[Sequence[Strand], int]] = [(self.tree.roots, 0)]
        while waiting:
            siblings, held = waiting.pop()
            for batch, opened in self._batches(siblings, limit):
                if opened:
                    waiting.append((batch[0].children, held + self._room(batch[0])))
                else:
                    most = max(most, held + sum(self._tokens[strand] for strand in batch))
        return most

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
        """Give strands their places in a new block, and take them back."""
        rows = [self._room(strand) for strand in strands]
        block = KvBlock(sum(rows), self._engine.kernel)
        for strand, row, room in zip(strands, np.cumsum([0, *rows[:-1]]).tolist(), rows):
            self.places[strand] = StrandPlace(block, row, room)
        try:
            yield
        finally:
            for strand in strands:
                del self.places[strand]
                self.states.drop(strand)

    def decoding(self, live: Sequence[tuple[int, Strand]]) -> DecodePass:
        """Return the table for the next steps of some answers."""
        return DecodePass([strand for _, strand in live], self.places, self.states, self._engine.kernel)

    def make_room(self, live: Sequence[tuple[int, Strand]], needed: NDArray[np.int64]) -> bool:
        """Let each answer have room for `needed` tokens; return whether anything was moved."""
        full = {
            strand
            for (_, strand), count in zip(live, needed.tolist())
            if len(strand.ids) + count > self.places[strand].room
        }
        if not full:
            return False
        block = self.places[live[0][1]].block
        moves, row = [], 0
        for strand, place in list(self.places.items()):
            if place.block is not block:
                continue
            room = len(strand.ids) + 2 * (place.room - len(strand.ids)) if strand in full else place.room
            moves.append((place.row, row, place.room))
            self.places[strand] = StrandPlace(block, row, room)
            row += room
        block.move(row, moves)
        return True

    def _outcome(self, job: int, seconds: float) -> JobOutcome:
        progress = self.progress[job]
        ids = progress.argmax_ids
        if progress.job.max_new_tokens:
            ids = np.array(progress.generated, dtype=np.int64)
        return JobOutcome(ids, progress.nll, progress.finite, seconds)


def _below(top: Strand) -> Iterator[Strand]:
    """Yield a strand and all that leave it, each behind its parent."""
    return PrefixTree([top], []).strands()
