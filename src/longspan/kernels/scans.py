"""Layers that carry a state from token to token, on packed documents: causal convolutions and recurrences.

Both work channel by channel or head by head, and start anew at a document's first token. Where the function that
computes them takes document borders (flash-linear-attention, mamba-ssm, causal-conv1d) it is called once. Else the
plain one is: a convolution once, over documents with zeros between them; a recurrence once for all documents that
fill the same number of its chunks, side by side, so that packing costs no padding that each alone would not have.

Shape legend: T = tokens of the row, C = channels, W = width of a convolution, H = heads, B = documents side by side,
L = tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Convolution", "Recurrence", "Scan", "convolve_documents", "document_ids", "scan_documents"]


class ConvolutionFunction(Protocol):
    """A causal convolution that sees zeros before the first token."""

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, borders: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x [B, C, L] convolved; with `borders` int64 [documents + 1], B is 1 and each document is by itself."""
        ...


class Convolution(NamedTuple):
    """A causal convolution of each channel of a row, and what computes it."""

    x: torch.Tensor
    """[T, C]."""
    weight: torch.Tensor
    """[C, W]."""
    bias: torch.Tensor | None
    """[C]."""
    run: ConvolutionFunction
    takes_borders: bool
    """Whether `run` keeps documents apart by itself."""

    @property
    def reach(self) -> int:
        """How many tokens before it a token sees."""
        return self.weight.shape[-1] - 1


class Recurrence(Protocol):
    """A recurrence of heads over tokens."""

    def __call__(
        self,
        tensors: tuple[torch.Tensor, ...],
        weights: tuple[torch.Tensor | None, ...],
        *,
        state: torch.Tensor | None,
        final: bool,
        borders: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the outputs [B, L, H, ...] and, if `final`, the last states [B, H, ...].

        `state` [B, H, ...] is what the first token finds, None = zeros. With `borders` int64 [documents + 1] B is 1,
        each document starts from zeros but for the first, and the last state is that of the last document.
        """
        ...


class Scan(NamedTuple):
    """A recurrence of each head over a row, and what computes it."""

    tensors: tuple[torch.Tensor, ...]
    """Each [T, heads, ...]; the heads of some (keys, groups) are fewer, each shared by as many next to each other."""
    weights: tuple[torch.Tensor | None, ...]
    """Each [H, ...]."""
    num_heads: int
    """Heads of the state, H."""
    run: Recurrence
    takes_borders: bool
    """Whether `run` keeps documents apart by itself."""
    chunk: int
    """Tokens that `run` fills a document up to a multiple of."""
    carries: bool = True
    """Whether `run` takes a state to begin with."""

    def on(self, *tensors: torch.Tensor) -> Scan:
        """Return the same recurrence of other tokens."""
        return self._replace(tensors=tensors)


def document_ids(borders: torch.Tensor) -> torch.Tensor:
    """Return which document each token is of, int32 [1, T], from borders [documents + 1] without an empty document."""
    lengths = borders.diff()
    ids = torch.arange(len(lengths), dtype=torch.int32, device=borders.device)
    return torch.repeat_interleave(ids, lengths)[None]


def convolve_documents(
    call: Convolution, cu_seqlens: NDArray[np.int64], *, tail: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the convolution of each document by itself, [T, C].

    Args:
        call: the row and what is done to it.
        cu_seqlens: document borders, [documents + 1].
        tail: [up to W - 1, C], the tokens that the first document has before the row; None = it begins here.
    """
    borders = _without_empty(cu_seqlens)
    x, before = call.x, 0 if tail is None else len(tail)
    if tail is not None:
        x = torch.cat((tail.to(x.dtype), x))
        borders = np.concatenate([[0], borders[1:] + before])
    num_documents = len(borders) - 1
    if num_documents == 1:
        out = _run_row(call, x, None)
    elif call.takes_borders:
        out = _run_row(call, x, torch.from_numpy(borders).to(x.device))
    else:
        # As many zeros between two documents as a token sees tokens before it.
        places = np.arange(borders[-1]) + call.reach * np.repeat(np.arange(num_documents), np.diff(borders))
        index = torch.from_numpy(places).to(x.device)
        spaced = x.new_zeros(int(places[-1]) + 1, x.shape[1]).index_copy(0, index, x)
        out = _run_row(call, spaced, None)[index]
    return out[before:]


def _run_row(call: Convolution, x: torch.Tensor, borders: torch.Tensor | None) -> torch.Tensor:
    # A transposed view: CUDA's kernel takes documents only where channels lie next to each other.
    return call.run(x.contiguous().T[None], call.weight, call.bias, borders)[0].T


def scan_documents(
    scan: Scan, cu_seqlens: NDArray[np.int64], *, state: torch.Tensor | None = None, final: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the recurrence of each document by itself, [T, H, ...], and the last document's state if `final`.

    Args:
        scan: the row and what is done to it.
        cu_seqlens: document borders, [documents + 1].
        state: [H, ...], what the first document's first token finds; None = it begins here.
        final: return the state [H, ...] behind the last token, too.
    """
    borders = _without_empty(cu_seqlens)
    if scan.takes_borders or len(borders) == 2:
        row = tuple(x[None] for x in scan.tensors)
        device = row[0].device
        known = torch.from_numpy(borders).to(device) if len(borders) > 2 else None
        first = None if state is None else state[None]
        out, last = scan.run(row, scan.weights, state=first, final=final, borders=known)
        return out[0], None if last is None else last[0]
    outs, places, found = [], [], None
    for documents in _side_by_side(borders, scan.chunk, first=state is not None, last=final):
        start, lengths = borders[documents], borders[documents + 1] - borders[documents]
        steps = np.arange(lengths.max())
        # What a shorter document lacks is filled with its last token, behind its end: nothing sees it.
        filled = start[:, None] + np.minimum(steps, lengths[:, None] - 1)
        index = torch.from_numpy(filled).to(scan.tensors[0].device)
        found_state = state[None] if state is not None and documents[0] == 0 else None
        is_last = final and documents[-1] == len(borders) - 2
        out, last = scan.run(
            tuple(x[index] for x in scan.tensors),
            scan.weights,
            state=found_state,
            final=is_last,
            borders=None,
        )
        if is_last and last is not None:
            found = last[0]
        real = steps < lengths[:, None]
        outs.append(out[torch.from_numpy(real).to(out.device)])
        places.append(filled[real])
    order = np.argsort(np.concatenate(places))
    return torch.cat(outs)[torch.from_numpy(order).to(outs[0].device)], found


def _side_by_side(
    borders: NDArray[np.int64], chunk: int, *, first: bool, last: bool
) -> Iterator[NDArray[np.int64]]:
    """Yield the documents that run together; the first and the last one by themselves where asked."""
    chunks = -(-np.diff(borders) // chunk)
    # A state that is brought or fetched belongs to one document.
    if first:
        chunks[0] = -1
    if last:
        chunks[-1] = -2 if len(chunks) > 1 or not first else -1
    for size in np.unique(chunks):
        yield np.flatnonzero(chunks == size)


def _without_empty(cu_seqlens: NDArray[np.int64]) -> NDArray[np.int64]:
    return cu_seqlens[np.concatenate([[True], np.diff(cu_seqlens) > 0])]
