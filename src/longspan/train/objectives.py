"""Objectives: small functions of a batch and its last hidden states that return a loss SUM.

The trainer divides by the weight of the whole optimizer step, so micro-batches, rows and ranks with few labels
count by their tokens and not by their number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import nn

from longspan.kernels.distill import linear_distillation
from longspan.kernels.head import Head
from longspan.kernels.loss import LossSum, linear_cross_entropy
from longspan.models.documents import Documents
from longspan.models.head import output_head
from longspan.models.hf import hidden_states
from longspan.models.routing import Routing
from longspan.train.batch import Batch
from longspan.train.config import StageConfig
from longspan.train.loop_config import DistillConfig

Loss = Callable[[Batch, torch.Tensor, Head], LossSum]
"""From a batch and its last hidden states [tokens, hidden] to the loss sum."""


def next_token(batch: Batch, hidden_TD: torch.Tensor, head: Head) -> LossSum:
    """Cross-entropy of the next token, weighted by the batch's loss weights.

    `hidden_TD` [tokens, hidden]. The mask column makes it supervised
    fine-tuning: tokens of weight 0 are read but not learnt.
    """
    return linear_cross_entropy(
        hidden_TD, head, batch.labels, loss_weights=batch.loss_weights, places=batch.places
    )


def distill(batch: Batch, hidden_TD: torch.Tensor, head: Head, how: DistillConfig) -> LossSum:
    """Divergence from the batch's teacher, mixed with the cross-entropy of the next token.

    Each token's mix weighs what its label weighs, so a step is divided as in `next_token`. Tokens without a teacher
    (the frame of a document, rows of another stream) and batches without one (validation) are those of `next_token`.
    """
    if batch.teacher is None:
        return next_token(batch, hidden_TD, head)
    return linear_distillation(
        hidden_TD,
        head,
        batch.labels,
        batch.teacher,
        distill_weight=how.weight,
        temperature=how.temperature,
        loss_weights=batch.loss_weights,
        places=batch.places,
    )


OBJECTIVES: dict[str, Callable[[StageConfig], Loss]] = {
    "lm": lambda stage: next_token,
    "sft": lambda stage: next_token,
    "distill": lambda stage: partial(distill, how=stage.distill or DistillConfig()),
}
"""What a stage minimises, by `StageConfig.objective`."""


class ModelWithLoss(nn.Module):
    """A causal language model whose forward pass ends in its objective.

    One module runs everything that has parameters, so FSDP can gather the output embedding, which is no layer that
    is called, where the loss needs it, and reduce its gradient with the others'.
    """

    def __init__(self, model: nn.Module, loss: Loss = next_token) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.routing: Routing | None = None
        """Of a mixture of experts: counts what its routers do."""

    def forward(self, batch: Batch) -> LossSum:
        """Return the loss sum of a batch."""
        # A table for a row that is spread over ranks stands in for one of a whole row.
        documents = cast(Documents, batch.documents)
        if self.routing is not None:
            self.routing.tokens(batch.real_tokens())
        hidden_TD = hidden_states(self.model, batch.input_ids, documents, position_ids=batch.positions)
        return self.loss(batch, hidden_TD, output_head(self.model))
