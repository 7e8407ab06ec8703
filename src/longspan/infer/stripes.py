"""Which tokens of a prefix tree a rank holds: of every sequence each `ranks`-th position, whatever strand it is in.

    positions     0 1 2 3 4 5 6 7 8        two ranks: rank 0 has 0 2 4 6 8, rank 1 has 1 3 5 7
    strand a      0 1 2 3 4 5 6 7 8        its keys on rank 1, one behind the other: 1 3 5 7
    strand b            3 4 5              leaves a behind 2; its keys on rank 1: 3 5

So every rank has its share of every stretch that queries see, with the diagonal of a causal band shifted by one row at
most, and no table says who has what (Brandon et al. 2023, Striped Attention). Keys stay where they are: queries go to
all ranks, and what each finds is joined at home through its log-sum-exp (Yang et al. 2024, "pass-Q"). In a needle grid
queries are few beside the keys that they see.

Shape legend: T = tokens of a pass on a rank, A = tokens asked for, H = query heads, D = head dim or width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from longspan.kernels.attention.merging import accumulation_dtype, merge_pieces
from longspan.parallel.channel import Channel

__all__ = ["WHOLE", "Stripes"]


class Stripes:
    """The share of one rank of a group; None is this process alone, which has all."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.channel = Channel(group)
        self.rank, self.ranks = self.channel.rank, self.channel.world

    def below(self, position: Any, rank: int | None = None) -> Any:
        """Return how many positions below `position`, a number or an array of some, are a rank's (None: this one)."""
        if self.ranks == 1:
            return position
        rank = self.rank if rank is None else rank
        return (position + self.ranks - 1 - rank) // self.ranks

    def most(self, tokens: int) -> int:
        """Return how many of some tokens that follow each other a rank has at most: the same number on all."""
        return -(-tokens // self.ranks)

    def gather(self, q_THD: torch.Tensor) -> torch.Tensor:
        """Return the queries of all ranks, one rank behind the other: [ranks * T, H, D]."""
        found, transfer = self.channel.all_gather(q_THD)
        transfer.wait()
        return found

    def home(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, H, D] and lse [T, H] over the keys of all ranks, of what `gather` gave over those of this."""
        parts = _as_one(out, lse).chunk(self.ranks)
        found, transfer = self.channel.all_to_all(parts, [parts[0].shape] * self.ranks)
        transfer.wait()
        return _joined(torch.stack(found))

    def everywhere(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, H, D] and lse [T, H] over the keys of all ranks, of queries that every rank has."""
        found, transfer = self.channel.all_gather(_as_one(out, lse)[None])
        transfer.wait()
        return _joined(found)

    def collect(self, hidden_TD: torch.Tensor, rows: Any, mine: Any) -> torch.Tensor:
        """Return hidden states [A, D] on every rank: of row `rows[i]` of the rank on which `mine[i]` is true."""
        device = hidden_TD.device
        own = np.flatnonzero(mine)
        found_AD = hidden_TD.new_zeros(len(rows), hidden_TD.shape[1], dtype=accumulation_dtype(hidden_TD))
        chosen_AD = hidden_TD[torch.from_numpy(np.asarray(rows)[own]).to(device)]
        found_AD[torch.from_numpy(own).to(device)] = chosen_AD.to(found_AD.dtype)
        # One rank has each, the others 0: the sum is exact.
        dist.all_reduce(found_AD, group=self.channel.group)
        return found_AD.to(hidden_TD.dtype)

    def agreed(self, ids_A: torch.Tensor, highest_A: torch.Tensor) -> tuple[list[int], list[float]]:
        """Return the most likely tokens and their logits as the first rank has them.

        Ranks that disagreed over a tie would go different ways.
        """
        if self.ranks > 1:
            told = torch.stack((ids_A.double(), highest_A.double()))
            dist.broadcast(told, group_src=0, group=self.channel.group)
            ids_A, highest_A = told[0].long(), told[1]
        return ids_A.tolist(), highest_A.tolist()


WHOLE = Stripes(None)
"""All of it, in one process."""


def _as_one(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    dtype = accumulation_dtype(lse)
    return torch.cat((out.to(dtype), lse[..., None].to(dtype)), dim=-1)


def _joined(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return merge_pieces(parts[..., :-1], parts[..., -1])
