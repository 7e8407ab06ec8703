"""What layers with a state hand from one chunk of a row to the next, and its gradient on the way back.

A document that goes on behind a chunk leaves two things there for each such layer: the state of its recurrence, and
the last tokens of what its convolution reads. The first walk writes them (`models.chunk_cache`), whatever the length
one state a chunk and layer. In the second walk a chunk reads what the one before it left as a leaf of its own graph;
its backward pass writes the gradient of that leaf, and the chunk before adds it where it left the state.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from longspan.models.chunk_cache import ChunkCache

__all__ = ["Handover"]


class Handover(NamedTuple):
    """One tensor of a layer at the border between two chunks."""

    cache: ChunkCache
    place: Hashable
    """Whose it is: the layer, and which of its tensors."""
    chunk: int
    """The one before the border."""

    def enter(self, device: torch.device, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Return what the chunk before the border left, in the chunk behind it.

        `inputs` are those of the layer's function: where one of them has a gradient, so has what it left.
        """
        found: torch.Tensor = _Entering.apply(self, device, *inputs)
        return found

    def leave(self, tensor: torch.Tensor, out: torch.Tensor, *, write: bool) -> torch.Tensor:
        """Hand `tensor` over, and return the outputs `out`, whose backward pass brings its gradient in.

        `write`: keep it, for the chunk behind the border; else it was written before.
        """
        if write:
            # Not a view, which would keep all of its chunk.
            self.cache.write(self.place, self.chunk, tensor.detach().clone())
        found: torch.Tensor = _Leaving.apply(self, out, tensor)
        return found


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, border: Handover, device: torch.device, *inputs: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.border, ctx.num_inputs = border, len(inputs)
        return border.cache.read(border.place, border.chunk, device).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, ...]:
        border: Handover = ctx.border
        border.cache.write_gradients(border.place, border.chunk, grad_outputs[0])
        return (None,) * (2 + ctx.num_inputs)


class _Leaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, border: Handover, out: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        ctx.border, ctx.like = border, (tensor.device, tensor.dtype)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        border: Handover = ctx.border
        device, dtype = ctx.like
        found = border.cache.take_gradients(border.place, border.chunk, device)
        return None, grad_outputs[0], None if found is None else found.to(dtype)
