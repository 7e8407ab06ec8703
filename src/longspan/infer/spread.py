"""A model whose sequences are spread over ranks: every rank holds some tokens of each, with their keys and values.

Prompts are read by the schedules of training (`parallel.schedules`), any of them: each rank computes its own tokens,
and keeps their keys. When tokens are generated, all ranks compute the same new token of each sequence; each attends
to the keys that it holds, and the parts are joined over ranks through their log-sum-exp, in fp32 or better. New keys
are kept by the ranks in turn. Logits exist where something is asked: hidden states of those tokens are brought
together, except for perplexity, where every rank computes the losses of its own.

All ranks call the same methods with the same requests; answers come on the first.

Shape legend: T = tokens of this rank, B = sequences, A = tokens asked for, K = key/value heads, H = query heads,
D = head dim or width, V = vocabulary, N = tokens of the padded row.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import PreTrainedModel

from longspan.data.tokenizer import Tokenizer
from longspan.infer.answer_stream import AnswerStream
from longspan.infer.length_rope import fixed_frequencies, frequency_class
from longspan.infer.memory import available_memory, cache_bytes_per_token, pass_bytes, refuse_excess
from longspan.infer.packed import boundaries, inference, plan_batches
from longspan.infer.perplexity import check_windows
from longspan.infer.plain import answer_of, excess_error, finished, prompt_of, scored
from longspan.infer.requests import Answer, Request
from longspan.kernels.attention import NO_LIMIT, AttentionKernel, Bands, choose_kernel, merge
from longspan.kernels.loss import linear_cross_entropy
from longspan.models.hf import hidden_states, lm_head_weight
from longspan.models.sharding import window_of_all_layers
from longspan.parallel.documents import ShardedDocuments
from longspan.parallel.mesh import Mesh
from longspan.parallel.schedules import Schedule, ScheduleName, build_schedule
from longspan.parallel.schedules.base import accumulation_dtype
from longspan.parallel.shards import SequenceShards

IGNORE = -100


class SpreadModel:
    """Answers requests together with the other ranks of `mesh.cp_group`.

    Args:
        model: the same on all ranks, with longspan's attention.
        tokenizer: decodes the answers.
        mesh: made with cp degrees above 1.
        schedule: how keys travel while prompts are read.
        identity: what records say of the model.
        max_length: longer requests are answered with an error; None = no limit.
        batch_tokens: tokens in one forward pass of all ranks together.

    Raises:
        ArgumentError: heads that the schedule cannot share.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        mesh: Mesh,
        schedule: ScheduleName,
        identity: Mapping[str, Any],
        max_length: int | None,
        batch_tokens: int,
    ) -> None:
        self.identity, self.max_length = identity, max_length
        self._model, self._tokenizer, self._batch_tokens = model, tokenizer, batch_tokens
        self._mesh = mesh
        self._schedule = build_schedule(
            schedule, ring_group=mesh.ring_group, ulysses_group=mesh.ulysses_group
        )
        config = model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        self._schedule.check_heads(heads, getattr(config, "num_key_value_heads", None) or heads)
        self._window = window_of_all_layers(model)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Continue each prompt greedily; see `Answerer`."""
        fitting = yield from self._refuse(requests)
        lengths = [len(prompt_of(requests[index])) for index in fitting]
        for batch in self._batches(lengths, lengths):
            started = time.monotonic()
            indices = [fitting[number] for number in batch]
            with fixed_frequencies(self._model, lengths[batch[0]]):
                answers = self._continue([requests[index] for index in indices])
            seconds = (time.monotonic() - started) / len(indices)
            if self._mesh.is_first:
                for index, ids in zip(indices, answers):
                    yield index, finished(requests[index], ids, self._tokenizer, seconds=seconds)

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Measure each given answer after its prompt; see `Answerer`."""
        fitting = yield from self._refuse(requests)
        # The last answer token is predicted, never read.
        sequences = [
            np.concatenate([prompt_of(requests[index]), answer_of(requests[index])[:-1]]) for index in fitting
        ]
        lengths = [len(prompt_of(requests[index])) for index in fitting]
        for batch in self._batches([len(ids) for ids in sequences], lengths):
            started = time.monotonic()
            asked = [requests[fitting[number]] for number in batch]
            with fixed_frequencies(self._model, lengths[batch[0]]):
                results = self._score([sequences[number] for number in batch], asked)
            seconds = (time.monotonic() - started) / len(batch)
            if self._mesh.is_first:
                for number, request, (nll, argmax) in zip(batch, asked, results):
                    yield fitting[number], scored(request, nll, argmax, self._tokenizer, seconds=seconds)

    def token_nll(self, windows: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Return the losses of windows on every rank; see `infer.perplexity.token_nll`."""
        check_windows(windows)
        losses: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(windows)
        lengths = [len(ids) for ids in windows]
        for batch in self._batches(lengths, lengths):
            with fixed_frequencies(self._model, lengths[batch[0]]):
                found = self._losses([windows[index] for index in batch])
            for index, nll in zip(batch, found):
                losses[index] = nll
        return losses

    def close(self) -> None:
        """Let go of nothing: model and groups are the caller's."""

    def _refuse(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer], None, list[int]]:
        """Answer requests that are too long with an error; return the indices of the others."""
        fitting = []
        for index, request in enumerate(requests):
            excess = excess_error(request, self.max_length)
            if excess is None:
                fitting.append(index)
            elif self._mesh.is_first:
                yield index, Answer("", error=excess, prompt_tokens=len(prompt_of(request)))
        return fitting

    def _batches(self, lengths: Sequence[int], prompts: Sequence[int]) -> list[list[int]]:
        """Group sequences of `lengths` tokens; those of a batch have prompts with the same frequencies."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, tokens in enumerate(prompts):
            alike.setdefault(frequency_class(self._model, tokens), []).append(index)
        return [
            [group[number] for number in batch]
            for group in alike.values()
            for batch in plan_batches([lengths[index] for index in group], self._batch_tokens)
        ]

    def _losses(self, windows: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        borders = boundaries(windows)
        labels = np.full(borders[-1], IGNORE, dtype=np.int64)
        for ids, start, end in zip(windows, borders[:-1], borders[1:]):
            labels[start : end - 1] = ids[1:]
        with inference(self._model):
            hidden_TD, documents, _ = self._read(windows)
            local_T = documents.take(torch.from_numpy(labels), padding=IGNORE).to(hidden_TD.device)
            nll_T = linear_cross_entropy(hidden_TD, lm_head_weight(self._model), local_T).per_token_nll
            nll_N = nll_T.new_zeros(documents.shards.num_padded, dtype=torch.float32)
            nll_N[torch.from_numpy(documents.indices).to(nll_N.device)] = nll_T.float()
            dist.all_reduce(nll_N, group=self._mesh.cp_group)
        nll = nll_N.cpu().numpy()
        return [nll[start : end - 1].copy() for start, end in itertools.pairwise(borders)]

    def _score(
        self, sequences: Sequence[NDArray[Any]], requests: Sequence[Request]
    ) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        answers = [answer_of(request) for request in requests]
        ends = boundaries(sequences)[1:]
        places = np.concatenate([np.arange(end - len(ids), end) for end, ids in zip(ends, answers)])
        with inference(self._model):
            hidden_TD, documents, _ = self._read(sequences)
            hidden_AD = self._gather(hidden_TD, documents, places)
            if not self._mesh.is_first:
                return []
            logits_AV = torch.nn.functional.linear(hidden_AD, lm_head_weight(self._model)).float()
            labels_A1 = torch.from_numpy(np.concatenate(answers).astype(np.int64))[:, None]
            log_probs_AV = torch.log_softmax(logits_AV, dim=-1)
            nll = -log_probs_AV.gather(1, labels_A1.to(logits_AV.device))[:, 0].cpu().numpy()
            argmax = logits_AV.argmax(dim=-1).cpu().numpy()
        cuts = np.cumsum([len(ids) for ids in answers])[:-1]
        return list(zip(np.split(nll, cuts), np.split(argmax, cuts)))

    def _continue(self, requests: Sequence[Request]) -> list[NDArray[np.int64]]:
        """Return the ids that greedy decoding puts after each prompt, the same on every rank."""
        prompts = [prompt_of(request) for request in requests]
        streams = [AnswerStream(request, self._tokenizer) for request in requests]
        longest = max(request.max_new_tokens for request in requests)
        self._check_memory(prompts, len(requests) * longest)
        with inference(self._model):
            hidden_TD, documents, kept = self._read(prompts, keep=True)
            assert kept is not None
            hidden_BD = self._gather(hidden_TD, documents, boundaries(prompts)[1:] - 1)
            held = _HeldKeys(kept, documents, boundaries(prompts), longest, self._mesh)
            del kept
            active = list(range(len(requests)))
            while active:
                tokens = self._most_likely(hidden_BD)
                active = [
                    sequence for sequence, token in zip(active, tokens) if not streams[sequence].push(token)
                ]
                if active:
                    last = torch.tensor(
                        [streams[sequence].ids[-1] for sequence in active], device=self._mesh.device
                    )
                    hidden_BD = hidden_states(self._model, last, held.step(active))  # type: ignore[arg-type]
        return [np.array(stream.ids, np.int64) for stream in streams]

    def _check_memory(self, sequences: Sequence[NDArray[Any]], new_tokens: int) -> None:
        """Refuse what does not fit into the memory of a rank, on all of them, before anything is run."""
        device, world = self._mesh.device, self._mesh.cp_size
        free = available_memory(device)
        # On the CPU the ranks of a machine share its memory.
        share = NO_LIMIT if free is None else free // (world if device.type == "cpu" else 1)
        least = torch.tensor(share, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._mesh.cp_group)
        tokens = -(-sum(map(len, sequences)) // world)
        refuse_excess(
            cache_tokens=tokens + -(-new_tokens // world),
            cache_bytes=cache_bytes_per_token(self._model, upcasts=choose_kernel(device).upcasts),
            activations=pass_bytes(self._model, tokens),
            available=int(least),
            device=device,
        )

    def _most_likely(self, hidden_BD: torch.Tensor) -> list[int]:
        logits_BV = torch.nn.functional.linear(hidden_BD, lm_head_weight(self._model))
        tokens_B = logits_BV.argmax(dim=-1)
        # Said by one for all: ranks that disagreed over a tie would go different ways.
        dist.broadcast(tokens_B, src=0)
        return tokens_B.tolist()

    def _read(
        self, sequences: Sequence[NDArray[Any]], *, keep: bool = False
    ) -> tuple[torch.Tensor, ShardedDocuments, _Kept | None]:
        """Run the model over this rank's tokens of the sequences, laid end to end: [T, D]."""
        borders = boundaries(sequences)
        layout = self._schedule.layouts[0]
        shards = SequenceShards(layout, borders, self._mesh.cp_size, window=self._window)
        documents = (
            _KeepingDocuments(shards, self._schedule) if keep else ShardedDocuments(shards, self._schedule)
        )
        row = torch.from_numpy(np.concatenate([np.asarray(ids, np.int64) for ids in sequences]))
        ids_T = documents.take(row, padding=0).to(self._mesh.device)
        hidden_TD = hidden_states(self._model, ids_T, documents)
        return hidden_TD, documents, documents.kept if isinstance(documents, _KeepingDocuments) else None

    def _gather(
        self, hidden_TD: torch.Tensor, documents: ShardedDocuments, places: NDArray[np.int64]
    ) -> torch.Tensor:
        """Return the hidden states of some places of the row on every rank: [A, D]."""
        own = documents.indices
        rows = np.minimum(np.searchsorted(own, places), len(own) - 1)
        mine = np.flatnonzero(own[rows] == places)
        found_AD = hidden_TD.new_zeros(len(places), hidden_TD.shape[1], dtype=accumulation_dtype(hidden_TD))
        device = hidden_TD.device
        chosen = hidden_TD[torch.from_numpy(rows[mine]).to(device)]
        found_AD[torch.from_numpy(mine).to(device)] = chosen.to(found_AD.dtype)
        # One rank has each, the others 0: the sum is exact.
        dist.all_reduce(found_AD, group=self._mesh.cp_group)
        return found_AD.to(hidden_TD.dtype)


_Kept = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [T, K, D] of this rank's tokens, by layer."""


class _KeepingDocuments(ShardedDocuments):
    """A table that keeps the keys and values that it is shown."""

    def __init__(self, shards: SequenceShards, schedule: Schedule) -> None:
        super().__init__(shards, schedule)
        self.kept: _Kept = {}

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
        layer: int | None = None,
    ) -> torch.Tensor:
        assert layer is not None
        self.kept[layer] = (k.contiguous(), v.contiguous())
        return super().attend(q, k, v, window=window, scale=scale, layer=layer)


class _Rows(NamedTuple):
    """Where keys of one sequence lie on this rank, and which positions they have, ascending."""

    start: int
    positions: NDArray[np.int64]


class _HeldKeys:
    """What this rank holds of the sequences: keys of the prompts, and some of those generated since.

    Token t of the answers is kept by rank t % world, in row sequence * slots + t // world of the new keys.
    """

    def __init__(
        self, kept: _Kept, documents: ShardedDocuments, borders: NDArray[np.int64], longest: int, mesh: Mesh
    ) -> None:
        self.kernel: AttentionKernel = choose_kernel(mesh.device)
        self.mesh = mesh
        dtype = accumulation_dtype if self.kernel.upcasts else _same
        self.prompt = {layer: tuple(part.to(dtype(part)) for part in pair) for layer, pair in kept.items()}
        self.slots = -(-longest // mesh.cp_size)
        self.new: _Kept = {}
        self.lengths = np.diff(borders)
        self.said = np.zeros(len(self.lengths), np.int64)
        places = documents.indices
        starts = np.searchsorted(places, borders)
        self.prompt_rows = [
            _Rows(int(first), places[first:last] - border)
            for first, last, border in zip(starts[:-1], starts[1:], borders[:-1])
        ]

    def step(self, active: Sequence[int]) -> _Step:
        """Return the table for one more token of each of some sequences."""
        step = _Step(self, list(active))
        self.said[active] += 1
        return step

    def rows_of_answer(self, sequence: int) -> _Rows:
        """Return where the keys of the answer lie that this rank holds, the token in hand included."""
        said = np.arange(self.mesh.cp_rank, self.said[sequence], self.mesh.cp_size)
        return _Rows(sequence * self.slots, self.lengths[sequence] + said)


def _same(tensor: torch.Tensor) -> torch.dtype:
    return tensor.dtype


class _Step:
    """One new token of each active sequence, in place of a document table."""

    def __init__(self, held: _HeldKeys, active: list[int]) -> None:
        self._held, self._active = held, active
        self._positions = held.lengths[active] + held.said[active]
        self._bands: dict[int | None, tuple[Bands, Bands]] = {}
        kept_here = [
            (row, sequence * held.slots + int(held.said[sequence]) // held.mesh.cp_size)
            for row, sequence in enumerate(active)
            if int(held.said[sequence]) % held.mesh.cp_size == held.mesh.cp_rank
        ]
        self._kept_rows = torch.tensor(
            [row for row, _ in kept_here], device=held.mesh.device, dtype=torch.long
        )
        self._kept_slots = torch.tensor([s for _, s in kept_here], device=held.mesh.device, dtype=torch.long)

    @property
    def num_tokens(self) -> int:
        """Sequences that get another token."""
        return len(self._active)

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the position of the new token in each sequence, int64 [B]."""
        return torch.from_numpy(self._positions).to(device)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        window: int | None,
        scale: float | None,
        layer: int | None = None,
    ) -> torch.Tensor:
        """Return the attention [B, H, D] of the new tokens over all keys of their sequences."""
        assert layer is not None
        held, kernel = self._held, self._held.kernel
        prompt = held.prompt[layer]
        if layer not in held.new:
            shape = (len(held.lengths) * held.slots, *k.shape[1:])
            held.new[layer] = (prompt[0].new_zeros(shape), prompt[1].new_zeros(shape))
        new = held.new[layer]
        for kept, fresh in zip(new, (k, v)):
            kept[self._kept_slots] = fresh[self._kept_rows].to(kept.dtype)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        queries = q.to(prompt[0].dtype)
        out = q.new_zeros(q.shape, dtype=accumulation_dtype(q))
        lse = q.new_full(q.shape[:2], float("-inf"), dtype=accumulation_dtype(q))
        for (keys, values), bands in zip((prompt, new), self._tables(window)):
            if len(bands):
                out, lse = merge(out, lse, *kernel.forward(queries, keys, values, bands, scale))
        return self._over_ranks(out, lse).to(q.dtype)

    def _over_ranks(self, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        mine = torch.cat((out, lse[..., None]), dim=-1)
        parts = [torch.empty_like(mine) for _ in range(self._held.mesh.cp_size)]
        dist.all_gather(parts, mine, group=self._held.mesh.cp_group)
        out, lse = parts[0][..., :-1], parts[0][..., -1]
        for part in parts[1:]:
            out, lse = merge(out, lse, part[..., :-1], part[..., -1])
        return out

    def _tables(self, window: int | None) -> tuple[Bands, Bands]:
        """Return who sees what of the keys of the prompts, and of those generated, on this rank."""
        if window not in self._bands:
            held = self._held
            prompt = [held.prompt_rows[sequence] for sequence in self._active]
            # The token in hand is counted by now: `step` has been called for it.
            answer = [held.rows_of_answer(sequence) for sequence in self._active]
            self._bands[window] = (self._seen(prompt, window), self._seen(answer, window))
        return self._bands[window]

    def _seen(self, rows: Sequence[_Rows], window: int | None) -> Bands:
        starts, lengths = [], []
        for (start, positions), position in zip(rows, self._positions):
            first = 0 if window is None else int(np.searchsorted(positions, position - window + 1))
            starts.append(start + first)
            lengths.append(len(positions) - first)
        count = len(rows)
        return Bands(range(count), [1] * count, starts, lengths, lo=-NO_LIMIT)
