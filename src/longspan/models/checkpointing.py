"""Activation checkpointing per block: keep each block's input, compute the block again in the backward pass.

    none      every activation is kept
    full      one tensor per block is kept, [tokens, hidden]
    offload   that tensor waits in host memory: pinned, copied on a stream of its own while the block computes, and
              fetched back while the block after it is in its backward pass

Offload makes the device memory of activations independent of the number of blocks: 32 blocks of 131,072 tokens and
hidden size 4,096 in bf16 are 32 GiB on the host instead of the device. Over a link of B bytes per second it costs
no time as long as a block computes longer than tokens * hidden * itemsize / B.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.core.heartbeat import beat
from longspan.core.log import log_once

__all__ = ["CHECKPOINTING", "Checkpointing", "HostOffload", "enable_checkpointing"]

Checkpointing = Literal["none", "full", "offload"]
CHECKPOINTING: tuple[str, ...] = get_args(Checkpointing)

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def enable_checkpointing(model: ModelT, mode: Checkpointing) -> ModelT:
    """Set what the blocks of a model keep for their backward pass, in place, and return the model.

    Acts in training mode only (`model.train()`). Gradients do not change by a bit.

    Raises:
        ArgumentError: an unknown mode, or a model without checkpointing in transformers.
    """
    if mode not in CHECKPOINTING:
        raise ArgumentError("unknown activation checkpointing", found=mode, allowed=", ".join(CHECKPOINTING))
    if mode == "none":
        if model.supports_gradient_checkpointing:
            model._set_gradient_checkpointing(enable=False)
        return model
    if not model.supports_gradient_checkpointing:
        raise ArgumentError(
            f"{type(model).__name__} does not support activation checkpointing", fix="set it to none"
        )
    run = HostOffload() if mode == "offload" else _keep_on_device
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)
    return model


def _keep_on_device(block: Callable[..., Any], *args: Any) -> Any:
    """Return block(*args), to be computed again in the backward pass."""
    return checkpoint(partial(_alive, block), *args, use_reentrant=False)


def _alive(block: Callable[..., Any], *args: Any) -> Any:
    """Return block(*args), having said that work goes on: in the forward pass, and when it is computed again."""
    beat()
    return block(*args)


class _Saved:
    """A tensor of the forward pass: its copy on the host, and the one on the device while there is one."""

    def __init__(self, tensor: torch.Tensor, before: weakref.ref[_Saved] | None) -> None:
        self.device = tensor.device
        # While it leaves, and again from the start of its way back until it is used.
        self.on_device: torch.Tensor | None = tensor
        self.leaving = True
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda")
        # Recorded on the copying stream behind the transfer under way.
        self.done: torch.cuda.Event | None = None
        # The block before: weak, or each step would hold the one before it.
        self.before = before


class HostOffload:
    """Runs blocks under checkpointing and keeps what they save in host memory.

    One transfer is in flight at a time, and the device tensor it reads or writes is held until the computing
    stream has waited for it; so no memory is handed on too early, and at most one block's input lies on the
    device besides the one in use. The input of the last block is used where it is: its backward pass comes first.

    Attributes:
        num_tensors, num_bytes: what has been sent to the host so far.
    """

    def __init__(self) -> None:
        self.num_tensors = 0
        self.num_bytes = 0
        self._latest: weakref.ref[_Saved] | None = None
        self._in_flight: _Saved | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        """Return block(*args), to be computed again in the backward pass."""
        # torch's checkpoint saves the tensors among args and nothing else under these hooks.
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return _keep_on_device(block, *args)

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        if tensor.device.type == "cpu":
            log_once("models.checkpointing", "activations are offloaded from host to host: a needless copy")
        self._settle()
        tensor = tensor.detach()
        saved = _Saved(tensor, self._latest)
        self._transfer(saved, into=saved.host, source=tensor)
        self._latest, self._in_flight = weakref.ref(saved), saved
        self.num_tensors += 1
        self.num_bytes += tensor.numel() * tensor.element_size()
        return saved

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        if saved.on_device is None:
            self._fetch(saved)
        tensor = saved.on_device
        assert tensor is not None
        if saved is self._in_flight:
            self._settle()
        saved.on_device = None
        before = saved.before() if saved.before is not None else None
        if before is not None and before.on_device is None:
            self._fetch(before)
        return tensor

    def _fetch(self, saved: _Saved) -> None:
        """Start bringing a tensor back."""
        self._settle()
        if saved.device.type == "cpu":
            saved.on_device = saved.host
            return
        # From the memory of the computing stream, which uses and frees it.
        saved.on_device = torch.empty(saved.host.shape, dtype=saved.host.dtype, device=saved.device)
        self._transfer(saved, into=saved.on_device, source=saved.host)
        self._in_flight = saved

    def _transfer(self, saved: _Saved, *, into: torch.Tensor, source: torch.Tensor) -> None:
        if saved.device.type != "cuda":
            into.copy_(source)
            return
        if saved.device not in self._streams:
            self._streams[saved.device] = torch.cuda.Stream(saved.device)
        stream = self._streams[saved.device]
        # What is read was computed, and what is overwritten was last used, by the work queued so far.
        stream.wait_stream(torch.cuda.current_stream(saved.device))
        with torch.cuda.stream(stream):
            into.copy_(source, non_blocking=True)
            saved.done = torch.cuda.Event()
            saved.done.record(stream)

    def _settle(self) -> None:
        """Let the computing stream wait for the transfer in flight; give up the device copy of what has left."""
        saved, self._in_flight = self._in_flight, None
        if saved is None:
            return
        if saved.done is not None:
            torch.cuda.current_stream(saved.device).wait_event(saved.done)
            saved.done = None
        if saved.leaving:
            saved.on_device, saved.leaving = None, False
