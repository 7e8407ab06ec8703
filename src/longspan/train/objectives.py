"""Objectives: small functions of a batch and its last hidden states that return a loss SUM.

The trainer divides by the weight of the whole optimizer step, so micro-batches, rows and ranks with few labels
count by their tokens and not by their number.
"""

from __future__ import annotations

import torch

from longspan.kernels.loss import LossSum, linear_cross_entropy
from longspan.train.batch import Batch


def next_token(batch: Batch, hidden_TD: torch.Tensor, head_VD: torch.Tensor) -> LossSum:
    """Cross-entropy of the next token, weighted by the batch's loss weights.

    `hidden_TD` [tokens, hidden], `head_VD` [vocabulary, hidden]. The mask column makes it supervised
    fine-tuning: tokens of weight 0 are read but not learnt.
    """
    return linear_cross_entropy(hidden_TD, head_VD, batch.labels, loss_weights=batch.loss_weights)
