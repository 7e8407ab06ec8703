"""Copies between host and device for which the host does not wait: through pinned memory, where there is CUDA."""

from __future__ import annotations

import torch

__all__ = ["to_device", "to_host"]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on the device; what is queued there later finds it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the host, to be read after the host has waited for something that was queued later."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
