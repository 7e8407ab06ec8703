"""A model in this process, asked the plain way: every prompt is read from its first token.

The slow twin of what reuses prefixes, by the same names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.data.tokenizer import Tokenizer
from longspan.infer.answer_stream import AnswerStream
from longspan.infer.flops import ModelFlops
from longspan.infer.generate import NotFiniteError, generate_greedy
from longspan.infer.length_rope import fixed_frequencies
from longspan.infer.memory import memory_errors
from longspan.infer.packed import inference, packed_hidden_states
from longspan.infer.perplexity import token_nll
from longspan.infer.requests import NOT_FINITE, Answer, Request, before_stop
from longspan.infer.share import Share
from longspan.infer.thinking import split_thoughts
from longspan.kernels.head import predict
from longspan.models.head import output_head


class InProcess:
    """A model in this process: what its answerers have in common. It computes losses of windows by itself."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        identity: Mapping[str, Any],
        max_length: int | None,
        batch_tokens: int,
    ) -> None:
        self.identity, self.max_length = identity, max_length
        self._model, self._tokenizer, self._batch_tokens = model, tokenizer, batch_tokens
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._flops = ModelFlops.of_model(model)

    def work_of(self, tokens: int) -> float:
        """Return the operations of reading a prompt; see `infer.requests.work_of`."""
        return self._flops.reading(0, tokens)

    def token_nll(self, windows: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Return the losses of windows; see `infer.perplexity.token_nll`."""
        refuse_unknown_ids(windows, self._vocabulary)
        return token_nll(self._model, windows, batch_tokens=self._batch_tokens)

    def close(self) -> None:
        """Do nothing: the model belongs to the caller."""


class PlainAnswerer(InProcess):
    """Answers requests one by one, in their order.

    Args:
        model: with longspan's attention.
        tokenizer: decodes the answers.
        identity: what records say of the model.
        max_length: longer requests are answered with an error; None = no limit.
        batch_tokens: tokens in one forward pass of `generate`; `score` reads a prompt in one pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        identity: Mapping[str, Any],
        max_length: int | None = None,
        batch_tokens: int,
    ) -> None:
        super().__init__(
            model, tokenizer, identity=identity, max_length=max_length, batch_tokens=batch_tokens
        )
        self._share = Share(model)

    def watch(self, on_share: Callable[[float], None] | None) -> bool:
        """Report progress while a call answers: the share of its work that is done; see `infer.requests.Watched`."""
        self._share.on_share = on_share
        return True

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Continue each prompt greedily."""
        refuse_unknown_tokens(requests, self._vocabulary)
        work = [self._work(request, request.max_new_tokens) for request in requests]
        self._share.begin(sum(work))
        for index, request in enumerate(requests):
            with self._share.part(work[index]):
                answer = self._answer(request, AnswerStream(request, self._tokenizer))
            yield index, answer

    def generate_stream(self, request: Request, on_text: Callable[[str], None]) -> Answer:
        """Continue a prompt greedily; `on_text` is given the answer piece by piece as it comes."""
        refuse_unknown_tokens([request], self._vocabulary)
        return self._answer(request, AnswerStream(request, self._tokenizer, on_text=on_text))

    def _answer(self, request: Request, stream: AnswerStream) -> Answer:
        started = time.monotonic()
        prompt_ids = prompt_of(request)
        excess = excess_error(request, self.max_length)
        if excess is not None:
            return Answer("", error=excess, prompt_tokens=len(prompt_ids))
        try:
            with memory_errors(self._model.device, doing=f"{len(prompt_ids):,} tokens are continued"):
                ids = generate_greedy(
                    self._model,
                    prompt_ids,
                    max_new_tokens=request.max_new_tokens,
                    push=stream.push,
                    batch_tokens=self._batch_tokens,
                    a_pass=self._a_pass,
                )
        except NotFiniteError:
            return Answer("", error=NOT_FINITE, prompt_tokens=len(prompt_ids))
        return finished(request, ids, self._tokenizer, seconds=time.monotonic() - started)

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Measure each given answer after its prompt."""
        refuse_unknown_tokens(requests, self._vocabulary)
        work = [self._work(request, 1) for request in requests]
        self._share.begin(sum(work))
        for index, request in enumerate(requests):
            started = time.monotonic()
            prompt_ids, answer_ids = prompt_of(request), answer_of(request)
            excess = excess_error(request, self.max_length)
            if excess is not None:
                yield index, Answer("", error=excess, prompt_tokens=len(prompt_ids))
                continue
            reading = memory_errors(self._model.device, doing=f"{len(prompt_ids):,} tokens are read")
            with reading, self._share.part(work[index]), self._share.a_pass(work[index]):
                nll, argmax_ids = teacher_forced(self._model, prompt_ids, answer_ids)
            seconds = time.monotonic() - started
            yield index, scored(request, nll, argmax_ids, self._tokenizer, seconds=seconds)

    def _work(self, request: Request, new_tokens: int) -> float:
        """Return the work of a request; 0 for one that is too long."""
        if excess_error(request, self.max_length) is not None:
            return 0.0
        return self._share.reading(0, len(prompt_of(request))) + self._share.steps(new_tokens - 1)

    def _a_pass(self, start: int, tokens: int) -> AbstractContextManager[None]:
        work = self._share.steps(1) if start and tokens == 1 else self._share.reading(start, tokens)
        return self._share.a_pass(work)


def teacher_forced(
    model: PreTrainedModel, prompt_ids: np.ndarray, answer_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the model predicts at each position of an answer, given the prompt and the answer before it.

    Greedy generation gives the answer exactly when the most likely token is the right one at every position.
    One forward pass; logits exist for a chunk of the answer at a time.

    Returns:
        Negative log-likelihoods of the answer's tokens in nats, float32 `[answer]`, and the most likely tokens,
        int64 `[answer]`.
    """
    # The last answer token is predicted, never read: prompt [p0 p1], answer [a0 a1] runs [p0 p1 a0], and the
    # hidden states of p1 and a0 predict a0 and a1.
    ids = np.concatenate([prompt_ids, answer_ids[:-1]])
    with fixed_frequencies(model, len(prompt_ids)), inference(model):
        hidden_AD = packed_hidden_states(model, [ids])[-len(answer_ids) :]
        found = predict(output_head(model), hidden_AD, torch.from_numpy(answer_ids.astype(np.int64)))
        assert found.nll is not None
        return found.nll.cpu().numpy(), found.ids.cpu().numpy()


def refuse_unknown_tokens(requests: Sequence[Request], vocabulary: int) -> None:
    """Raise ArgumentError for a request with a token that the model has no embedding of."""
    ids = [part for request in requests for part in (request.prompt_ids, request.answer_ids)]
    refuse_unknown_ids([part for part in ids if part is not None], vocabulary)


def refuse_unknown_ids(sequences: Sequence[np.ndarray], vocabulary: int) -> None:
    """Raise ArgumentError for a token id that the model has no embedding of: an index error, on GPUs an abort."""
    largest = max((int(np.max(ids)) for ids in sequences if len(ids)), default=0)
    if largest >= vocabulary:
        raise ArgumentError(
            "the tokenizer is not the model's",
            found=f"token {largest:,}",
            allowed=f"below {vocabulary:,}, the words that the model knows",
            fix="name the model's own with --tokenizer",
        )


def prompt_of(request: Request) -> np.ndarray:
    """Return the prompt's ids. Raises ArgumentError where there are none."""
    if request.prompt_ids is None or len(request.prompt_ids) == 0:
        raise ArgumentError("a model that is run here is asked in token ids", found=repr(request.prompt[:40]))
    return request.prompt_ids


def answer_of(request: Request) -> np.ndarray:
    """Return the ids to be measured. Raises ArgumentError where there are none."""
    if request.answer_ids is None or len(request.answer_ids) == 0:
        raise ArgumentError("no answer to measure", found=repr(request.prompt[-40:]))
    return request.answer_ids


def excess_error(request: Request, max_length: int | None) -> str | None:
    """Return why a request is too long for a limit; None: it fits."""
    answer = request.max_new_tokens if request.answer_ids is None else len(request.answer_ids)
    tokens = len(prompt_of(request)) + answer
    if max_length is None or tokens <= max_length:
        return None
    return f"prompt and answer have {tokens} tokens, at most {max_length} are allowed"


def finished(request: Request, ids: np.ndarray, tokenizer: Tokenizer, *, seconds: float) -> Answer:
    """Return the answer that generated ids are: without thoughts and stop ids, cut at its first stop text."""
    stopped = len(ids) > 0 and int(ids[-1]) in request.stop_ids
    whole = tokenizer.decode(ids[:-1] if stopped else ids)
    spoken = split_thoughts(whole, opened=request.thinking == "opened")
    text = before_stop(spoken.answer, request.stop)
    return Answer(
        text,
        ids,
        "stop" if stopped or text != spoken.answer else "length",
        prompt_tokens=len(prompt_of(request)),
        completion_tokens=len(ids),
        seconds=seconds,
        thoughts=spoken.thoughts,
    )


def scored(
    request: Request, nll: np.ndarray, argmax_ids: np.ndarray, tokenizer: Tokenizer, *, seconds: float
) -> Answer:
    """Return the answer of `score`: the most likely tokens, and the losses of those given."""
    return Answer(
        tokenizer.decode(argmax_ids),
        argmax_ids,
        nll=nll,
        prompt_tokens=len(prompt_of(request)),
        completion_tokens=len(argmax_ids),
        seconds=seconds,
    )
