"""From packed rows to tensors: where data of training meet torch.

The label of a token is the next token of the same document; what a mask leaves out has none (the loss mask). In a loop
of your own `models.sharding` makes labels, for windows of validation and perplexity `infer.perplexity`. Rows are laid
end to end; their borders are document borders, so a batch is one sequence with one document table.

    ids        a b c | d e        cu_seqlens 0 3 5
    labels     b c - | e -        (- is IGNORE_LABEL)
    positions  0 1 2 | 0 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from longspan.data.rows.loader import PAD_SOURCE, PackedRow
from longspan.kernels.distill import TeacherTopK
from longspan.kernels.loss import IGNORE_LABEL
from longspan.kernels.transfers import to_device
from longspan.models.documents import Documents
from longspan.models.tree_documents import TreeDocuments
from longspan.parallel.sharded_documents import ShardedDocuments
from longspan.train.loop_config import LossAverage


class Batch(NamedTuple):
    """Several rows as one sequence of N tokens, made on the host; `to` has what a model computes with on its device."""

    input_ids: torch.Tensor
    """int64 [N]."""
    labels: torch.Tensor
    """int64 [N]; IGNORE_LABEL where nothing is trained."""
    loss_weights: torch.Tensor | None
    """float32 [N], the weight of each label; None when every label weighs the same."""
    positions: torch.Tensor
    """int64 [N], from 0 in every document; rising, with gaps where a row skips some."""
    sources: torch.Tensor
    """int64 [N], index into `source_names`."""
    source_names: tuple[str, ...]
    documents: Documents | ShardedDocuments
    lengths: torch.Tensor | None = None
    """int64 [N], tokens that the token's document has in its row, a branch with what it follows; None: not asked."""
    teacher: TeacherTopK | None = None
    """What a teacher predicts after each token, ids int32 [N, K]; None where no row has one."""
    places: torch.Tensor | None = None
    """int64 [L], the tokens that have a label; None: not found yet."""

    def to(self, device: torch.device) -> Batch:
        """Return it on the device, without what only the host asks for; ids and labels are words of the model."""
        places = (self.labels != IGNORE_LABEL).nonzero().squeeze(1)
        teacher = self.teacher and TeacherTopK(*(to_device(column, device) for column in self.teacher))
        return self._replace(
            input_ids=to_device(self.input_ids, device),
            labels=to_device(self.labels, device),
            loss_weights=None if self.loss_weights is None else to_device(self.loss_weights, device),
            positions=to_device(self.positions, device),
            teacher=teacher,
            places=to_device(places, device),
        )

    def real_tokens(self) -> torch.Tensor | None:
        """Return which tokens are none of padding, bool [N], where the ids are; None = all."""
        if PAD_SOURCE not in self.source_names:
            return None
        return to_device(self.sources != self.source_names.index(PAD_SOURCE), self.input_ids.device)


def total_weight(rows: Sequence[PackedRow]) -> float:
    """Return the sum of the loss weights of the labels in `rows`: what a step's loss is divided by."""
    total = 0.0
    for row in rows:
        weights = np.ones(len(row.input_ids)) if row.weights is None else row.weights.astype(np.float64)
        # The first token of a document is never a label.
        total += float(weights.sum() - weights[row.cu_seqlens[:-1]].sum())
    return total


def averaged(rows: Sequence[PackedRow], over: LossAverage) -> list[PackedRow]:
    """Return `rows` with weights under which the loss of a step is a mean over `over`.

    "tokens" and "steps" leave them as they are. "samples" and "rows" divide the weights of a document's, or a row's,
    labels by their sum, so each counts 1 and the step's total weight is the number of those that train at all.
    Because the weights say it all, accumulation, ranks and chunks need to know nothing of it. A part of a document in
    another row is a sample of its own.
    """
    if over in ("tokens", "steps"):
        return list(rows)
    return [row._replace(weights=_shares(row, over)) for row in rows]


def _shares(row: PackedRow, over: LossAverage) -> np.ndarray:
    """Return the weights of a row, float32 [T], that sum to 1 over the labels of each document or of all."""
    weights = np.ones(len(row.input_ids)) if row.weights is None else row.weights.astype(np.float64)
    starts = row.cu_seqlens[:-1]
    # The first token of a document is never a label, as in `total_weight`.
    weights[starts] = 0
    sums = np.add.reduceat(weights, starts)
    if over == "rows":
        sums = np.full_like(sums, sums.sum())
    weights /= np.repeat(np.where(sums > 0, sums, 1), np.diff(row.cu_seqlens))
    return weights.astype(np.float32)


def collate(rows: Sequence[PackedRow]) -> Batch:
    """Lay `rows` end to end as tensors on the host."""
    ids = np.concatenate([row.input_ids for row in rows])
    cu_seqlens = [0]
    sources: list[np.ndarray] = []
    names: dict[str, int] = {}
    for row in rows:
        ends = row.cu_seqlens[1:]
        start = cu_seqlens[-1]
        cu_seqlens.extend((start + ends).tolist())
        # Rows of different streams number their sources each in their own way.
        index = np.array([names.setdefault(name, len(names)) for name in row.source_names] or [0])
        of_tokens = row.token_sources
        sources.append(
            np.repeat(index[row.sources], np.diff(row.cu_seqlens)) if of_tokens is None else index[of_tokens]
        )
    last = np.array(cu_seqlens[1:]) - 1
    labels = np.roll(ids, -1)
    labels[last] = IGNORE_LABEL
    weights = _label_weights(rows, last)
    if weights is not None:
        labels[weights == 0] = IGNORE_LABEL
        if np.isin(weights, (0, 1)).all():
            weights = None
    documents = _table(rows, np.array(cu_seqlens, np.int64))
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        loss_weights=None if weights is None else torch.from_numpy(weights),
        positions=_positions(rows, documents),
        sources=torch.from_numpy(np.concatenate(sources)),
        source_names=tuple(names),
        documents=documents,
        lengths=torch.from_numpy(np.repeat(documents.lengths, np.diff(cu_seqlens))),
        teacher=_teacher(rows),
    )


def _table(rows: Sequence[PackedRow], cu_seqlens: np.ndarray) -> Documents:
    """Return the document table of rows laid end to end."""
    if all(row.branches is None for row in rows):
        return Documents.from_cu_seqlens(cu_seqlens)
    tables, first = [], 0
    for row in rows:
        table = row.follows
        table[:, 0] += np.where(table[:, 0] >= 0, first, 0)
        tables.append(table)
        first += len(table)
    return TreeDocuments(cu_seqlens, np.concatenate(tables))


def take(batch: Batch, documents: ShardedDocuments) -> Batch:
    """Return the tokens of a batch that this rank holds; padding is token 0 without a label."""
    weights = batch.loss_weights
    names = batch.source_names if PAD_SOURCE in batch.source_names else (*batch.source_names, PAD_SOURCE)
    return Batch(
        input_ids=documents.take(batch.input_ids, padding=0),
        labels=documents.take(batch.labels, padding=IGNORE_LABEL),
        loss_weights=None if weights is None else documents.take(weights, padding=0),
        positions=documents.take(batch.positions, padding=0),
        sources=documents.take(batch.sources, padding=names.index(PAD_SOURCE)),
        source_names=names,
        documents=documents,
        lengths=None if batch.lengths is None else documents.take(batch.lengths, padding=1),
        # Padding, like every token without a label, needs no teacher.
        teacher=None
        if batch.teacher is None
        else TeacherTopK(
            documents.take(batch.teacher.ids, padding=0),
            documents.take(batch.teacher.logprobs, padding=-float("inf")),
            documents.take(batch.teacher.tail, padding=0),
        ),
    )


def _positions(rows: Sequence[PackedRow], documents: Documents) -> torch.Tensor:
    counted = documents.positions().numpy()
    start = 0
    for row in rows:
        end = start + len(row.input_ids)
        if row.positions is not None:
            counted[start:end] = row.positions
        start = end
    return torch.from_numpy(counted)


def _teacher(rows: Sequence[PackedRow]) -> TeacherTopK | None:
    """Lay the teacher's predictions end to end, as wide as the widest row's; a row without any has none of it."""
    width = max((row.teacher.ids.shape[1] for row in rows if row.teacher is not None), default=0)
    if not width:
        return None
    total = sum(len(row.input_ids) for row in rows)
    ids, tail = np.zeros((total, width), np.int32), np.zeros(total, np.float32)
    logprobs = np.full((total, width), -np.inf, np.float32)
    start = 0
    for row in rows:
        end = start + len(row.input_ids)
        if row.teacher is not None:
            known = row.teacher.ids.shape[1]
            ids[start:end, :known], logprobs[start:end, :known] = row.teacher.ids, row.teacher.logprobs
            tail[start:end] = row.teacher.tail
        start = end
    return TeacherTopK(*(torch.from_numpy(column) for column in (ids, logprobs, tail)))


def _label_weights(rows: Sequence[PackedRow], last: np.ndarray) -> np.ndarray | None:
    """Return the weight of each position's label, float32 [N]; None when no row has weights."""
    if all(row.weights is None for row in rows):
        return None
    parts = [np.ones(len(row.input_ids), np.uint8) if row.weights is None else row.weights for row in rows]
    weights = np.roll(np.concatenate(parts), -1).astype(np.float32)
    weights[last] = 0
    return weights
