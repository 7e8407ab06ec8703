"""Bytes of the tensors that are alive, counted at every operation: peak memory to the byte, the same on any machine."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the tensors that operations return while it is entered, by their storage.

    Looks between operations, so what an operation needs inside itself is not seen.

    Attributes:
        peak: most bytes alive at once, without those on the host.
        host_peak: most bytes alive at once of tensors that were said to be on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.host_peak = 0
        self._device = self._host = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int, bool]] = {}

    def move_to_host(self, tensor: torch.Tensor) -> None:
        """Count a tensor as host memory from now on: on a CPU, what an accelerator would have sent away."""
        self._note(tensor, on_host=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        self.peak = max(self.peak, self._device)
        return out

    def _note(self, tensor: torch.Tensor, *, on_host: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None:
            on_host = on_host or known[2]
            self._forget(key)
        # The Python object of a storage lives as long as the storage itself.
        self._alive[key] = (weakref.ref(storage, lambda _: self._forget(key)), storage.nbytes(), on_host)
        if on_host:
            self._host += storage.nbytes()
            self.host_peak = max(self.host_peak, self._host)
        else:
            self._device += storage.nbytes()

    def _forget(self, key: int) -> None:
        _, size, on_host = self._alive.pop(key)
        if on_host:
            self._host -= size
        else:
            self._device -= size
