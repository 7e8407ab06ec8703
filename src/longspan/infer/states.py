"""What layers with a state hold of sequences that are read piece by piece: recurrent states and convolution tails.

Unlike keys, a state has forgotten the tokens that made it: none can be taken back. So it is kept where reading goes on
from: at the forks of a prefix tree, and behind the last token of each strand that has been read. Nothing changes a
state that is kept; what is read behind it makes a new one.

    trunk         h h h h h h h h        states behind h3 and h6, where a and b leave it, and behind the last
    a             from 3:  n q           starts from the first of them; a state behind its end
    b             from 6:  n q

A state has the same size for any length: [H, ...] for a recurrence, [W - 1, C] for a convolution of W tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from longspan.core.errors import ArgumentError
from longspan.infer.prefix_tree import Strand
from longspan.kernels.scans import Convolution, Scan, convolve_documents, scan_documents

__all__ = [
    "TreeStates",
    "convolve_pieces",
    "padded_tail",
    "place_of",
    "scan_pieces",
    "step_convolution",
    "step_scan",
]

# Shape suffixes: T = tokens of a pass, B = sequences side by side, C = channels, W = width of a convolution, H = heads.


def place_of(layer: int | None, name: str) -> Hashable:
    """Return what the states of a layer are kept under; a layer may have one of each name."""
    return layer, name


class TreeStates:
    """States of the strands of a prefix tree, by how many tokens of the strand have made them."""

    def __init__(self) -> None:
        self._held: dict[Strand, dict[int, dict[Hashable, torch.Tensor]]] = {}
        self._forks: dict[Strand, frozenset[int]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        tensors = (
            t for by_tokens in self._held.values() for states in by_tokens.values() for t in states.values()
        )
        return sum(tensor.nbytes for tensor in tensors)

    def forks(self, strand: Strand) -> frozenset[int]:
        """Return after how many tokens of a strand others leave it."""
        if strand not in self._forks:
            self._forks[strand] = frozenset(child.start - strand.start for child in strand.children)
        return self._forks[strand]

    def before(self, strand: Strand, tokens: int, place: Hashable) -> torch.Tensor | None:
        """Return what the token behind the first `tokens` of a strand finds; None: it is the first of its sequence."""
        if tokens == 0:
            parent = strand.parent
            if parent is None:
                return None
            strand, tokens = parent, strand.start - parent.start
        return self._held[strand][tokens][place]

    def keep(self, strand: Strand, tokens: int, place: Hashable, state: torch.Tensor) -> None:
        """Keep the state behind the first `tokens` of a strand; of earlier ones those at forks stay."""
        held = self._held.setdefault(strand, {})
        held.setdefault(tokens, {})[place] = state
        for earlier, states in held.items():
            if earlier != tokens and earlier not in self.forks(strand):
                states.pop(place, None)

    def drop(self, strand: Strand) -> None:
        """Forget a strand, from which nothing goes on."""
        self._held.pop(strand, None)


def padded_tail(rows_TC: torch.Tensor, reach: int) -> torch.Tensor:
    """Return the last `reach` tokens of what a convolution has read, [W - 1, C]; zeros stand before the first."""
    missing = reach - len(rows_TC)
    if missing > 0:
        return torch.cat((rows_TC.new_zeros(missing, rows_TC.shape[1]), rows_TC))
    return rows_TC[len(rows_TC) - reach :].clone()


def convolve_pieces(
    call: Convolution, lengths: Sequence[int], tails: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """Return the convolution [T, C] of pieces one behind the other, each behind its tail (None: it is a beginning)."""
    parts, rows, row = [], [], 0
    borders = [0]
    for piece_TC, tail in zip(call.x.split(list(lengths)), tails):
        before = 0 if tail is None else len(tail)
        if tail is not None:
            parts.append(tail.to(piece_TC.dtype))
        parts.append(piece_TC)
        rows.append(np.arange(row + before, row + before + len(piece_TC)))
        row += before + len(piece_TC)
        borders.append(row)
    out = convolve_documents(call._replace(x=torch.cat(parts)), np.array(borders, dtype=np.int64))
    return out[torch.from_numpy(np.concatenate(rows)).to(out.device)]


def scan_pieces(
    scan: Scan, spans: Sequence[tuple[int, int]], state: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return outputs and last states of spans of a pass, each behind the one before; the first finds `state`."""
    _refuse_beginners(scan)
    outs, states = [], []
    for first, last in spans:
        part = scan.on(*(tensor[first:last] for tensor in scan.tensors))
        out, state = scan_documents(part, np.array([0, last - first]), state=state, final=True)
        assert state is not None
        outs.append(out)
        states.append(state)
    return outs, states


def step_convolution(call: Convolution, tails_BWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the convolution [B, C] of one new token for each sequence, and the tails behind it."""
    seen_BWC = torch.cat((tails_BWC, call.x[:, None].to(tails_BWC.dtype)), dim=1)
    out_BCW = call.run(seen_BWC.mT, call.weight, call.bias, None)
    return out_BCW[..., -1].to(call.x.dtype), seen_BWC[:, 1:]


def step_scan(scan: Scan, states_BH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs [B, H, ...] of one new token for each sequence, and the states behind it."""
    _refuse_beginners(scan)
    tokens = tuple(tensor[:, None] for tensor in scan.tensors)
    out, states = scan.run(tokens, scan.weights, state=states_BH, final=True, borders=None)
    assert states is not None
    return out[:, 0], states


def _refuse_beginners(scan: Scan) -> None:
    if not scan.carries:
        raise ArgumentError(
            "this model has a recurrence that cannot go on from a state, so what prompts begin with cannot be shared",
            fix="read every prompt from its first token: --no-prefix-reuse, on one process",
        )
