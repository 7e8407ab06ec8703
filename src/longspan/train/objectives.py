"""Objectives: small functions of a batch and its last hidden states that return a loss SUM.

The trainer divides by the weight of the whole optimizer step, so micro-batches, rows and ranks with few labels
count by their tokens and not by their number.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from longspan.kernels.loss import LossSum, linear_cross_entropy
from longspan.models.documents import Documents
from longspan.models.hf import hidden_states, lm_head_weight
from longspan.train.batch import Batch


def next_token(batch: Batch, hidden_TD: torch.Tensor, head_VD: torch.Tensor) -> LossSum:
    """Cross-entropy of the next token, weighted by the batch's loss weights.

    `hidden_TD` [tokens, hidden], `head_VD` [vocabulary, hidden]. The mask column makes it supervised
    fine-tuning: tokens of weight 0 are read but not learnt.
    """
    return linear_cross_entropy(hidden_TD, head_VD, batch.labels, loss_weights=batch.loss_weights)


class ModelWithLoss(nn.Module):
    """A causal language model whose forward pass ends in its objective.

    One module runs everything that has parameters, so FSDP can gather the output embedding, which is no layer that
    is called, where the loss needs it, and reduce its gradient with the others'.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> LossSum:
        """Return the loss sum of a batch."""
        # A table for a row that is spread over ranks stands in for one of a whole row.
        documents = cast(Documents, batch.documents)
        hidden_TD = hidden_states(self.model, batch.input_ids, documents, position_ids=batch.positions)
        return next_token(batch, hidden_TD, lm_head_weight(self.model))
