"""Keys and values of sequences that are spread over ranks, and further tokens of them that all ranks compute.

What was read by a schedule stays where it was computed. Tokens that come after, the ends of prompts that begin alike
and what is generated, are computed on every rank alike; their keys are kept by one rank for each sequence, in turn.
Each rank attends to what it holds, and the parts are joined over ranks through their log-sum-exp, in fp32 or better.

    prompt       0 1 2 3 | 4 5 6 7         spread over ranks 0 and 1, read together
    ends         a: 8 9       b: 8 9 10    keys of a on rank 0, of b on rank 1; both see 0 .. 7 on both ranks

Shape legend: T = tokens of this rank, Q = tokens of a pass, K = key/value heads, H = query heads, D = head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from longspan.kernels.attention import NO_LIMIT, AttentionForm, Bands, choose_kernel, merge, with_sinks
from longspan.kernels.attention.bands import oldest_seen
from longspan.kernels.attention.merging import accumulation_dtype
from longspan.parallel.mesh import Mesh
from longspan.parallel.schedules import CpSchedule
from longspan.parallel.sharded_documents import ShardedDocuments
from longspan.parallel.shards import SequenceShards

__all__ = ["Held", "HeldKeys", "KeepingDocuments", "Kept", "NextTokens", "held_rows"]

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
        held: which rows of `kept` each sequence sees; several may see the same.
        lengths: tokens of each sequence that were read together, on all ranks.
        room: tokens that come after, at most.
    """

    def __init__(
        self, kept: Kept, held: Sequence[Held], lengths: Sequence[int], room: Sequence[int], mesh: Mesh
    ) -> None:
        self.kernel, self.mesh, self.held = choose_kernel(mesh.device), mesh, held
        self.kept = {layer: (self._wide(k), self._wide(v)) for layer, (k, v) in kept.items()}
        self.lengths = np.asarray(lengths, np.int64)
        self.after = np.zeros(len(lengths), np.int64)
        """Tokens of each sequence that came after."""
        own = [tokens if self.owns(sequence) else 0 for sequence, tokens in enumerate(room)]
        self.offsets = np.concatenate([[0], np.cumsum(own)]).astype(np.int64)
        self.new: Kept = {}

    def owns(self, sequence: int) -> bool:
        """Return whether this rank keeps what comes after of a sequence."""
        return sequence % self.mesh.cp_size == self.mesh.cp_rank

    def next(self, sequences: Sequence[int], counts: Sequence[int]) -> NextTokens:
        """Return the table for the next tokens of some sequences, `counts` of each; it is used before the next."""
        table = NextTokens(self, sequences, np.asarray(counts, np.int64))
        self.after[list(sequences)] += counts
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
    """Further tokens of some sequences, one sequence after another, in place of a document table."""

    def __init__(self, keys: HeldKeys, sequences: Sequence[int], counts: NDArray[np.int64]) -> None:
        self._keys, self._sequences, self._counts = keys, list(sequences), counts
        self._before = keys.after[self._sequences].copy()
        self._starts = np.cumsum(counts) - counts
        self._bands: dict[tuple[int | None, int | None], tuple[Bands, Bands]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens of this pass."""
        return int(self._counts.sum())

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the position of each token in its sequence, int64 [Q]."""
        first = self._keys.lengths[self._sequences] + self._before
        inside = np.arange(self.num_tokens) - np.repeat(self._starts, self._counts)
        return torch.from_numpy(np.repeat(first, self._counts) + inside).to(device)

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
        for sequence, start, count, before in self._rows():
            if keys.owns(sequence):
                row = int(keys.offsets[sequence]) + before
                for room, fresh in zip(new, (k, v)):
                    room[row : row + count] = fresh[start : start + count].to(room.dtype)
        kernel = keys.kernel if form.softcap is None else choose_kernel(q.device, softcap=form.softcap)
        dtype = accumulation_dtype(q)
        out, lse = q.new_zeros(q.shape, dtype=dtype), q.new_full(q.shape[:2], float("-inf"), dtype=dtype)
        for (held_k, held_v), bands in zip(
            (keys.kept[layer], new), self._tables(form.window, form.attention_chunk)
        ):
            if len(bands):
                part = kernel.forward(q.to(held_k.dtype), held_k, held_v, bands, form.factor(q))
                out, lse = merge(out, lse, *part)
        out, _ = with_sinks(*self._over_ranks(out, lse), form.sinks)
        return out.to(q.dtype)

    def _over_ranks(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mine = torch.cat((out, lse[..., None]), dim=-1)
        parts = [torch.empty_like(mine) for _ in range(self._keys.mesh.cp_size)]
        dist.all_gather(parts, mine, group=self._keys.mesh.cp_group)
        out, lse = parts[0][..., :-1], parts[0][..., -1]
        for part in parts[1:]:
            out, lse = merge(out, lse, part[..., :-1], part[..., -1])
        return out, lse

    def _rows(self) -> list[tuple[int, int, int, int]]:
        """Return (sequence, first row of the pass, tokens, tokens after the prompt before them)."""
        columns = (self._starts, self._counts, self._before)
        return list(zip(self._sequences, *(column.tolist() for column in columns)))

    def _tables(self, window: int | None, attention_chunk: int | None) -> tuple[Bands, Bands]:
        """Return who sees what of the keys that were read together, and of those that came after, on this rank."""
        reach = window, attention_chunk
        if reach not in self._bands:
            self._bands[reach] = (self._kept_bands(*reach), self._new_bands(*reach))
        return self._bands[reach]

    def _kept_bands(self, window: int | None, attention_chunk: int | None) -> Bands:
        bands = []
        for sequence, start, count, before in self._rows():
            held = self._keys.held[sequence]
            if window is None and attention_chunk is None:
                bands.append((start, count, held.start, len(held.positions)))
                continue
            # What this rank holds has gaps, so a window begins at another row for each token.
            for row in range(count):
                position = int(self._keys.lengths[sequence]) + before + row
                first = int(np.searchsorted(held.positions, oldest_seen(position, window, attention_chunk)))
                bands.append((start + row, 1, held.start + first, len(held.positions) - first))
        return Bands(*zip(*bands), lo=-NO_LIMIT)

    def _new_bands(self, window: int | None, attention_chunk: int | None) -> Bands:
        own = [row for row in self._rows() if self._keys.owns(row[0])]
        # Token i of the pass is key before + i of its sequence's room.
        columns = [
            (start, count, int(self._keys.offsets[sequence]), before + count, -before)
            for sequence, start, count, before in own
        ]
        if not columns:
            return Bands([], [], [], [])
        if attention_chunk is not None:
            # A cut lies at another row for each token.
            rows = [
                self._of_token(sequence, start, before, row, window, attention_chunk)
                for sequence, start, count, before in own
                for row in range(count)
            ]
            return Bands(*zip(*rows), lo=-NO_LIMIT)
        *places, lo = zip(*columns)
        hi = None if window is None else [window - 1 + limit for limit in lo]
        return Bands(*places, lo=lo, hi=hi)

    def _of_token(
        self, sequence: int, start: int, before: int, row: int, window: int | None, attention_chunk: int
    ) -> tuple[int, int, int, int]:
        """Return which of the keys that came after one token sees."""
        length = int(self._keys.lengths[sequence])
        last = before + row
        first = max(0, oldest_seen(length + last, window, attention_chunk) - length)
        return start + row, 1, int(self._keys.offsets[sequence]) + first, last + 1 - first
