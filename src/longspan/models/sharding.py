"""Context parallelism in a training loop of your own: one batch in, this rank's part of it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.kernels.loss import IGNORE_LABEL
from longspan.models.hf_config import window_of_all_layers
from longspan.models.mixers import check_states
from longspan.models.rotary import varying_ropes
from longspan.parallel.layout import Layout
from longspan.parallel.mesh import Mesh
from longspan.parallel.schedules import CpSchedule, ScheduleName, build_schedule
from longspan.parallel.sharded_documents import ShardedDocuments
from longspan.parallel.shards import SequenceShards

__all__ = ["SCHEDULE_ATTRIBUTE", "attach_schedule", "shard_batch"]

SCHEDULE_ATTRIBUTE = "longspan_schedule"


def attach_schedule(
    model: PreTrainedModel, name: ScheduleName, mesh: Mesh, *, num_heads: int, num_kv_heads: int
) -> None:
    """Let `shard_batch` spread rows for this model; see `models.hf.enable`.

    Raises:
        ArgumentError: heads that cannot be spread, or degrees that the schedule has no use for.
    """
    schedule = build_schedule(name, ring_group=mesh.ring_group, ulysses_group=mesh.ulysses_group)
    schedule.check_heads(num_heads, num_kv_heads)
    check_states(model, schedule.world)
    setattr(model, SCHEDULE_ATTRIBUTE, schedule)


def shard_batch(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
    layout: Layout | None = None,
) -> dict[str, Any]:
    """Return this rank's part of a batch, as keywords for `model(**batch)`.

    All ranks that share the sequence call it with the same batch. Labels are shifted before they are spread, so
    that the label of a rank's last token is not lost. The loss that the model returns is this rank's share of
    the mean over all labels: shares add up to it, and gradients are to be summed over the ranks, not averaged.

    Args:
        model: a model from `enable(model, schedule=..., mesh=...)`.
        input_ids: int64 [tokens] or [rows, tokens]; rows are laid end to end.
        labels: like `input_ids`, not shifted, -100 where nothing is trained; None = `input_ids`.
        cu_seqlens: document borders over all tokens, [documents + 1]; None = each row is one document.
        layout: which tokens a rank holds; None = the schedule's own choice.

    Returns:
        input_ids, position_ids, labels and shift_labels (both the shifted ones), each int64 [1, tokens of this
        rank], documents, num_items_in_batch (labels of all ranks) and use_cache=False.

    Raises:
        ArgumentError: a model without a schedule, or whose RoPE depends on the length, a batch without tokens, a padded
            batch in disguise (borders that do not fit the tokens), labels of another shape, or no label at all.
    """
    schedule: CpSchedule | None = getattr(model, SCHEDULE_ATTRIBUTE, None)
    if schedule is None:
        raise ArgumentError(
            f"this {type(model).__name__} has no schedule to spread rows by",
            fix='call longspan.enable(model, schedule="ring", mesh=longspan.build_mesh(...)) first',
        )
    if varying := varying_ropes(model):
        raise ArgumentError(
            f"RoPE of type {varying[0].kind} depends on the longest position, and each rank sees another",
            fix="fix its length: longspan.enable(model, schedule=..., mesh=..., context=65536)",
        )
    labels = input_ids if labels is None else labels
    if labels.shape != input_ids.shape:
        raise ArgumentError(
            "labels and tokens differ in shape", found=f"{list(labels.shape)} and {list(input_ids.shape)}"
        )
    if not input_ids.numel() or input_ids.ndim < 1:
        raise ArgumentError(
            "a batch has tokens, [tokens] or [rows, tokens]", found=f"shape {list(input_ids.shape)}"
        )
    row = input_ids.shape[-1]
    ids, targets = input_ids.reshape(-1), labels.reshape(-1)
    if cu_seqlens is None:
        borders = np.arange(0, len(ids) + 1, row)
    else:
        borders = np.array(cu_seqlens.cpu() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens)
        if borders.ndim != 1 or len(borders) < 2 or borders[-1] != len(ids):
            raise ArgumentError(
                "cu_seqlens does not fit the tokens",
                found=f"{borders.reshape(-1)[-3:].tolist()} at the end, {len(ids)} tokens",
                fix="give the borders of all documents, from 0 to the number of tokens, padding included",
            )
    shards = SequenceShards(
        layout or schedule.layouts[0], borders, schedule.world, window=window_of_all_layers(model.config)
    )
    documents = ShardedDocuments(shards, schedule)
    shifted = torch.cat((targets[1:], targets.new_full((1,), IGNORE_LABEL)))
    # A document's last token predicts nothing.
    last = borders[1:][np.diff(borders) > 0] - 1
    shifted[torch.from_numpy(last).to(shifted.device)] = IGNORE_LABEL
    num_labels = int((shifted != IGNORE_LABEL).sum())
    if num_labels == 0:
        raise ArgumentError("a batch without a label trains nothing", found=f"{len(ids)} tokens")
    local = documents.take(shifted, padding=IGNORE_LABEL)[None]
    return {
        "input_ids": documents.take(ids, padding=0)[None],
        "position_ids": documents.positions(ids.device)[None],
        "documents": documents,
        "labels": local,
        "shift_labels": local,
        "num_items_in_batch": num_labels,
        "use_cache": False,
    }
