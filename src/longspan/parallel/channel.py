"""Communication of one rank with its group, with its bytes counted.

A thin layer over torch.distributed: ranks are ranks of the group, every call adds the bytes this rank sends to
other ranks to `Channel.sent`, and starts a transfer that is waited for later, so that it runs while a block is
computed. Bytes are those of the usual ring algorithms, whatever the backend does:

    all_gather       (world - 1) * local bytes            reduce_scatter   (world - 1) / world * input bytes
    all_to_all       what leaves this rank                point to point   what leaves this rank
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist

__all__ = ["Channel", "Transfer"]

# torch 2.13 renames the two; 2.11 knows the old names only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Transfer:
    """Communication under way. The tensors live until `wait` returns."""

    def __init__(self, works: Sequence[dist.Work], tensors: Sequence[torch.Tensor]) -> None:
        self._works, self._tensors = works, tensors

    def wait(self) -> None:
        """Return when all of them are done (on CUDA: when the current stream waits for them).

        Raises:
            RuntimeError: a rank is gone or the group's timeout has passed.
        """
        for work in self._works:
            work.wait()
        self._works, self._tensors = (), ()


class Channel:
    """One process group; None is a group of this process alone.

    Attributes:
        rank, world: this process' place in the group, and the group's size.
        sent: bytes sent to other ranks so far, by kind: "p2p", "all_gather", "reduce_scatter", "all_to_all".
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)
        self.sent: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"Channel(rank {self.rank} of {self.world})"

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]] = (),
        receives: Sequence[tuple[torch.Tensor, int]] = (),
    ) -> Transfer:
        """Post sends (tensor, to rank) and receives (buffer, from rank) together; both contiguous.

        Between two ranks, messages arrive in the order in which they are posted.
        """
        ops = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for tensor, peer in sends]
        ops += [
            dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=peer) for buffer, peer in receives
        ]
        self.sent["p2p"] += sum(_bytes(tensor) for tensor, _ in sends)
        works = dist.batch_isend_irecv(ops) if ops else []
        return Transfer(works, [tensor for tensor, _ in (*sends, *receives)])

    def all_gather(self, local: torch.Tensor) -> tuple[torch.Tensor, Transfer]:
        """Start to gather the tensors of all ranks end to end: [world * rows, ...] from [rows, ...]."""
        if self.world == 1:
            return local, Transfer((), ())
        local = local.contiguous()
        out = local.new_empty(self.world * local.shape[0], *local.shape[1:])
        work = _all_gather(out, local, group=self.group, async_op=True)
        self.sent["all_gather"] += (self.world - 1) * _bytes(local)
        return out, Transfer([work], [local])

    def reduce_scatter(self, whole: torch.Tensor) -> tuple[torch.Tensor, Transfer]:
        """Start to sum over ranks and keep this rank's rows: [rows, ...] from [world * rows, ...]."""
        if self.world == 1:
            return whole, Transfer((), ())
        whole = whole.contiguous()
        out = whole.new_empty(whole.shape[0] // self.world, *whole.shape[1:])
        work = _reduce_scatter(out, whole, group=self.group, async_op=True)
        self.sent["reduce_scatter"] += (self.world - 1) * _bytes(out)
        return out, Transfer([work], [whole])

    def all_to_all(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
    ) -> tuple[list[torch.Tensor], Transfer]:
        """Start to send `parts[r]` to rank r and to receive a tensor of shape `shapes[r]` from it."""
        if self.world == 1:
            return list(parts), Transfer((), ())
        sizes_in = [part.numel() for part in parts]
        sizes_out = [torch.Size(shape).numel() for shape in shapes]
        send = torch.cat([part.reshape(-1) for part in parts])
        receive = send.new_empty(sum(sizes_out))
        work = dist.all_to_all_single(receive, send, sizes_out, sizes_in, group=self.group, async_op=True)
        self.sent["all_to_all"] += (send.numel() - sizes_in[self.rank]) * send.element_size()
        chunks = [chunk.view(*shape) for chunk, shape in zip(receive.split(sizes_out), shapes)]
        return chunks, Transfer([work], [send])


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
