"""What a teacher predicts after each token: its k likeliest words, and the mass of all others.

    ids       [tokens, k]   the likeliest word first
    logprobs  [tokens, k]   natural logarithms of the softmax over the whole vocabulary, in fp32
    tail      [tokens]      logarithm of the mass of all other words

Entry t is the distribution of the word AFTER token t, given the tokens of its document up to t. Logits exist for a
chunk of tokens at a time, and are turned into these while they are in cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError, DataError
from longspan.infer.packed import inference
from longspan.kernels.head import top_k
from longspan.models.documents import Documents
from longspan.models.head import output_head, vocab_size
from longspan.models.hf import hidden_states
from longspan.models.hf_config import head_counts
from longspan.models.mixers import check_states
from longspan.parallel.mesh import Mesh
from longspan.parallel.schedules import CpSchedule, ScheduleName, build_schedule
from longspan.parallel.sharded_documents import ShardedDocuments
from longspan.parallel.shards import SequenceShards

__all__ = ["LocalTeacher", "SharedTeacher", "Teacher", "TopK"]

# Shape suffixes: T = tokens of a row, N = tokens whose prediction is asked for, D = model width, K = words kept.


class TopK(NamedTuple):
    """Predictions after N tokens."""

    ids: np.ndarray
    """int32 [N, K]."""
    logprobs: np.ndarray
    """float32 [N, K], falling."""
    tail: np.ndarray
    """float32 [N]; -inf where K is the whole vocabulary."""


class Teacher(Protocol):
    """A model that says what it predicts."""

    @property
    def vocab_size(self) -> int:
        """Words that its output embedding knows."""

    def topk(
        self, input_ids: np.ndarray, cu_seqlens: np.ndarray, *, k: int, places: np.ndarray | None = None
    ) -> TopK:
        """Return what it predicts after the tokens at `places` (None: all) of a row of documents.

        Args:
            input_ids: integers [tokens].
            cu_seqlens: borders of the documents, [documents + 1]; they do not see each other.
            k: words to keep.
            places: ascending integers [N].

        Raises:
            ArgumentError: k is below 1 or beyond the vocabulary.
            DataError: what it predicts is not a number.
        """

    def close(self) -> None:
        """Let the other processes of the teacher end."""


class LocalTeacher:
    """A model in this process."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def vocab_size(self) -> int:
        """See `Teacher`."""
        return vocab_size(self.model)

    def topk(
        self, input_ids: np.ndarray, cu_seqlens: np.ndarray, *, k: int, places: np.ndarray | None = None
    ) -> TopK:
        """See `Teacher`."""
        check_k(k, self.vocab_size)
        device = self.model.device
        documents = Documents.from_cu_seqlens(cu_seqlens)
        with inference(self.model):
            ids_T = torch.from_numpy(np.asarray(input_ids, dtype=np.int64)).to(device)
            hidden_ND = hidden_states(self.model, ids_T, documents)
            if places is not None:
                hidden_ND = hidden_ND[torch.from_numpy(np.asarray(places, dtype=np.int64)).to(device)]
            return _to_numpy(top_k(output_head(self.model), hidden_ND, k))

    def close(self) -> None:
        """Nothing is held."""


class SharedTeacher:
    """A model that several processes run together, each on its part of the tokens of a row.

    All of a group make one. The first asks with `topk`, the others do their part in `follow` until it calls `close`.

    Raises:
        ArgumentError: heads that the schedule cannot share.
    """

    def __init__(self, model: PreTrainedModel, mesh: Mesh, schedule: ScheduleName = "ring") -> None:
        self.model, self._mesh = model, mesh
        self._schedule: CpSchedule = build_schedule(
            schedule, ring_group=mesh.ring_group, ulysses_group=mesh.ulysses_group
        )
        self._schedule.check_heads(*head_counts(model.config))
        check_states(model, mesh.cp_size)

    @property
    def vocab_size(self) -> int:
        """See `Teacher`."""
        return vocab_size(self.model)

    def topk(
        self, input_ids: np.ndarray, cu_seqlens: np.ndarray, *, k: int, places: np.ndarray | None = None
    ) -> TopK:
        """See `Teacher`; on the first process."""
        check_k(k, self.vocab_size)
        asked = (np.asarray(input_ids, np.int64), np.asarray(cu_seqlens, np.int64), k, places)
        dist.broadcast_object_list([asked], src=0)
        found = self._part(*asked)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(found, parts, dst=0)
        where = np.concatenate([part[0] for part in parts])
        order = np.argsort(where)
        return TopK(*(np.concatenate([part[1][i] for part in parts])[order] for i in range(3)))

    def follow(self) -> None:
        """Do this process' part of what the first asks for, until it closes."""
        while True:
            asked: list[Any] = [None]
            dist.broadcast_object_list(asked, src=0)
            if asked[0] is None:
                return
            dist.gather_object(self._part(*asked[0]), None, dst=0)

    def close(self) -> None:
        """Let the other processes end; on the first process."""
        dist.broadcast_object_list([None], src=0)

    def _part(
        self, input_ids: np.ndarray, cu_seqlens: np.ndarray, k: int, places: np.ndarray | None
    ) -> tuple[np.ndarray, TopK]:
        """Return the places that this process holds of those asked for, and what comes after them."""
        shards = SequenceShards(self._schedule.layouts[0], cu_seqlens, self._mesh.cp_size)
        documents = ShardedDocuments(shards, self._schedule)
        device = self.model.device
        with inference(self.model):
            ids_T = documents.take(torch.from_numpy(input_ids), padding=0).to(device)
            hidden_ND = hidden_states(self.model, ids_T, documents)
            wanted = np.arange(len(input_ids)) if places is None else places
            mine = np.isin(documents.indices, wanted)
            hidden_ND = hidden_ND[torch.from_numpy(np.flatnonzero(mine)).to(device)]
            found = _to_numpy(top_k(output_head(self.model), hidden_ND, k))
        return documents.indices[mine], found


def check_k(k: int, vocab_size: int) -> None:
    """Raise ArgumentError if so many words cannot be kept."""
    if not 1 <= k <= vocab_size:
        raise ArgumentError("so many words cannot be kept", found=f"k = {k}", allowed=f"1 to {vocab_size}")


def _to_numpy(found: Sequence[torch.Tensor]) -> TopK:
    ids, logprobs, tail = found
    if bool(tail.isnan().any()) or bool(logprobs.isnan().any()):
        raise DataError(
            "what the teacher predicts is not a number",
            found=f"NaN after {int(tail.isnan().sum())} of {len(tail)} tokens",
            fix="run it in bfloat16 or float32 (--model-dtype) if float16 overflows; else its weights are broken",
        )
    return TopK(ids.to(torch.int32).cpu().numpy(), logprobs.cpu().numpy(), tail.cpu().numpy())
