"""Teacher-forced scoring: how likely a given answer is after a prompt, and whether greedy decoding finds it.

One forward pass gives the prediction at every answer position, with the true answer as context. Greedy
generation reproduces the answer exactly when the most likely token is the right one at every position, so
`correct` is the result of greedy decoding at the price of one pass. Logits exist at answer positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.infer.packed import boundaries, inference, packed_hidden_states, plan_batches
from longspan.models.hf import lm_head_weight

# Shape suffixes: A = answer tokens of all requests of a batch, D = model width, V = vocabulary.


class ScoreRequest(NamedTuple):
    """A prompt and the answer to be scored after it; integer token ids `[prompt]` and `[answer]`."""

    prompt_ids: np.ndarray
    answer_ids: np.ndarray


class ScoreResult(NamedTuple):
    """What the model predicts at each answer position, given the prompt and the true answer before it."""

    nll: np.ndarray
    """Negative log-likelihood of each answer token in nats, float32 `[answer]`."""
    argmax_ids: np.ndarray
    """The most likely token at each answer position, int64 `[answer]`."""
    correct: bool
    """Whether every most likely token is the answer's token."""


def score(
    model: PreTrainedModel, requests: Sequence[ScoreRequest], *, batch_tokens: int
) -> list[ScoreResult]:
    """Score every request, in the order given; batches of similar length hold at most `batch_tokens` tokens.

    A request longer than `batch_tokens` is run alone. Memory for logits is answer tokens x vocabulary.

    Raises:
        ArgumentError: a prompt or an answer is empty.
    """
    for index, request in enumerate(requests):
        if len(request.prompt_ids) == 0 or len(request.answer_ids) == 0:
            raise ArgumentError(
                f"request {index} cannot be scored",
                found=f"{len(request.prompt_ids)} prompt and {len(request.answer_ids)} answer tokens",
                allowed="at least one of each",
            )
    lengths = [len(request.prompt_ids) + len(request.answer_ids) - 1 for request in requests]
    results: list[ScoreResult | None] = [None] * len(requests)
    with inference(model):
        for batch in plan_batches(lengths, batch_tokens):
            for index, result in zip(batch, _score_batch(model, [requests[index] for index in batch])):
                results[index] = result
    return [result for result in results if result is not None]


def _score_batch(model: PreTrainedModel, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
    # The last answer token is predicted, never read: prompt [p0 p1], answer [a0 a1] runs [p0 p1 a0], and
    # the hidden states of p1 and a0 predict a0 and a1.
    sequences = [np.concatenate([request.prompt_ids, request.answer_ids[:-1]]) for request in requests]
    ends = boundaries(sequences)[1:]
    rows_A = np.concatenate(
        [np.arange(end - len(request.answer_ids), end) for end, request in zip(ends, requests)]
    )
    labels_A = np.concatenate([request.answer_ids for request in requests]).astype(np.int64)
    hidden_TD = packed_hidden_states(model, sequences)
    hidden_AD = hidden_TD[torch.from_numpy(rows_A).to(hidden_TD.device)]
    logits_AV = torch.nn.functional.linear(hidden_AD, lm_head_weight(model)).float()
    log_probs_AV = torch.log_softmax(logits_AV, dim=-1)
    target_A1 = torch.from_numpy(labels_A)[:, None].to(log_probs_AV.device)
    nll_A = -log_probs_AV.gather(1, target_A1)[:, 0].cpu().numpy()
    argmax_A = logits_AV.argmax(dim=-1).cpu().numpy()
    results = []
    start = 0
    for request in requests:
        part = slice(start, start + len(request.answer_ids))
        correct = bool((argmax_A[part] == labels_A[part]).all())
        results.append(ScoreResult(nll_A[part], argmax_A[part], correct))
        start = part.stop
    return results
