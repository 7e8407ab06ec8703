"""A step of a mixture of experts: its choices counted before it is made, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from longspan.core.heartbeat import beat
from longspan.kernels.loss import IGNORE_LABEL
from longspan.models.routing import Routing, RoutingReport
from longspan.train.batch import Batch
from longspan.train.objectives import ModelWithLoss
from longspan.train.recurrent import walk_through

__all__ = ["count_choices", "routing_record"]


def count_choices(
    model: ModelWithLoss,
    routing: Routing,
    batches: Iterable[Batch],
    *,
    chunk_tokens: int | None,
    offload: bool,
    device: torch.device,
) -> None:
    """Make a forward pass of all micro-batches of a step, where routers have losses that need its choices first.

    `chunk_tokens` and `offload` are those of `recurrent_step`. Costs about a third of the step.
    """
    if not routing.has_losses:
        return
    with routing.counting():
        for batch in batches:
            beat()
            if chunk_tokens is None:
                unlabelled = torch.full_like(batch.labels, IGNORE_LABEL)
                model(batch._replace(labels=unlabelled).to(device))
            else:
                walk_through(model, batch, chunk_tokens=chunk_tokens, offload=offload, device=device)


def routing_record(routing: RoutingReport) -> dict[str, Any]:
    """Return what metrics.jsonl says of the routers of a step; no token is dropped, as in transformers."""
    record: dict[str, Any] = {}
    if routing.max_load:
        record["experts"] = {
            "max_load": round(max(routing.max_load), 4),
            "entropy": round(min(routing.entropy), 4),
            "dropped": 0,
            "max_load_by_layer": [round(each, 4) for each in routing.max_load],
            "entropy_by_layer": [round(each, 4) for each in routing.entropy],
        }
    losses = {"router_aux_loss": routing.aux_loss, "router_z_loss": routing.z_loss}
    return record | {name: value for name, value in losses.items() if value is not None}
