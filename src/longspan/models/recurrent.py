"""A row of documents walked in chunks: exact attention and gradients while one chunk of activations is alive.

Chunks 0 .. n-1 of a row run one after the other. A first walk, forward and without gradients, writes the keys and
values that later chunks read. A second walk goes backward: chunk n-1 runs with gradients, its backward pass adds to
the gradients of the keys and values of the chunks before it, then chunk n-2 runs, and its own keys receive what later
chunks added for them. The last chunk runs once, the others twice forward.

    chunk            0      1      2                 keys and values of 0 and 1 wait for their gradients
    first walk       run -> run
    second walk      run <- run <- run               each with a backward pass; then its keys are given up

What grows with the length is the cache alone: per token, layer and key/value head 2 * head_dim elements of keys and
values and as many fp32 ones of gradients (Llama-3-8B in bf16: 128 + 256 KiB a token), on the device or on the host.
Only what a later chunk reads is kept: of a chunk that ends inside a document, the part of that document, and of
that no more than the layer's window; where documents branch, from the first to the last token that a branch behind
the chunk follows.

Attention reads the cache chunk by chunk and joins the parts through their log-sum-exp, so what it needs beside
is one chunk of keys and values with gradients, whatever the length.

Shape legend: C = tokens of a chunk, S = kept tokens of an earlier one, H = query heads, K = key/value heads, D =
head dim.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import (
    AttentionForm,
    AttentionKernel,
    Bands,
    Places,
    choose_kernel,
    sink_gradient,
    with_sinks,
)
from longspan.kernels.attention.merging import accumulation_dtype
from longspan.kernels.scans import Convolution, Scan, convolve_documents, scan_documents
from longspan.models.chunk_cache import ChunkCache
from longspan.models.chunk_states import Handover
from longspan.models.documents import Documents, refuse_second_call
from longspan.parallel.schedules.base import Partial

__all__ = ["ChunkDocuments", "ChunkedRow"]


class ChunkedRow:
    """The document table of a row, cut into chunks of tokens, and the cache that joins them.

    Args:
        documents: the table of the whole row.
        chunk_tokens: tokens of a chunk; the last one may be shorter.
        offload: keep the cache in host memory.

    Raises:
        ArgumentError: a chunk without a token.
    """

    def __init__(self, documents: Documents, chunk_tokens: int, *, offload: bool = False) -> None:
        if chunk_tokens < 1:
            raise ArgumentError("a chunk needs at least one token", found=chunk_tokens, allowed=">= 1")
        self.documents, self.chunk_tokens = documents, chunk_tokens
        self.cache = ChunkCache(offload=offload)
        self._positions = documents.positions()
        self._kept: dict[tuple[int, int | None, int | None], slice] = {}

    def __len__(self) -> int:
        return math.ceil(self.documents.num_tokens / self.chunk_tokens)

    def span(self, chunk: int) -> slice:
        """Return the places of a chunk's tokens in the row."""
        start = chunk * self.chunk_tokens
        return slice(start, min(start + self.chunk_tokens, self.documents.num_tokens))

    def is_read_later(self, chunk: int) -> bool:
        """Whether a later chunk needs something of this one: a document goes on behind it, or branches off it."""
        kept = self.kept(chunk, None)
        return kept.start < kept.stop

    def kept(self, chunk: int, window: int | None, attention_chunk: int | None = None) -> slice:
        """Return the tokens of a chunk that later ones may see, as places in the row."""
        key = chunk, window, attention_chunk
        if key not in self._kept:
            span = self.span(chunk)
            behind = Places.between(span.stop, self.documents.num_tokens)
            seen = self.documents.bands(window, attention_chunk).select(behind, _places(span))
            first, last = (
                seen.k_start.min(initial=span.stop - span.start),
                (seen.k_start + seen.k_len).max(initial=0),
            )
            self._kept[key] = slice(span.start + int(first), span.start + max(int(first), int(last)))
        return self._kept[key]

    def borders(self, chunk: int) -> NDArray[np.int64]:
        """Return where layers with a state start anew in a chunk, from 0 to its number of tokens, once each."""
        span = self.span(chunk)
        inside = np.clip(self.documents.state_borders(), span.start, span.stop) - span.start
        return np.unique(inside)

    def bands(
        self, chunk: int, window: int | None, attention_chunk: int | None = None
    ) -> tuple[Bands, list[tuple[int, Bands]]]:
        """Return who sees whom in a chunk, and for each earlier chunk that it sees something of, who sees what.

        Keys of an earlier chunk are numbered among those that are kept of it.
        """
        span = self.span(chunk)
        rows = Places.between(0, span.stop - span.start)
        # Queries are numbered in the chunk, keys still in the row.
        mine = self.documents.bands(window, attention_chunk).select(
            _places(span), Places.between(0, self.documents.num_tokens)
        )
        earlier = []
        for before in range(int(mine.k_start.min()) // self.chunk_tokens, chunk):
            found = mine.select(rows, _places(self.kept(before, window, attention_chunk)))
            if len(found):
                earlier.append((before, found))
        return mine.select(rows, _places(span)), earlier

    def chunk(self, index: int, *, write: bool) -> ChunkDocuments:
        """Return the table to hand to the model with the tokens of a chunk; the chunks before were written.

        `write`: keep keys and values for the chunks behind it.
        """
        return ChunkDocuments(self, index, write=write)

    def release(self, chunk: int) -> None:
        """Give up the keys of a chunk whose backward pass is done."""
        self.cache.release(chunk)


def _places(span: slice) -> Places:
    return Places.between(span.start, span.stop)


class ChunkDocuments:
    """One chunk of a row, in place of the document table of a whole row; made by `ChunkedRow.chunk`."""

    def __init__(self, row: ChunkedRow, index: int, *, write: bool) -> None:
        self.row, self.index, self.write = row, index, write
        self._bands: dict[tuple[int | None, int | None], tuple[Bands, list[tuple[int, Bands]]]] = {}
        self._attended: set[int] = set()

    def __repr__(self) -> str:
        return f"ChunkDocuments({self.index} of {len(self.row)})"

    @property
    def num_tokens(self) -> int:
        """Tokens of this chunk."""
        span = self.row.span(self.index)
        return span.stop - span.start

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the position of each token in its document, int64 [num_tokens]."""
        return self.row._positions[self.row.span(self.index)].to(device)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        form: AttentionForm,
        *,
        layer: int | None = None,
    ) -> torch.Tensor:
        """Return the attention of the chunk's queries over its own keys and those of the chunks before.

        Raises:
            ArgumentError: `layer` is None, or has attended already: the cache is kept by layer.
        """
        if layer is None:
            raise ArgumentError(
                "this model does not number its attention layers, so their keys cannot be kept from chunk to chunk",
                fix="train this model without chunks",
            )
        if self.write:
            refuse_second_call(self._attended, layer)
        reach = form.window, form.attention_chunk
        if reach not in self._bands:
            self._bands[reach] = self.row.bands(self.index, *reach)
        if self.write:
            here = self._kept(reach)
            if here.start < here.stop:
                self.row.cache.write(layer, self.index, torch.stack((k.detach()[here], v.detach()[here])))
        own, earlier = self._bands[reach]
        kernel = choose_kernel(q.device, softcap=form.softcap)
        call = _Call(
            self.row.cache, layer, self.index, self._kept(reach), own, dict(earlier), form.factor(q), kernel
        )
        return _ChunkAttention.apply(q, k, v, form.sinks, call)

    def _kept(self, reach: tuple[int | None, int | None]) -> slice:
        """Return the tokens of this chunk that are kept, counted from its first."""
        kept, start = self.row.kept(self.index, *reach), self.row.span(self.index).start
        return slice(kept.start - start, kept.stop - start)

    def convolve(self, call: Convolution, *, layer: int | None = None) -> torch.Tensor:
        """Return a causal convolution of the chunk, [C, channels]; a document that goes on sees what it had before.

        Raises:
            ArgumentError: `layer` is None.
        """
        borders, entering, leaving = self._borders(layer, "convolution")
        tail = None if entering is None else entering.enter(call.x.device, call.x)
        out = convolve_documents(call, borders, tail=tail)
        if leaving is None:
            return out
        last = call.x[borders[-2] :]
        if tail is not None and len(borders) == 2:
            last = torch.cat((tail, last))
        return leaving.leave(last[max(0, len(last) - call.reach) :], out, write=self.write)

    def scan(self, scan: Scan, *, layer: int | None = None) -> torch.Tensor:
        """Return a recurrence over the chunk, [C, heads, ...]; a document that goes on starts from its state.

        Raises:
            ArgumentError: `layer` is None, or a recurrence that takes no state to begin with.
        """
        borders, entering, leaving = self._borders(layer, "state")
        if not scan.carries and (entering or leaving):
            raise ArgumentError(
                "this model has a recurrence that cannot go on from a state, so its rows cannot be cut into chunks",
                fix="train this model without chunks (train.chunk_tokens)",
            )
        state = None
        if entering is not None:
            state = entering.enter(scan.tensors[0].device, *scan.tensors, *scan.weights)
        out, last = scan_documents(scan, borders, state=state, final=leaving is not None)
        if leaving is None:
            return out
        assert last is not None
        return leaving.leave(last, out, write=self.write)

    def _borders(
        self, layer: int | None, name: str
    ) -> tuple[NDArray[np.int64], Handover | None, Handover | None]:
        """Return the documents' borders in this chunk, and where what goes on enters and leaves it."""
        if layer is None:
            raise ArgumentError(
                "this model does not number its layers with a state, so it cannot be kept from chunk to chunk",
                fix="train this model without chunks",
            )
        before, here = (
            Handover(self.row.cache, (layer, name), chunk) for chunk in (self.index - 1, self.index)
        )
        entering = before if self.index > 0 and self.row.is_read_later(self.index - 1) else None
        return self.row.borders(self.index), entering, here if self.row.is_read_later(self.index) else None


class _Call(NamedTuple):
    cache: ChunkCache
    layer: int
    chunk: int
    kept: slice
    """Tokens of this chunk that the cache has."""
    own: Bands
    earlier: dict[int, Bands]
    scale: float
    kernel: AttentionKernel

    def widen(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cast up for a kernel that computes in fp32 anyway and would round its parts."""
        return tuple(t.to(accumulation_dtype(t)) for t in tensors) if self.kernel.upcasts else tensors


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        call: _Call,
    ) -> torch.Tensor:
        partial = Partial(q)
        queries, keys, values = call.widen(q, k, v)
        partial.add(*call.kernel.forward(queries, keys, values, call.own, call.scale))
        for chunk, kv_2SKD, _ in call.cache.walk(call.layer, list(call.earlier), q.device):
            keys, values = call.widen(*kv_2SKD)
            partial.add(*call.kernel.forward(queries, keys, values, call.earlier[chunk], call.scale))
        out, lse = with_sinks(partial.out, partial.lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        call: _Call = ctx.call
        dtype = accumulation_dtype(q)
        wants_kv = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dout, queries, outputs = call.widen(grad_outputs[0].contiguous(), q, out)

        def gradients(keys: torch.Tensor, values: torch.Tensor, bands: Bands) -> list[torch.Tensor]:
            keys, values = call.widen(keys, values)
            parts = call.kernel.backward(dout, queries, keys, values, outputs, lse, bands, call.scale)
            return [part.to(dtype) for part in parts]

        dq, dk, dv = gradients(k, v, call.own)
        walk = call.cache.walk(call.layer, list(call.earlier), q.device, gradients=wants_kv)
        for chunk, kv_2SKD, total_2SKD in walk:
            dq_part, *dkv = gradients(kv_2SKD[0], kv_2SKD[1], call.earlier[chunk])
            dq += dq_part
            if not wants_kv:
                continue
            if total_2SKD is None:
                total_2SKD = torch.stack(dkv)
            else:
                for total, part in zip(total_2SKD, dkv):
                    total += part
            call.cache.write_gradients(call.layer, chunk, total_2SKD)
        added_2SKD = call.cache.take_gradients(call.layer, call.chunk, q.device)
        if added_2SKD is not None:
            dk[call.kept] += added_2SKD[0]
            dv[call.kept] += added_2SKD[1]
        dsinks = sink_gradient(grad_outputs[0], out, lse, sinks)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None
