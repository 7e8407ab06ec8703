"""A model whose sequences are spread over ranks: every rank holds some tokens of each, with their keys and values.

Prompts that begin alike are a prefix tree, of which each rank reads and keeps its stripes (`infer.stripes`), by the
engine of one process (`infer.engine`). Others, and the windows of perplexity, are read by the schedules of training
(`parallel.schedules`), any of them: each rank computes its own tokens and keeps their keys, and what is generated is
computed by all ranks, each attending to the keys that it holds (`infer.held_keys`). Logits exist where something is
asked: hidden states of those tokens are brought together, except for perplexity, where every rank computes the losses
of its own.

All ranks call the same methods with the same requests; answers come on the first.

Shape legend: T = tokens of this rank, B = sequences, A = tokens asked for, K = key/value heads, H = query heads,
D = head dim or width, V = vocabulary, N = tokens of the padded row.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.core.log import log_once
from longspan.data.tokenizer import Tokenizer
from longspan.infer.answer_stream import AnswerStream
from longspan.infer.held_keys import HeldKeys, KeepingDocuments, held_rows
from longspan.infer.length_rope import fixed_frequencies, plan_alike_batches
from longspan.infer.local import LocalAnswerer
from longspan.infer.memory import cache_bytes_per_token, dense_bytes, pass_bytes, refuse_excess, shared_memory
from longspan.infer.packed import boundaries, inference
from longspan.infer.perplexity import check_windows
from longspan.infer.plain import answer_of, excess_error, finished, prompt_of, refuse_unknown_tokens, scored
from longspan.infer.prefix_tree import build_tree
from longspan.infer.requests import NOT_FINITE, Answer, Request
from longspan.infer.share import Share
from longspan.infer.stripes import Stripes
from longspan.kernels.attention import choose_kernel
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

LEAST_SHARED = 0.1
"""Prompts are read as a tree where that spares so much of their tokens: a chat's template alone is no haystack."""


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
        self._model, self._tokenizer, self._batch_tokens = model, tokenizer, batch_tokens
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._mesh, self._stripes = mesh, Stripes(mesh.cp_group)
        self._is_lead = mesh.cp_rank == 0
        self._schedule = build_schedule(
            schedule, ring_group=mesh.ring_group, ulysses_group=mesh.ulysses_group
        )
        self._schedule.check_heads(*head_counts(model.config))
        check_states(model, mesh.cp_size)
        self._window = window_of_all_layers(model.config)
        self._share = Share(model, ranks=mesh.cp_size)
        self._tree: LocalAnswerer | None = None
        if prefix_reuse and not self._has_states:
            self._tree = LocalAnswerer(
                model,
                tokenizer,
                identity=identity,
                max_length=max_length,
                batch_tokens=batch_tokens,
                available=lambda device: shared_memory(device, mesh.cp_group),
                stripes=self._stripes,
            )

    def work_of(self, tokens: int) -> float:
        """Return this rank's operations of reading a prompt; see `infer.requests.work_of`."""
        return self._share.reading(0, tokens)

    def watch(self, on_share: Callable[[float], None] | None) -> bool:
        """Report progress while a call answers: the share of its work that is done; see `infer.requests.Watched`."""
        self._share.on_share = on_share
        return self._tree is None or self._tree.watch(on_share)

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
        if (tree := self._tree_for(requests)) is not None:
            yield from self._first_tells(tree.generate(requests))
            return
        refuse_unknown_tokens(requests, self._vocabulary)
        fitting = yield from self._refuse(requests)
        prompts = [np.asarray(prompt_of(requests[index]), np.int64) for index in fitting]
        room = [requests[index].max_new_tokens for index in fitting]
        for members, work in self._begin_call(prompts, prompts, room):
            started = time.monotonic()
            asked = [requests[fitting[number]] for number in members]
            with fixed_frequencies(self._model, len(prompts[members[0]])), self._share.part(work):
                said = self._continue([prompts[number] for number in members], asked)
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
        if (tree := self._tree_for(requests)) is not None:
            yield from self._first_tells(tree.score(requests))
            return
        refuse_unknown_tokens(requests, self._vocabulary)
        fitting = yield from self._refuse(requests)
        prompts = [np.asarray(prompt_of(requests[index]), np.int64) for index in fitting]
        answers = [answer_of(requests[index]).astype(np.int64) for index in fitting]
        # The last answer token is predicted, never read.
        sequences = [np.concatenate([prompt, answer[:-1]]) for prompt, answer in zip(prompts, answers)]
        for members, work in self._begin_call(sequences, prompts, [0] * len(sequences)):
            started = time.monotonic()
            with fixed_frequencies(self._model, len(prompts[members[0]])), self._share.part(work):
                found = self._score(
                    [sequences[number] for number in members], [answers[number] for number in members]
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

    def _tree_for(self, requests: Sequence[Request]) -> LocalAnswerer | None:
        """Return what reads prompts that begin alike; None: a schedule reads these."""
        if self._tree is None or not _begin_alike(requests):
            return None
        if self._is_lead:
            log_once(
                "infer",
                "prompts begin alike: what they share is read once, and every process holds its share of each stretch; "
                "--schedule has no effect on them",
            )
        return self._tree

    def _first_tells(self, answers: Iterator[tuple[int, Answer]]) -> Iterator[tuple[int, Answer]]:
        """Yield answers that all ranks have, on the first."""
        for each in answers:
            if self._is_lead:
                yield each

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

    def _begin_call(
        self,
        sequences: Sequence[NDArray[np.int64]],
        prompts: Sequence[NDArray[np.int64]],
        room: Sequence[int],
    ) -> Iterator[tuple[list[int], float]]:
        """Yield the indices of what is read together with its work, which all of the call's is reckoned from first."""
        lengths = [len(ids) for ids in sequences]
        batches = self._batches(range(len(lengths)), lengths, [len(ids) for ids in prompts])
        work = [
            sum(self._share.reading(0, lengths[number]) for number in members)
            + self._share.steps(max(room[number] for number in members) - 1)
            for members in batches
        ]
        self._share.begin(sum(work))
        yield from zip(batches, work)

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
        self, sequences: list[NDArray[np.int64]], answers: list[NDArray[np.int64]]
    ) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Return losses and most likely tokens of each answer; nothing on ranks other than the first of the group."""
        counts = [len(ids) for ids in answers]
        self._check_memory(sequences, new_tokens=0)
        with inference(self._model):
            hidden_AD, _ = self._begin(sequences, wanted=counts, room=None)
            if not self._is_lead:
                return []
            found = predict(output_head(self._model), hidden_AD, torch.from_numpy(np.concatenate(answers)))
            assert found.nll is not None
        cuts = np.cumsum(counts)[:-1]
        return list(zip(np.split(found.nll.cpu().numpy(), cuts), np.split(found.ids.cpu().numpy(), cuts)))

    def _continue(
        self, prompts: list[NDArray[np.int64]], requests: Sequence[Request]
    ) -> list[NDArray[np.int64] | None]:
        """Return the ids that greedy decoding puts after each prompt, the same on every rank.

        None: the model's output is not a finite number.
        """
        streams = [AnswerStream(request, self._tokenizer) for request in requests]
        room = [request.max_new_tokens for request in requests]
        broken: set[int] = set()
        self._check_memory(prompts, new_tokens=sum(room))
        with inference(self._model):
            hidden_BD, keys = self._begin(prompts, wanted=[1] * len(prompts), room=room)
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
                    ids_B = torch.from_numpy(last).to(self._mesh.device)
                    with self._share.a_pass(self._share.steps(1)):
                        hidden_BD = hidden_states(self._model, ids_B, keys.next(active))  # type: ignore[arg-type]
        return [
            None if sequence in broken else np.array(stream.ids, np.int64)
            for sequence, stream in enumerate(streams)
        ]

    def _begin(
        self, sequences: list[NDArray[np.int64]], *, wanted: Sequence[int], room: Sequence[int] | None
    ) -> tuple[torch.Tensor, HeldKeys | None]:
        """Read the sequences.

        Returns:
            The hidden states of the last `wanted` tokens of each, [A, D] on every rank; and the keys, with room for
            `room` more tokens of each, None where none are wanted.
        """
        borders = boundaries(sequences)
        hidden_TD, documents = self._read(sequences, keep=room is not None)
        ends = zip(borders[1:], wanted)
        places = np.concatenate([np.arange(end - count, end) for end, count in ends])
        own = documents.indices
        rows = np.minimum(np.searchsorted(own, places), len(own) - 1)
        hidden_AD = self._stripes.collect(hidden_TD, rows, own[rows] == places)
        if room is None:
            return hidden_AD, None
        assert isinstance(documents, KeepingDocuments)
        held = held_rows(documents, borders)
        return hidden_AD, HeldKeys(documents.kept, held, np.diff(borders).tolist(), room, self._stripes)

    def _check_memory(self, sequences: Sequence[NDArray[Any]], *, new_tokens: int) -> None:
        """Refuse what does not fit into the memory of a rank, on all of them, before anything is run."""
        device = self._mesh.device
        tokens = self._stripes.most(sum(len(ids) for ids in sequences) + new_tokens)
        refuse_excess(
            cache_tokens=tokens,
            cache_bytes=cache_bytes_per_token(self._model, upcasts=choose_kernel(device).upcasts),
            activations=pass_bytes(self._model, tokens) + dense_bytes(self._model, tokens),
            available=shared_memory(device, self._mesh.cp_group),
            device=device,
        )

    def _most_likely(self, hidden_BD: torch.Tensor) -> list[int]:
        """Return the most likely next token of each sequence; -1 where the logits are not finite numbers."""
        found = predict(output_head(self._model), hidden_BD)
        tokens, highest = self._stripes.agreed(found.ids, found.highest)
        return [token if math.isfinite(logit) else -1 for token, logit in zip(tokens, highest)]

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


def _begin_alike(requests: Sequence[Request]) -> bool:
    """Return whether a prefix tree of the prompts has so much fewer tokens that reading it pays; see `LEAST_SHARED`."""
    prompts = [prompt_of(request) for request in requests]
    tokens = sum(len(strand.ids) for strand in build_tree(prompts).strands())
    return tokens <= (1 - LEAST_SHARED) * sum(len(prompt) for prompt in prompts)
