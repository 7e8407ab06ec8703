"""A model whose sequences are spread over ranks: every rank holds some tokens of each, with their keys and values.

Prompts are read by the schedules of training (`parallel.schedules`), any of them: each rank computes its own tokens,
and keeps their keys. What prompts have in common at their beginning is read once where that is less work; their ends,
and the tokens that are generated, are computed by all ranks, each attending to the keys that it holds
(`infer.held_keys`). Logits exist where something is asked: hidden states of those tokens are brought together, except
for perplexity, where every rank computes the losses of its own.

All ranks call the same methods with the same requests; answers come on the first.

Shape legend: T = tokens of this rank, B = sequences, A = tokens asked for, K = key/value heads, H = query heads,
D = head dim or width, V = vocabulary, N = tokens of the padded row.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.data.tokenizer import Tokenizer
from longspan.infer.answer_stream import AnswerStream
from longspan.infer.held_keys import HeldKeys, KeepingDocuments, NextTokens, held_rows
from longspan.infer.length_rope import alike, fixed_frequencies, plan_alike_batches
from longspan.infer.memory import cache_bytes_per_token, dense_bytes, pass_bytes, refuse_excess, shared_memory
from longspan.infer.packed import boundaries, inference, plan_batches
from longspan.infer.perplexity import check_windows
from longspan.infer.plain import answer_of, excess_error, finished, prompt_of, refuse_unknown_tokens, scored
from longspan.infer.requests import NOT_FINITE, Answer, Request
from longspan.infer.share import Share
from longspan.kernels.attention import choose_kernel
from longspan.kernels.attention.merging import accumulation_dtype
from longspan.kernels.head import IGNORE_LABEL, predict
from longspan.kernels.loss import linear_cross_entropy
from longspan.models.head import output_head
from longspan.models.hf import hidden_states
from longspan.models.hf_config import head_counts, window_of_all_layers
from longspan.models.mixers import check_states, mixers
from longspan.parallel.mesh import Mesh
from longspan.parallel.schedules import ScheduleName, build_schedule
from longspan.parallel.sharded_documents import ShardedDocuments
from longspan.parallel.shards import SequenceShards

PASS_TOKENS = 2048
"""Ends of prompts are read by all ranks alike, so many tokens at a time."""


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
        prefix_reuse: read once what prompts have in common.

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
        prefix_reuse: bool = True,
    ) -> None:
        self.identity, self.max_length = identity, max_length
        # States of what was read lie with the ranks that have their heads: nothing is read behind them.
        self._has_states = any(mixers(model))
        self._prefix_reuse = prefix_reuse and not self._has_states
        self._model, self._tokenizer, self._batch_tokens = model, tokenizer, batch_tokens
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._mesh = mesh
        self._is_lead = mesh.cp_rank == 0
        self._schedule = build_schedule(
            schedule, ring_group=mesh.ring_group, ulysses_group=mesh.ulysses_group
        )
        self._schedule.check_heads(*head_counts(model.config))
        check_states(model, mesh.cp_size)
        self._window = window_of_all_layers(model.config)
        self._share = Share(model, ranks=mesh.cp_size)

    def work_of(self, tokens: int) -> float:
        """Return this rank's operations of reading a prompt; see `infer.requests.work_of`."""
        return self._share.reading(0, tokens)

    def watch(self, on_share: Callable[[float], None] | None) -> bool:
        """Report progress while a call answers: the share of its work that is done; see `infer.requests.Watched`."""
        self._share.on_share = on_share
        return True

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Continue each prompt greedily; see `Answerer`.

        Raises:
            ArgumentError: a model with layers that carry a state.
        """
        if self._has_states:
            raise ArgumentError(
                f"processes that share sequences do not continue them in a {type(self._model).__name__}, whose layers "
                "carry a state",
                fix="ask it on one process or with --replicas; given answers and perplexities work with --cp",
            )
        refuse_unknown_tokens(requests, self._vocabulary)
        fitting = yield from self._refuse(requests)
        prompts = [np.asarray(prompt_of(requests[index]), np.int64) for index in fitting]
        room = [requests[index].max_new_tokens for index in fitting]
        for trunk, members, work in self._begin_call(self._groups(prompts, prompts), prompts, room):
            started = time.monotonic()
            asked = [requests[fitting[number]] for number in members]
            with fixed_frequencies(self._model, len(prompts[members[0]])), self._share.part(work):
                said = self._continue([prompts[number] for number in members], trunk, asked)
            seconds = (time.monotonic() - started) / len(members)
            if self._is_lead:
                for number, request, ids in zip(members, asked, said):
                    if ids is None:
                        answer = Answer("", error=NOT_FINITE, prompt_tokens=len(prompts[number]))
                    else:
                        answer = finished(request, ids, self._tokenizer, seconds=seconds)
                    yield fitting[number], answer

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Measure each given answer after its prompt; see `Answerer`."""
        refuse_unknown_tokens(requests, self._vocabulary)
        fitting = yield from self._refuse(requests)
        prompts = [np.asarray(prompt_of(requests[index]), np.int64) for index in fitting]
        answers = [answer_of(requests[index]).astype(np.int64) for index in fitting]
        # The last answer token is predicted, never read.
        sequences = [np.concatenate([prompt, answer[:-1]]) for prompt, answer in zip(prompts, answers)]
        groups = self._groups(sequences, prompts)
        for trunk, members, work in self._begin_call(groups, sequences, [0] * len(sequences)):
            started = time.monotonic()
            with fixed_frequencies(self._model, len(prompts[members[0]])), self._share.part(work):
                found = self._score(
                    [sequences[number] for number in members], trunk, [answers[number] for number in members]
                )
            seconds = (time.monotonic() - started) / len(members)
            for number, (nll, argmax) in zip(members, found):
                request = requests[fitting[number]]
                yield fitting[number], scored(request, nll, argmax, self._tokenizer, seconds=seconds)

    def token_nll(self, windows: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Return the losses of windows on every rank; see `infer.perplexity.token_nll`."""
        check_windows(windows)
        losses: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(windows)
        lengths = [len(ids) for ids in windows]
        for batch in self._batches(range(len(windows)), lengths, lengths):
            with fixed_frequencies(self._model, lengths[batch[0]]):
                found = self._losses([windows[index] for index in batch])
            for index, nll in zip(batch, found):
                losses[index] = nll
        return losses

    def close(self) -> None:
        """Do nothing: model and groups belong to the caller."""

    def _refuse(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer], None, list[int]]:
        """Answer requests that are too long with an error; return the indices of the others."""
        fitting = []
        for index, request in enumerate(requests):
            excess = excess_error(request, self.max_length)
            if excess is None:
                fitting.append(index)
            elif self._is_lead:
                yield index, Answer("", error=excess, prompt_tokens=len(prompt_of(request)))
        return fitting

    def _batches(
        self, indices: Iterable[int], lengths: Sequence[int], prompts: Sequence[int]
    ) -> list[list[int]]:
        return plan_alike_batches(
            self._model, indices, lengths, prompts=prompts, batch_tokens=self._batch_tokens
        )

    def _groups(
        self, sequences: Sequence[NDArray[np.int64]], prompts: Sequence[NDArray[np.int64]]
    ) -> list[tuple[int, list[int]]]:
        """Return (tokens in common that are read once, indices): what is read together."""
        lengths, prompt_lengths = [len(ids) for ids in sequences], [len(ids) for ids in prompts]
        shared: list[tuple[int, list[int]]] = []
        if self._prefix_reuse:
            for group in alike(self._model, range(len(prompts)), prompt_lengths):
                found = plan_trunks(
                    [prompts[index] for index in group], ranks=self._mesh.cp_size, most=self._batch_tokens
                )
                shared += [(trunk, [group[number] for number in members]) for trunk, members in found]
        done = {index for _, members in shared for index in members}
        rest = [index for index in range(len(sequences)) if index not in done]
        return shared + [(0, batch) for batch in self._batches(rest, lengths, prompt_lengths)]

    def _begin_call(
        self,
        groups: Sequence[tuple[int, list[int]]],
        sequences: Sequence[NDArray[np.int64]],
        room: Sequence[int],
    ) -> Iterator[tuple[int, list[int], float]]:
        """Yield the groups with their work, which all of the call's is reckoned from first."""
        work = []
        for trunk, members in groups:
            ends = [len(sequences[number]) - trunk for number in members]
            read = self._share.by_all if trunk else self._share.reading
            steps = self._share.steps(max(room[number] for number in members) - 1)
            work.append(self._share.reading(0, trunk) + sum(read(trunk, end) for end in ends) + steps)
        self._share.begin(sum(work))
        yield from ((trunk, members, each) for (trunk, members), each in zip(groups, work))

    def _losses(self, windows: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        borders = boundaries(windows)
        labels = np.full(borders[-1], IGNORE_LABEL, dtype=np.int64)
        for ids, start, end in zip(windows, borders[:-1], borders[1:]):
            labels[start : end - 1] = ids[1:]
        with inference(self._model):
            hidden_TD, documents = self._read(windows)
            local_T = documents.take(torch.from_numpy(labels), padding=IGNORE_LABEL).to(hidden_TD.device)
            nll_T = linear_cross_entropy(hidden_TD, output_head(self._model), local_T).per_token_nll
            nll_N = nll_T.new_zeros(documents.shards.num_padded, dtype=torch.float32)
            nll_N[torch.from_numpy(documents.indices).to(nll_N.device)] = nll_T.float()
            dist.all_reduce(nll_N, group=self._mesh.cp_group)
        nll = nll_N.cpu().numpy()
        return [nll[start : end - 1].copy() for start, end in itertools.pairwise(borders)]

    def _score(
        self, sequences: list[NDArray[np.int64]], trunk: int, answers: list[NDArray[np.int64]]
    ) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Return losses and most likely tokens of each answer; nothing on ranks other than the first of the group."""
        counts = [len(ids) for ids in answers]
        self._check_memory(sequences, trunk, new_tokens=0)
        with inference(self._model):
            hidden_AD, _ = self._begin(sequences, trunk, wanted=counts, room=None)
            if not self._is_lead:
                return []
            found = predict(output_head(self._model), hidden_AD, torch.from_numpy(np.concatenate(answers)))
            assert found.nll is not None
        cuts = np.cumsum(counts)[:-1]
        return list(zip(np.split(found.nll.cpu().numpy(), cuts), np.split(found.ids.cpu().numpy(), cuts)))

    def _continue(
        self, prompts: list[NDArray[np.int64]], trunk: int, requests: Sequence[Request]
    ) -> list[NDArray[np.int64] | None]:
        """Return the ids that greedy decoding puts after each prompt, the same on every rank.

        None: the model's output is not a finite number.
        """
        streams = [AnswerStream(request, self._tokenizer) for request in requests]
        room = [request.max_new_tokens for request in requests]
        broken: set[int] = set()
        self._check_memory(prompts, trunk, new_tokens=sum(room))
        with inference(self._model):
            hidden_BD, keys = self._begin(prompts, trunk, wanted=[1] * len(prompts), room=room)
            assert keys is not None
            active = [sequence for sequence, tokens in enumerate(room) if tokens > 0]
            hidden_BD = hidden_BD[active]
            while active:
                tokens = dict(zip(active, self._most_likely(hidden_BD)))
                broken |= {sequence for sequence, token in tokens.items() if token < 0}
                active = [
                    sequence
                    for sequence, token in tokens.items()
                    if token >= 0 and not streams[sequence].push(token)
                ]
                if active:
                    last = np.array([streams[sequence].ids[-1] for sequence in active])
                    with self._share.a_pass(self._share.steps(1)):
                        hidden_BD = self._run(last, keys.next(active, [1] * len(active)))
        return [
            None if sequence in broken else np.array(stream.ids, np.int64)
            for sequence, stream in enumerate(streams)
        ]

    def _begin(
        self,
        sequences: list[NDArray[np.int64]],
        trunk: int,
        *,
        wanted: Sequence[int],
        room: Sequence[int] | None,
    ) -> tuple[torch.Tensor, HeldKeys | None]:
        """Read the sequences, their first `trunk` tokens once for all.

        Returns:
            The hidden states of the last `wanted` tokens of each, [A, D] on every rank; and the keys, with room for
            `room` more tokens of each, None where none are wanted.
        """
        if trunk == 0:
            borders = boundaries(sequences)
            hidden_TD, documents = self._read(sequences, keep=room is not None)
            ends = zip(borders[1:], wanted)
            places = np.concatenate([np.arange(end - count, end) for end, count in ends])
            hidden_AD = self._gather(hidden_TD, documents, places)
            if room is None:
                return hidden_AD, None
            assert isinstance(documents, KeepingDocuments)
            held = held_rows(documents, borders)
            return hidden_AD, HeldKeys(documents.kept, held, np.diff(borders).tolist(), room, self._mesh)
        _, documents = self._read([sequences[0][:trunk]], keep=True)
        assert isinstance(documents, KeepingDocuments)
        count = len(sequences)
        held = held_rows(documents, np.array([0, trunk])) * count
        ends_room = [len(ids) - trunk for ids in sequences]
        if room is not None:
            ends_room = [end + tokens for end, tokens in zip(ends_room, room)]
        keys = HeldKeys(documents.kept, held, [trunk] * count, ends_room, self._mesh)
        return self._read_ends(sequences, trunk, keys, wanted), keys

    def _read_ends(
        self, sequences: Sequence[NDArray[np.int64]], trunk: int, keys: HeldKeys, wanted: Sequence[int]
    ) -> torch.Tensor:
        """Read what comes after the trunk on every rank; return the hidden states of the last tokens, [A, D]."""
        ends = [ids[trunk:] for ids in sequences]
        found: list[list[torch.Tensor]] = [[] for _ in ends]
        for members in plan_batches([len(ids) for ids in ends], PASS_TOKENS):
            # Of a long end, one piece after another.
            longest = max(len(ends[member]) for member in members)
            for first in range(0, longest, PASS_TOKENS):
                pieces = [ends[member][first : first + PASS_TOKENS] for member in members]
                counts = [len(ids) for ids in pieces]
                work = sum(self._share.by_all(trunk + first, count) for count in counts)
                with self._share.a_pass(work):
                    hidden_QD = self._run(np.concatenate(pieces), keys.next(members, counts))
                for member, rows in zip(members, hidden_QD.split(counts)):
                    skipped = max(0, len(ends[member]) - wanted[member] - first)
                    found[member].append(rows[skipped:])
        return torch.cat([rows for parts in found for rows in parts])

    def _run(self, ids: NDArray[np.int64], table: NextTokens) -> torch.Tensor:
        ids_Q = torch.from_numpy(ids).to(self._mesh.device)
        return hidden_states(self._model, ids_Q, table)  # type: ignore[arg-type]

    def _check_memory(self, sequences: Sequence[NDArray[Any]], trunk: int, *, new_tokens: int) -> None:
        """Refuse what does not fit into the memory of a rank, on all of them, before anything is run."""
        device, world = self._mesh.device, self._mesh.cp_size
        ends = sum(len(ids) - trunk for ids in sequences) + new_tokens
        tokens = -(-(trunk + ends) // world)
        refuse_excess(
            cache_tokens=tokens,
            cache_bytes=cache_bytes_per_token(self._model, upcasts=choose_kernel(device).upcasts),
            activations=pass_bytes(self._model, max(-(-trunk // world), PASS_TOKENS) if trunk else tokens)
            + dense_bytes(self._model, tokens),
            available=shared_memory(device, self._mesh.cp_group),
            device=device,
        )

    def _most_likely(self, hidden_BD: torch.Tensor) -> list[int]:
        """Return the most likely next token of each sequence; -1 where the logits are not finite numbers."""
        found = predict(output_head(self._model), hidden_BD)
        tokens_B = found.ids.masked_fill(~found.highest.isfinite(), -1)
        # Said by one for all: ranks that disagreed over a tie would go different ways.
        dist.broadcast(tokens_B, group_src=0, group=self._mesh.cp_group)
        return tokens_B.tolist()

    def _read(
        self, sequences: Sequence[NDArray[Any]], *, keep: bool = False
    ) -> tuple[torch.Tensor, ShardedDocuments]:
        """Run the model over this rank's tokens of the sequences, laid end to end: [T, D]."""
        borders = boundaries(sequences)
        layout = self._schedule.layouts[0]
        shards = SequenceShards(layout, borders, self._mesh.cp_size, window=self._window)
        documents = (
            KeepingDocuments(shards, self._schedule) if keep else ShardedDocuments(shards, self._schedule)
        )
        row = torch.from_numpy(np.concatenate([np.asarray(ids, np.int64) for ids in sequences]))
        ids_T = documents.take(row, padding=0).to(self._mesh.device)
        with self._share.a_pass(sum(self._share.reading(0, len(ids)) for ids in sequences)):
            return hidden_states(self._model, ids_T, documents), documents

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


def plan_trunks(
    prompts: Sequence[NDArray[np.int64]], *, ranks: int, most: int
) -> list[tuple[int, list[int]]]:
    """Group prompts that begin alike, where reading that once is less work for a rank than reading all of them.

    A rank reads its share of what is spread, and all of the ends: for prompts of n_i tokens with t in common that
    is t / ranks + sum(n_i - t), instead of sum(n_i) / ranks. The ends of a group have at most `most` tokens.

    Returns:
        (tokens in common, indices of the prompts), for groups of two prompts and more.
    """

    def work(trunk: int, members: Sequence[int]) -> float:
        if len(members) == 1:
            return len(prompts[members[0]]) / ranks
        return trunk / ranks + sum(len(prompts[index]) - trunk for index in members)

    # Those that begin alike stand together in the order of their ids.
    order = sorted(range(len(prompts)), key=lambda index: prompts[index].astype(">i8").tobytes())
    groups: list[tuple[int, list[int]]] = []
    for index in order:
        if groups:
            trunk, members = groups[-1]
            common = min(trunk, _common(prompts[members[-1]], prompts[index]))
            # At least one token of each is left: something has to be asked of it.
            common = min(common, *(len(prompts[each]) - 1 for each in (*members, index)))
            joined = [*members, index]
            ends = sum(len(prompts[each]) - common for each in joined)
            gains = work(common, joined) < work(trunk, members) + len(prompts[index]) / ranks
            if common > 0 and gains and ends <= most:
                groups[-1] = (common, joined)
                continue
        groups.append((len(prompts[index]), [index]))
    return [(trunk, members) for trunk, members in groups if len(members) > 1]


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
