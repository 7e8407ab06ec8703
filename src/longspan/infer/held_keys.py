"""Keys and values of sequences that a schedule has spread over ranks, and tokens that are generated behind them.

What was read by a schedule stays where it was computed. Tokens that are generated are computed on every rank alike;
their keys are kept by one rank for each sequence, in turn. Each rank attends to what it holds, and the parts are joined
over ranks through their log-sum-exp, in fp32 or better.

    prompts      a: 0 1 2 3 | 4 5 6 7      spread over ranks 0 and 1, read together
    answers      a: 8 9     b: 8 9 10      keys of a on rank 0, of b on rank 1

Shape legend: T = tokens of this rank, Q = tokens of a step, K = key/value heads, H = query heads, D = head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.infer.stripes import Stripes
from longspan.infer.token_spans import TokenSpans
from longspan.kernels.attention import AttentionForm, choose_kernel, with_sinks
from longspan.kernels.attention.bands import oldest_seen
from longspan.kernels.attention.merging import accumulation_dtype
from longspan.parallel.schedules import CpSchedule
from longspan.parallel.schedules.base import Partial
from longspan.parallel.sharded_documents import ShardedDocuments
from longspan.parallel.shards import SequenceShards

__all__ = ["HeldKeys", "KeepingDocuments", "NextTokens", "held_rows"]

Kept = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [T, K, D] of this rank's tokens, by layer."""


class KeepingDocuments(ShardedDocuments):
    """A table of documents that keeps the keys and values that it is shown."""

    def __init__(self, shards: SequenceShards, schedule: CpSchedule) -> None:
        super().__init__(shards, schedule)
        self.kept: Kept = {}

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        form: AttentionForm,
        *,
        layer: int | None = None,
    ) -> torch.Tensor:
        """Return the attention of this rank's tokens; see `ShardedDocuments.attend`."""
        assert layer is not None
        self.kept[layer] = (k.contiguous(), v.contiguous())
        return super().attend(q, k, v, form, layer=layer)


class Held(NamedTuple):
    """Which of the kept rows are those of a sequence, and which positions they have, ascending."""

    start: int
    positions: NDArray[np.int64]


def held_rows(documents: ShardedDocuments, borders: NDArray[np.int64]) -> list[Held]:
    """Return what this rank holds of each sequence of a row."""
    places = documents.indices
    starts = np.searchsorted(places, borders)
    return [
        Held(int(first), places[first:last] - border)
        for first, last, border in zip(starts[:-1], starts[1:], borders[:-1])
    ]


class HeldKeys:
    """What this rank holds of some sequences.

    Args:
        kept: keys of what was read together.
        held: which rows of `kept` are those of each sequence.
        lengths: tokens of each sequence that were read together, on all ranks.
        room: tokens that come after, at most.
        stripes: the ranks.
    """

    def __init__(
        self, kept: Kept, held: Sequence[Held], lengths: Sequence[int], room: Sequence[int], stripes: Stripes
    ) -> None:
        self.stripes, self.held = stripes, held
        self.kernel = choose_kernel(next(iter(kept.values()))[0].device)
        self.kept = {layer: (self._wide(k), self._wide(v)) for layer, (k, v) in kept.items()}
        self.lengths = np.asarray(lengths, np.int64)
        self.after = np.zeros(len(lengths), np.int64)
        """Tokens of each sequence that came after."""
        self.owned = np.arange(len(lengths)) % stripes.ranks == stripes.rank
        """Of which sequences this rank keeps what comes after."""
        self.offsets = np.concatenate([[0], np.cumsum(np.where(self.owned, room, 0))]).astype(np.int64)
        self.new: Kept = {}

    def next(self, sequences: Sequence[int]) -> NextTokens:
        """Return the table for one more token of each of some sequences; it is used before the next."""
        table = NextTokens(self, np.asarray(sequences, np.int64))
        self.after[list(sequences)] += 1
        return table

    def new_keys(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the room for keys and values of what comes after."""
        if layer not in self.new:
            shape = (int(self.offsets[-1]), *like.shape[1:])
            dtype = self.kept[layer][0].dtype
            self.new[layer] = (like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype))
        return self.new[layer]

    def _wide(self, tensor: torch.Tensor) -> torch.Tensor:
        # A kernel that computes in fp32 would cast all that it reads, again and again.
        return tensor.to(accumulation_dtype(tensor)) if self.kernel.upcasts else tensor


class NextTokens:
    """One more token of each of some sequences, in place of a document table."""

    def __init__(self, keys: HeldKeys, sequences: NDArray[np.int64]) -> None:
        self._keys, self._sequences = keys, sequences
        self._before = keys.after[sequences].copy()
        mine = np.flatnonzero(keys.owned[sequences])
        self._mine = torch.from_numpy(mine)
        self._rows = torch.from_numpy((keys.offsets[sequences] + self._before)[mine])
        self._spans: dict[tuple[int | None, int | None], tuple[TokenSpans | None, TokenSpans | None]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens of this step."""
        return len(self._sequences)

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the position of each token in its sequence, int64 [Q]."""
        return torch.from_numpy(self._keys.lengths[self._sequences] + self._before).to(device)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        form: AttentionForm,
        *,
        layer: int | None = None,
    ) -> torch.Tensor:
        """Return the attention [Q, H, D] of these tokens over all keys of their sequences."""
        assert layer is not None
        keys = self._keys
        new = keys.new_keys(layer, k)
        self._rows, self._mine = self._rows.to(k.device), self._mine.to(k.device)
        for room, fresh in zip(new, (k, v)):
            room[self._rows] = fresh[self._mine].to(room.dtype)
        kernel = keys.kernel if form.softcap is None else choose_kernel(q.device, softcap=form.softcap)
        seen = Partial(q)
        for (held_k, held_v), spans in zip((keys.kept[layer], new), self._seen(form)):
            if spans is not None:
                rows = q.to(held_k.dtype), held_k[spans.keys], held_v[spans.keys]
                seen.add(*spans.attend(*rows, form.factor(q), kernel))
        return with_sinks(*keys.stripes.everywhere(seen.out, seen.lse), form.sinks)[0].to(q.dtype)

    def _seen(self, form: AttentionForm) -> tuple[TokenSpans | None, TokenSpans | None]:
        """Return what is seen on this rank of the keys that were read together, and of those that came after."""
        reach = form.window, form.attention_chunk
        if reach not in self._spans:
            keys, spans = self._keys, np.zeros((2, 2, self.num_tokens), dtype=np.int64)
            for row, (sequence, before) in enumerate(zip(self._sequences.tolist(), self._before.tolist())):
                held, length = keys.held[sequence], int(keys.lengths[sequence])
                oldest = oldest_seen(length + before, *reach)
                first = int(np.searchsorted(held.positions, oldest))
                spans[0, :, row] = held.start + first, len(held.positions) - first
                if keys.owned[sequence]:
                    first = max(0, oldest - length)
                    spans[1, :, row] = keys.offsets[sequence] + first, before + 1 - first
            kept, after = (TokenSpans(*each) if each[1].any() else None for each in spans)
            self._spans[reach] = kept, after
        return self._spans[reach]
