"""Per-token losses of token windows, from which perplexities by position, length or source are summed.

Sums over tokens are kept, never means of means: perplexity is exp(sum of nll / number of tokens), taken once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.infer.length_rope import fixed_frequencies, plan_alike_batches
from longspan.infer.packed import boundaries, inference, packed_hidden_states
from longspan.kernels.loss import IGNORE_LABEL, linear_cross_entropy
from longspan.models.head import output_head


def token_nll(
    model: PreTrainedModel, windows: Sequence[np.ndarray], *, batch_tokens: int
) -> list[np.ndarray]:
    """Return for each window of n token ids the n - 1 negative log-likelihoods in nats, float32.

    Item i belongs to token i + 1, predicted from the i + 1 tokens before it; the first token has none,
    as no begin-of-text token is put in front. Windows are run several at a time, without padding, up to
    `batch_tokens` tokens; a longer window is run alone. Logits exist for a chunk of tokens at a time.

    Raises:
        ArgumentError: a window has fewer than two tokens.
    """
    check_windows(windows)
    losses: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(windows)
    lengths = [len(ids) for ids in windows]
    batches = plan_alike_batches(
        model, range(len(windows)), lengths, prompts=lengths, batch_tokens=batch_tokens
    )
    with inference(model):
        for batch in batches:
            with fixed_frequencies(model, lengths[batch[0]]):
                found = _batch_nll(model, [windows[index] for index in batch])
            for index, nll in zip(batch, found):
                losses[index] = nll
    return losses


def check_windows(windows: Sequence[np.ndarray]) -> None:
    """Refuse windows with nothing to predict. Raises ArgumentError."""
    for index, ids in enumerate(windows):
        if len(ids) < 2:
            raise ArgumentError(
                f"window {index} has nothing to predict", found=f"{len(ids)} tokens", allowed=">= 2"
            )


def _batch_nll(model: PreTrainedModel, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
    borders = boundaries(windows)
    hidden = packed_hidden_states(model, windows)
    labels = np.full(borders[-1], IGNORE_LABEL, dtype=np.int64)
    for ids, start, end in zip(windows, borders[:-1], borders[1:]):
        labels[start : end - 1] = ids[1:]
    loss = linear_cross_entropy(hidden, output_head(model), torch.from_numpy(labels).to(hidden.device))
    nll = loss.per_token_nll.float().cpu().numpy()
    return [nll[start : end - 1].copy() for start, end in itertools.pairwise(borders)]
