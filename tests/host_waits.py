"""Counts what would make the host wait for a device: seen on the CPU, where nothing waits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HostWaits"]

READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
}
"""Operations whose result decides a size, or a number for Python."""


class HostWaits(TorchDispatchMode):
    """Counts reads of tensors that come of a model's parameters: those would wait, reads of the host's own do not.

    `tolist` and `numpy` of such a tensor count too. What is copied by `to_host` is the host's own.

    Attributes:
        counts: by operation.
    """

    def __init__(self, on_device: list[torch.Tensor]) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._device = {tensor.untyped_storage()._cdata for tensor in on_device}
        self._alive: list[torch.Tensor] = []
        self._patch = pytest.MonkeyPatch()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy whose reads do not count, as of a copy that nobody waits for."""
        with torch.utils._python_dispatch._disable_current_modes():
            return tensor.clone()

    def __enter__(self) -> HostWaits:
        for name in ("tolist", "numpy"):
            self._patch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def _counted(self, name: str, method: Any) -> Any:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.counts[name] += tensor.untyped_storage()._cdata in self._device
            return method(tensor, *args, **kwargs)

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(x.untyped_storage()._cdata in self._device for x in inputs)
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if there and (name in READS or by_mask):
            self.counts[name] += 1
        found = func(*args, **(kwargs or {}))
        if there:
            for x in torch.utils._pytree.tree_leaves(found):
                if isinstance(x, torch.Tensor):
                    self._device.add(x.untyped_storage()._cdata)
                    self._alive.append(x)  # or another tensor would have its address
        return found
