"""Several sequences in one forward pass, without padding.

Sequences of any length are laid end to end as one row `[1, tokens]` with a document table, so that each
one attends to itself only and has positions from 0. No token is spent on padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.models.hf import Documents, hidden_states

# Shape suffixes: T = tokens of all sequences together.


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group the indices of `lengths` into batches of at most `batch_tokens` tokens, longest first.

    A sequence longer than `batch_tokens` is a batch of its own. Longest first, because what does not fit
    into memory should fail at once: `plan_batches([2, 5, 3], 5)` is `[[1], [2, 0]]`.

    Raises:
        ArgumentError: `batch_tokens` is not positive.
    """
    if batch_tokens < 1:
        raise ArgumentError("batch_tokens must be positive", found=batch_tokens)
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if not batches or lengths[index] > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def boundaries(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Return the int64 borders of the sequences laid end to end: lengths 3 and 2 give `[0, 3, 5]`."""
    return np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])]).astype(np.int64)


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Switch gradients and dropout off; the model is back in its former mode afterwards."""
    was_training = model.training
    if was_training:  # which goes through all modules
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()


def packed_hidden_states(model: PreTrainedModel, sequences: Sequence[np.ndarray]) -> torch.Tensor:
    """Run the model over the sequences laid end to end; return its last hidden states `[tokens, width]`.

    The language-model head is not applied: logits of whole sequences never exist.

    Raises:
        ArgumentError: a sequence is empty.
    """
    if not sequences or any(len(ids) == 0 for ids in sequences):
        raise ArgumentError("an empty sequence cannot be run", found=[len(ids) for ids in sequences])
    ids_T = torch.from_numpy(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sequences]))
    documents = Documents.from_cu_seqlens(boundaries(sequences))
    return hidden_states(model, ids_T.to(model.device), documents)
