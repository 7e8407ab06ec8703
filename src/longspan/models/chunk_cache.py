"""What later chunks of a row read of earlier ones, and the gradients that come back for it: by place and chunk.

A place is whatever the writer names its tensors by: a layer, for its keys and values, or a layer and a word. Of the
keys of a row the cache grows with its length; of states only the last one is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch

from longspan.core.log import log_once

__all__ = ["ChunkCache"]


class _Arriving(NamedTuple):
    """A tensor on its way to the device, and the event behind its copy."""

    tensor: torch.Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> torch.Tensor:
        """Let the computing stream wait for it."""
        if self.copied is not None:
            current = torch.cuda.current_stream(self.tensor.device)
            current.wait_event(self.copied)
            self.tensor.record_stream(current)
        return self.tensor


class ChunkCache:
    """Tensors and their gradients by place and chunk.

    Args:
        offload: wait on the host, pinned, and come back chunk by chunk on a stream of its own, one ahead of use.
    """

    def __init__(self, *, offload: bool = False) -> None:
        self.offload = offload
        self._kept: dict[tuple[Hashable, int], torch.Tensor] = {}
        self._gradients: dict[tuple[Hashable, int], torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes that wait here now."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Return what waits here now: what was written in its own type, and gradients in fp32 or better."""
        return [*self._kept.values(), *self._gradients.values()]

    def write(self, place: Hashable, chunk: int, tensor: torch.Tensor) -> None:
        """Keep a tensor of a chunk; it is not changed afterwards."""
        self._kept[place, chunk] = self._leave(tensor)

    def read(self, place: Hashable, chunk: int, device: torch.device) -> torch.Tensor:
        """Return what was written of a chunk."""
        return self._come(self._kept[place, chunk], device).wait()

    def write_gradients(self, place: Hashable, chunk: int, gradients: torch.Tensor) -> None:
        """Keep the gradients of what was written so far, in place of those before."""
        self._gradients[place, chunk] = self._leave(gradients, into=self._gradients.get((place, chunk)))

    def take_gradients(self, place: Hashable, chunk: int, device: torch.device) -> torch.Tensor | None:
        """Return the gradients that others added for what was written of a chunk, and forget them."""
        kept = self._gradients.pop((place, chunk), None)
        return None if kept is None else self._come(kept, device).wait()

    def walk(
        self, place: Hashable, chunks: Sequence[int], device: torch.device, *, gradients: bool = False
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """Yield (chunk, what was written, gradients so far) on the device; the next ones are on their way then."""
        ahead = self._start(place, chunks[0], device, gradients) if chunks else None
        for number, chunk in enumerate(chunks):
            assert ahead is not None
            kept, gradients_so_far = ahead[0].wait(), None if ahead[1] is None else ahead[1].wait()
            if number + 1 < len(chunks):
                ahead = self._start(place, chunks[number + 1], device, gradients)
            yield chunk, kept, gradients_so_far

    def release(self, chunk: int) -> None:
        """Forget a chunk, of which nothing is read again."""
        for kept in (self._kept, self._gradients):
            for key in [key for key in kept if key[1] == chunk]:
                del kept[key]

    def _start(
        self, place: Hashable, chunk: int, device: torch.device, gradients: bool
    ) -> tuple[_Arriving, _Arriving | None]:
        kept = self._gradients.get((place, chunk)) if gradients else None
        return self._come(self._kept[place, chunk], device), None if kept is None else self._come(
            kept, device
        )

    def _leave(self, tensor: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return where `tensor` waits."""
        if not self.offload:
            return tensor
        on_gpu = tensor.device.type == "cuda"
        if not on_gpu:
            log_once("models.recurrent", "what chunks keep is offloaded from host to host: needless copies")
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu) if into is None else into
        with self._copying(tensor.device, behind_compute=True) as stream:
            host.copy_(tensor, non_blocking=True)
            if stream is not None:
                tensor.record_stream(stream)
        return host

    def _come(self, kept: torch.Tensor, device: torch.device) -> _Arriving:
        """Start bringing a tensor to the device."""
        if not self.offload:
            return _Arriving(kept, None)
        # One stream for both ways: what comes back has left before.
        with self._copying(device, behind_compute=False) as stream:
            arriving = kept.to(device, non_blocking=True, copy=True)
            return _Arriving(arriving, None if stream is None else stream.record_event())

    @contextlib.contextmanager
    def _copying(self, device: torch.device, *, behind_compute: bool) -> Iterator[torch.cuda.Stream | None]:
        if device.type != "cuda":
            yield None
            return
        stream = _stream(device)
        if behind_compute:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield stream


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all rows: the allocator keeps memory by stream, and gives none of it back to another."""
    return torch.cuda.Stream(device)
