"""A model in this process, asked so that prompts which begin alike share what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.data.tokenizer import Tokenizer
from longspan.infer.answer_stream import AnswerStream
from longspan.infer.engine import Engine
from longspan.infer.jobs import Counters, Job, JobOutcome
from longspan.infer.kv_types import KvDtype
from longspan.infer.length_rope import alike
from longspan.infer.memory import available_memory
from longspan.infer.perplexity import check_windows
from longspan.infer.plain import (
    InProcess,
    answer_of,
    excess_error,
    finished,
    prompt_of,
    refuse_unknown_ids,
    refuse_unknown_tokens,
    scored,
)
from longspan.infer.requests import NOT_FINITE, Answer, Request
from longspan.infer.stripes import WHOLE, Stripes
from longspan.models.hf_config import is_latent


class LocalAnswerer(InProcess):
    """Answers requests together; `infer.plain.PlainAnswerer` is its slow twin and gives the same answers.

    Args:
        model: with longspan's attention.
        tokenizer: decodes the answers.
        identity: what records say of the model.
        max_length: longer requests are answered with an error; None = no limit.
        batch_tokens: tokens in one forward pass.
        cache_tokens: tokens of branches whose keys are held at once; see `infer.engine.Engine`.
        available: tells the free bytes of a device; all ranks have to be told the same.
        stripes: which tokens this rank has of what is read.
        kv_dtype: type in which keys and values are held (`infer.kv_types`). None: as they are computed.

    Raises:
        ArgumentError: a cache that `kv_dtype` does not hold as the model's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        identity: Mapping[str, Any],
        max_length: int | None = None,
        batch_tokens: int,
        cache_tokens: int | None = None,
        available: Callable[[torch.device], int | None] = available_memory,
        stripes: Stripes = WHOLE,
        kv_dtype: KvDtype | None = None,
    ) -> None:
        super().__init__(
            model, tokenizer, identity=identity, max_length=max_length, batch_tokens=batch_tokens
        )
        if kv_dtype is not None and is_latent(model.config):
            raise ArgumentError(
                "a smaller KV cache would not be this model's: it keeps one latent value a token, and here the keys "
                "and values that are made of it are held",
                found=f"{type(model).__name__} with --kv-dtype {kv_dtype}",
                fix="leave out --kv-dtype, or ask a server that holds latent values",
            )
        self._engine = Engine(
            model,
            batch_tokens=batch_tokens,
            cache_tokens=cache_tokens,
            available=available,
            stripes=stripes,
            kv_dtype=kv_dtype,
        )
        self._on_share: Callable[[float], None] | None = None

    def watch(self, on_share: Callable[[float], None] | None) -> bool:
        """Report progress while a call answers: the share of its work that is done; see `infer.requests.Watched`."""
        self._on_share = on_share
        return True

    @property
    def counters(self) -> Counters:
        """What has been run so far."""
        return self._engine.counters

    @property
    def flops(self) -> float:
        """Floating-point operations so far."""
        return self._engine.flops

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Continue each prompt greedily.

        Raises:
            ArgumentError: a request without token ids.
            RunError: not enough memory.
        """
        yield from self._generate(requests, [None] * len(requests))

    def generate_stream(self, request: Request, on_text: Callable[[str], None]) -> Answer:
        """Continue a prompt greedily; `on_text` is given the answer piece by piece as it comes.

        The pieces are the answer's text, but for bytes that are not text.
        """
        return next(answer for _, answer in self._generate([request], [on_text]))

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Measure each given answer after its prompt.

        Raises:
            ArgumentError: a request without token ids, or without an answer.
            RunError: not enough memory.
        """
        refuse_unknown_tokens(requests, self._vocabulary)
        fitting = []
        for index, request in enumerate(requests):
            answer_of(request)
            if (error := self._error(request)) is not None:
                yield index, error
            else:
                fitting.append(index)

        def job(index: int) -> Job:
            prompt_ids, answer_ids = prompt_of(requests[index]), answer_of(requests[index])
            # The last answer token is predicted, never read.
            ids = np.concatenate([prompt_ids, answer_ids[:-1]]).astype(np.int64)
            return Job(ids, wanted=len(answer_ids), targets=answer_ids)

        for index, outcome in self._run(requests, fitting, job):
            assert outcome.nll is not None
            yield (
                index,
                scored(
                    requests[index],
                    outcome.nll,
                    outcome.argmax_ids,
                    self._tokenizer,
                    seconds=outcome.seconds,
                ),
            )

    def token_nll(self, windows: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Return the losses of windows; see `infer.perplexity.token_nll`. Of a smaller cache, through it."""
        if self._engine.kv_dtype is None:
            return super().token_nll(windows)
        check_windows(windows)
        refuse_unknown_ids(windows, self._vocabulary)
        losses: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(windows)
        lengths = [len(ids) for ids in windows]
        for group in alike(self._model, range(len(windows)), lengths):
            ids = [np.asarray(windows[index], dtype=np.int64) for index in group]
            jobs = [Job(each[:-1], wanted=len(each) - 1, targets=each[1:]) for each in ids]
            for place, outcome in self._engine.run(jobs, length=lengths[group[0]]):
                assert outcome.nll is not None
                losses[group[place]] = outcome.nll
        return losses

    def _generate(
        self, requests: Sequence[Request], listeners: Sequence[Callable[[str], None] | None]
    ) -> Iterator[tuple[int, Answer]]:
        refuse_unknown_tokens(requests, self._vocabulary)
        fitting = []
        for index, request in enumerate(requests):
            if (error := self._error(request)) is not None:
                yield index, error
            elif request.max_new_tokens < 1:
                yield index, finished(request, np.empty(0, np.int64), self._tokenizer, seconds=0.0)
            else:
                fitting.append(index)

        def job(index: int) -> Job:
            request = requests[index]
            stream = AnswerStream(request, self._tokenizer, on_text=listeners[index])
            ids = np.asarray(prompt_of(request), dtype=np.int64)
            return Job(ids, max_new_tokens=request.max_new_tokens, push=stream.push)

        for index, outcome in self._run(requests, fitting, job):
            answer = finished(requests[index], outcome.argmax_ids, self._tokenizer, seconds=outcome.seconds)
            if not outcome.finite:
                answer = Answer("", error=NOT_FINITE, prompt_tokens=answer.prompt_tokens)
            yield index, answer

    def _run(
        self, requests: Sequence[Request], indices: Sequence[int], job: Callable[[int], Job]
    ) -> Iterator[tuple[int, JobOutcome]]:
        """Run what can share what is read together, that with the longest prompts first.

        A key that is no number makes those of one kernel call that do not see it none either (0 * NaN is NaN), so
        what came out so is run again by itself, unless that is all.
        """
        prompts = [len(prompt_of(request)) for request in requests]
        longest_first = sorted(indices, key=lambda index: -prompts[index])
        whole, before = max(1, sum(prompts[index] for index in indices)), 0.0
        for group in alike(self._model, longest_first, prompts):
            length, weight = prompts[group[0]], sum(prompts[index] for index in group) / whole
            broken: list[tuple[int, JobOutcome]] = []
            self._engine.share.on_share = _part_of(self._on_share, before, weight)
            before += weight
            for place, outcome in self._engine.run([job(index) for index in group], length=length):
                if outcome.finite:
                    yield group[place], outcome
                else:
                    broken.append((group[place], outcome))
            if len(broken) == len(group):
                yield from broken
                continue
            self._engine.share.on_share = None
            for index, _ in broken:
                for _, outcome in self._engine.run([job(index)], length=length):
                    yield index, outcome

    def _error(self, request: Request) -> Answer | None:
        excess = excess_error(request, self.max_length)
        if excess is None:
            return None
        return Answer("", error=excess, prompt_tokens=len(prompt_of(request)))


def _part_of(
    on_share: Callable[[float], None] | None, before: float, weight: float
) -> Callable[[float], None] | None:
    """Return what is told of a part of some work that has the weight `weight` and comes after `before`."""
    return None if on_share is None else lambda share: on_share(before + weight * share)
