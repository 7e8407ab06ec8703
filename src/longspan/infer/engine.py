"""Runs sequences that begin alike: what they share is read once, and answers are generated side by side.

    tree        every token of the sequences stands in it once              (infer.prefix_tree)
    batch       subtrees whose keys are held at once, at most `cache_tokens`
    pass        at most `batch_tokens` tokens of a batch in one forward pass, each batch front to end
    decoding    one forward pass a step for all answers that are written    (infer.tree_passes)

A subtree that is too large for a batch is opened: its trunk is read and kept, its branches go on in batches, and then
the trunk is released. So memory is that of the longest trunk and one batch. Where answers of a batch have ended, what
comes next is read in their place and joins those that go on (`infer.jobs_run`), be it under another trunk. Logits exist
at the positions that are asked for.

Shape legend: T = tokens of a pass, A = positions asked for, D = model width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from longspan.core.log import log_once
from longspan.infer.flops import ModelFlops
from longspan.infer.jobs import Counters, Job, JobOutcome
from longspan.infer.jobs_run import JobsRun, Wanted
from longspan.infer.kv import Segment
from longspan.infer.kv_types import KvDtype
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
from longspan.infer.prefix_tree import Strand, build_tree
from longspan.infer.share import Share
from longspan.infer.stripes import WHOLE, Stripes
from longspan.infer.tree_passes import DecodePass, PrefillPass
from longspan.kernels.attention import choose_kernel
from longspan.kernels.head import predict
from longspan.models.head import backbone, output_head
from longspan.models.states import layers_with_keys, state_bytes

CPU_PASS_TOKENS = 2048
"""Tokens of a pass at most on a CPU: activations of more leave its cache, which makes 16,384 a fifth slower."""
CACHE_PASSES = 4
"""A batch holds the keys of so many full passes, where nothing else is asked for."""


class Engine:
    """Reads and continues sequences.

    Args:
        model: with longspan's attention; nothing about it is changed.
        batch_tokens: tokens of a forward pass at most; on a CPU no more than `CPU_PASS_TOKENS`.
        cache_tokens: tokens of branches whose keys are held at once; None = `CACHE_PASSES` full passes, fewer where
            memory is short.
        available: tells the free bytes of a device; None: no limit. All ranks have to be told the same.
        stripes: which tokens this rank has of what is read; `batch_tokens` are those of all ranks together.
        kv_dtype: type in which keys and values are held. None: as they are computed.

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
        stripes: Stripes = WHOLE,
        kv_dtype: KvDtype | None = None,
    ) -> None:
        self.counters, self.stripes, self.kv_dtype = Counters(), stripes, kv_dtype
        self.share = Share(model, ranks=stripes.ranks)
        """Told while `run` reads and writes, how much of its work is done."""
        self.model, self._batch_tokens, self._cache_tokens = model, batch_tokens, cache_tokens
        self._available = available
        self._pass_tokens = batch_tokens
        if model.device.type == "cpu":
            self._pass_tokens = min(batch_tokens, CPU_PASS_TOKENS * stripes.ranks)
        self._head = output_head(model)
        self._flops = ModelFlops.of_model(model)
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
        run = JobsRun(self, jobs, build_tree([job.ids for job in jobs]), length, sizes=self._sizes())
        self.share.begin(run.begin(self._check_memory(run)))
        yield from run.outcomes()

    def _sizes(self) -> tuple[int, int]:
        """Return the bytes of a token's keys and values, and of a state."""
        token_bytes = cache_bytes_per_token(self.model, upcasts=self.kernel.upcasts, kv_dtype=self.kv_dtype)
        if self.kv_dtype is not None:
            # A layer's keys are read back at once.
            whole = cache_bytes_per_token(self.model, upcasts=self.kernel.upcasts)
            token_bytes += whole // max(1, layers_with_keys(self.model))
        return token_bytes, state_bytes(self.model)

    def _check_memory(self, run: JobsRun) -> int:
        """Return how many tokens of branches are held at once."""
        device, sizes = self.model.device, run.sizes
        available = self._available(device)
        limit = CACHE_PASSES * self._batch_tokens if self._cache_tokens is None else self._cache_tokens
        if available is None:
            return limit
        total = sum(len(strand.ids) for strand in run.tree.strands())
        activations = pass_bytes(self.model, min(self._pass_tokens, total)) + dense_bytes(self.model, total)
        while True:
            held = run.most_held(limit)
            if held.num_bytes(*sizes) + activations <= available:
                return limit
            if limit <= 1:
                break
            limit //= 2
            log_once("infer", "memory is short: fewer branches of a shared prefix are read at once")
        refuse_excess(
            cache_tokens=held.tokens,
            cache_bytes=sizes[0],
            states=held.states,
            state_bytes=sizes[1],
            activations=activations,
            available=available,
            device=device,
        )
        return limit

    def prefill(self, run: JobsRun, strands: Sequence[Strand]) -> Iterator[None]:
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

    def _prefill_pass(self, run: JobsRun, segments: Sequence[Segment]) -> None:
        device = self.model.device
        documents = PrefillPass(segments, run.places.of, run.states, self.kernel, self.stripes)
        wanted = [
            (number, each)
            for number, (strand, first, last) in enumerate(segments)
            for each in run.wanted.get(strand, ())
            if first <= each.row < last
        ]
        with inference(self.model), memory_errors(device, doing=f"{documents.num_tokens:,} tokens are read"):
            hidden_TD = self._hidden(documents.ids(), documents)
            for start in range(0, len(wanted), LOGIT_ROWS):
                part = wanted[start : start + LOGIT_ROWS]
                hidden_AD = documents.hidden_of(hidden_TD, [(number, each.row) for number, each in part])
                self._predict(hidden_AD, run, [each for _, each in part])
        self.counters.attention_flops += documents.attention_flops
        for strand, first, last in segments:
            self.share.done(self.share.reading(strand.start + first, last - first))

    def decode(self, run: JobsRun, live: list[tuple[int, Strand]]) -> list[tuple[int, Strand]]:
        """Generate one token after the other of the answers of (job, strand) until some are done; return the others."""
        with inference(self.model), memory_errors(self.model.device, doing="answers are generated"):
            going_on = live = run.side_by_side(live)
            documents = run.decoding(live)
            while len(going_on) == len(live):
                if run.make_room(live):
                    documents.hand_back()
                    live = run.side_by_side(live)
                    documents = run.decoding(live)
                going_on = self._step(run, live, documents)
                self.share.done(len(live) * run.answer_work)
            documents.hand_back()
        return going_on

    def _step(
        self,
        run: JobsRun,
        live: Sequence[tuple[int, Strand]],
        documents: DecodePass,
    ) -> list[tuple[int, Strand]]:
        """Give each answer its next token; return those that go on."""
        documents.step(run.said(live))
        ids_T = np.array([run.progress[job].generated[-1] for job, _ in live], dtype=np.int64)
        before = documents.attention_flops
        found = predict(self._head, self._hidden(ids_T, documents))
        self.counters.attention_flops += documents.attention_flops - before
        self.counters.logit_rows += len(live)
        self.counters.decoded_tokens += len(live)
        going_on = []
        for (job, strand), token, value in zip(live, *self.stripes.agreed(found.ids, found.highest)):
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

    def _predict(self, hidden_AD: torch.Tensor, run: JobsRun, wanted: Sequence[Wanted]) -> None:
        self.counters.logit_rows += len(wanted)
        targets = [run.targets(each) for each in wanted]
        given = any(target is not None for target in targets)
        found = predict(
            self._head, hidden_AD, torch.tensor([target or 0 for target in targets]) if given else None
        )
        nll = [0.0] * len(wanted) if found.nll is None else found.nll.tolist()
        for each, token, value, loss in zip(wanted, *self.stripes.agreed(found.ids, found.highest), nll):
            progress = run.progress[each.job]
            progress.finite &= bool(np.isfinite(value))
            progress.argmax_ids[each.place] = token
            progress.missing -= 1
            if progress.nll is not None:
                progress.nll[each.place] = loss
