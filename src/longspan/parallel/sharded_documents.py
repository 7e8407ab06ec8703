"""The document table of a packed row that is spread over ranks: what a model's attention is handed.

It takes the place of a table for a whole row: the same three things, for this rank's tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.kernels.attention import AttentionForm
from longspan.kernels.scans import Convolution, Scan
from longspan.parallel.schedules.base import CpSchedule, check_layout, sequence_attention
from longspan.parallel.sharded_scans import sharded_convolution, sharded_scan
from longspan.parallel.shards import SequenceShards

__all__ = ["ShardedDocuments"]


class ShardedDocuments:
    """This rank's part of a row of documents, and the schedule through which it attends to the rest.

    Args:
        shards: the whole row; the same on all ranks.
        schedule: how keys travel.

    Raises:
        ArgumentError: a layout or a number of ranks that the schedule does not work with.
    """

    def __init__(self, shards: SequenceShards, schedule: CpSchedule) -> None:
        check_layout(schedule, shards)
        self.shards, self.schedule = shards, schedule

    def __repr__(self) -> str:
        return f"ShardedDocuments(rank {self.schedule.rank} of {self.shards})"

    @property
    def num_tokens(self) -> int:
        """Number of tokens of this rank, padding included."""
        return self.shards.num_local

    @property
    def indices(self) -> NDArray[np.int64]:
        """Places of this rank's tokens in the padded row, int64 [num_tokens]; padding is past the row's end."""
        return self.shards.indices(self.schedule.rank)

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the position of each token in its document, int64 [num_tokens]."""
        return torch.from_numpy(self.shards.positions(self.schedule.rank)).to(device)

    def take(self, row: torch.Tensor, *, padding: int | float) -> torch.Tensor:
        """Return this rank's entries of a tensor over the row, [tokens, ...] to [num_tokens, ...].

        `padding` fills what lies past the end of the row.
        """
        missing = self.shards.num_padded - row.shape[0]
        if missing:
            row = torch.cat((row, row.new_full((missing, *row.shape[1:]), padding)))
        return row[torch.from_numpy(self.indices).to(row.device)]

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        form: AttentionForm,
        *,
        layer: int | None = None,
    ) -> torch.Tensor:
        """Return the causal attention of this rank's tokens [num_tokens, heads, head_dim] over their documents."""
        return sequence_attention(q, k, v, self.shards, self.schedule, form)

    def convolve(self, call: Convolution, *, layer: int | None = None) -> torch.Tensor:
        """Return a causal convolution of this rank's tokens [num_tokens, channels] over their documents."""
        return sharded_convolution(call, self.shards, self.schedule)

    def scan(self, scan: Scan, *, layer: int | None = None) -> torch.Tensor:
        """Return a recurrence over this rank's tokens, [num_tokens, heads, ...], started anew in each document."""
        return sharded_scan(scan, self.shards, self.schedule)
