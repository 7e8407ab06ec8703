"""Bytes of the tensors that are alive, counted at every operation: peak memory to the byte, the same on any machine."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the tensors made while it is entered, by their storage.

    Looks between operations, so what an operation needs inside itself is not seen.

    Attributes:
        peak: most bytes alive at once, without those on the host.
        host_peak: most bytes alive at once of tensors that were said to be on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.host_peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._host: set[int] = set()

    def move_to_host(self, tensor: torch.Tensor) -> None:
        """Count a tensor as host memory from now on: on a CPU, what an accelerator would have sent away."""
        self._host.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._look()
        return out

    def _look(self) -> None:
        for key in [key for key, (ref, _) in self._alive.items() if ref.expired()]:
            del self._alive[key]
            self._host.discard(key)
        host = sum(self._alive[key][1] for key in self._host if key in self._alive)
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()) - host)
        self.host_peak = max(self.host_peak, host)
