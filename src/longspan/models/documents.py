"""Where documents begin and end in a row of tokens: the one thing masks and positions derive from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import AttentionForm, Bands, attention, choose_kernel, cut_documents
from longspan.kernels.scans import Convolution, Scan, convolve_documents, scan_documents
from longspan.parallel.layout import Layout
from longspan.parallel.shards import SequenceShards

__all__ = ["Documents", "refuse_second_call"]


class Documents:
    """The document table of a row of tokens, handed to the model as the keyword `documents`.

    Each document attends to itself only. Padding is a document of its own. The bands are worked out once per
    sliding window and reused by every layer and by the recomputation of checkpointed layers.
    """

    def __init__(self, cu_seqlens: NDArray[np.int64]) -> None:
        self.cu_seqlens = cu_seqlens
        self._bands: dict[tuple[int | None, int | None], Bands] = {}

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int] | NDArray[np.integer] | torch.Tensor) -> Documents:
        """Return the table for document borders [documents + 1], from 0 to the number of tokens.

        Raises:
            ArgumentError: borders that do not start at 0 or go back, or no token at all.
        """
        values = cu_seqlens.cpu().numpy() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
        borders = np.array(values, dtype=np.int64).reshape(-1)
        if len(borders) < 2 or borders[0] != 0 or borders[-1] == 0 or (np.diff(borders) < 0).any():
            raise ArgumentError(
                "cu_seqlens must start at 0, never go back and end at the number of tokens",
                found=borders[:8].tolist(),
                allowed="for example [0, 5, 12] for documents of 5 and 7 tokens",
            )
        borders.setflags(write=False)
        return cls(borders)

    @classmethod
    def single(cls, num_tokens: int) -> Documents:
        """Return the table of one document that fills the row."""
        return cls.from_cu_seqlens([0, num_tokens])

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the row."""
        return int(self.cu_seqlens[-1])

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def __repr__(self) -> str:
        return f"Documents({len(self)} documents, {self.num_tokens} tokens)"

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return int64 [tokens]: 0, 1, 2, ... within each document. For [0, 3, 5]: 0 1 2 0 1."""
        starts = np.repeat(self.cu_seqlens[:-1], np.diff(self.cu_seqlens))
        return torch.from_numpy(np.arange(self.num_tokens) - starts).to(device)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, [documents]."""
        return np.diff(self.cu_seqlens)

    def bands(self, window: int | None = None, attention_chunk: int | None = None) -> Bands:
        """Return who sees whom, for full attention, a sliding window of `window` tokens or chunks of so many."""
        longest = self.lengths.max()
        # A window that no document fills is full attention.
        window = None if window is None or window >= longest else window
        chunk = None if attention_chunk is None or attention_chunk >= longest else attention_chunk
        if (window, chunk) not in self._bands:
            self._bands[window, chunk] = self._make_bands(window, chunk)
        return self._bands[window, chunk]

    def _make_bands(self, window: int | None, attention_chunk: int | None) -> Bands:
        return Bands.from_documents(cut_documents(self.cu_seqlens, attention_chunk), window=window)

    def shards(self, layout: Layout, world: int, *, window: int | None = None) -> SequenceShards:
        """Return the row spread over `world` ranks; layouts that balance do so for a sliding `window`."""
        return SequenceShards(layout, self.cu_seqlens, world, window=window)

    def state_borders(self) -> NDArray[np.int64]:
        """Return where layers with a state start anew, [documents + 1]."""
        return self.cu_seqlens

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        form: AttentionForm,
        *,
        layer: int | None = None,
    ) -> torch.Tensor:
        """Return the attention of q [tokens, heads, head_dim] over k, v of the same row.

        The attention function of `models.attention` calls this and nothing else, so a table that knows how
        a row is spread over machines, or over time (which needs to know the `layer`), takes the place of this one
        by having the same method.
        """
        bands = self.bands(form.window, form.attention_chunk)
        kernel = choose_kernel(q.device, softcap=form.softcap)
        return attention(q, k, v, bands, scale=form.scale, kernel=kernel, sinks=form.sinks)

    def convolve(self, call: Convolution, *, layer: int | None = None) -> torch.Tensor:
        """Return a causal convolution of the row, [tokens, channels], each document by itself.

        `models.mixers` calls this and `scan` as `models.attention` calls `attend`.
        """
        return convolve_documents(call, self.state_borders())

    def scan(self, scan: Scan, *, layer: int | None = None) -> torch.Tensor:
        """Return a recurrence over the row, [tokens, heads, ...], started anew in each document."""
        return scan_documents(scan, self.state_borders())[0]


def refuse_second_call(attended: set[int], layer: int) -> None:
    """Note that a layer attends in a pass whose keys are kept by layer.

    Raises:
        ArgumentError: it has already (differential attention): its second keys would take the place of its first.
    """
    if layer in attended:
        raise ArgumentError(
            f"layer {layer} of this model attends more than once, and its keys are kept once",
            fix="train it without chunks (memory.chunk_tokens), or ask it with prefix_reuse off (--no-prefix-reuse)",
        )
    attended.add(layer)
