"""Keys and values of a prefix tree, and the attention of some of its tokens over them.

Strands (`infer.prefix_tree`) that are read together have their keys in one block, one strand behind the other, with
room for what they are going to say:

    block of the trunk       | h h h h h h h h |
    block of its branches    | n h h q . . | n h q . . | q . . |

A query sees the keys of its own strand up to itself, and of each ancestor those before the fork. Each is a band
(`kernels.attention.Bands`). Bands over one block in which no query stands twice make one `KernelCall`;
parts cover disjoint keys and are joined by their log-sum-exp. Keys are never copied: branches read the trunk's
where they lie, all in one call.

Shape legend: T = tokens of a pass, S = rows of a block, H = query heads, K = key/value heads, D = head dim.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError
from longspan.infer.prefix_tree import Strand
from longspan.infer.states import (
    TreeStates,
    convolve_pieces,
    padded_tail,
    place_of,
    scan_pieces,
    step_convolution,
    step_scan,
)
from longspan.infer.token_spans import TokenSpans
from longspan.kernels.attention import (
    NO_LIMIT,
    AttentionForm,
    AttentionKernel,
    Bands,
    choose_kernel,
    merge,
    with_sinks,
)
from longspan.kernels.attention.bands import oldest_seen
from longspan.kernels.scans import Convolution, Scan
from longspan.models.documents import refuse_second_call

__all__ = ["DecodePass", "KernelCall", "KvBlock", "PrefillPass", "Segment", "StrandPlace", "attend_parts"]


class KvBlock:
    """Keys and values of `rows` tokens in every layer; memory is taken when a layer first writes."""

    def __init__(self, rows: int, kernel: AttentionKernel) -> None:
        self.rows = rows
        self._widen = kernel.upcasts
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(k.nbytes + v.nbytes for k, v in self._layers.values())

    def append(
        self, layer: int, rows: slice | torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> None:
        """Write keys and values of a pass to their rows."""
        if layer not in self._layers:
            # A kernel that computes in fp32 would cast all that it reads, again and again.
            dtype = torch.promote_types(k_TKD.dtype, torch.float32) if self._widen else k_TKD.dtype
            self._layers[layer] = (self._empty(k_TKD, dtype), self._empty(k_TKD, dtype))
        for kept, new in zip(self._layers[layer], (k_TKD, v_TKD)):
            if isinstance(rows, slice):
                kept[rows] = new
            else:
                kept.index_copy_(0, rows, new.to(kept.dtype))

    def read(self, layer: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [S, K, D] of some rows, uncopied."""
        k_SKD, v_SKD = self._layers[layer]
        return k_SKD[rows], v_SKD[rows]

    def move(self, rows: int, moves: Sequence[tuple[int, int, int]]) -> None:
        """Take `rows` rows instead and bring tokens along: (old row, new row, how many)."""
        self.rows = rows
        for layer, kept in self._layers.items():
            moved = tuple(self._empty(tensor, tensor.dtype) for tensor in kept)
            for old, new, count in moves:
                for source, target in zip(kept, moved):
                    target[new : new + count] = source[old : old + count]
            self._layers[layer] = (moved[0], moved[1])

    def exchange(self, a: int, b: int, count: int) -> None:
        """Let `count` rows from `a` on and those from `b` on change places."""
        for kept in self._layers.values():
            for tensor in kept:
                held = tensor[a : a + count].clone()
                tensor[a : a + count] = tensor[b : b + count]
                tensor[b : b + count] = held

    def _empty(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return rows [S, K, D]: zeros, because a dense kernel multiplies what no query sees by 0, and 0 * NaN is NaN.

        On a CPU a head's keys lie together: a token that reads all of them then walks along memory, up to three times
        as fast as from head to head.
        """
        heads, width = like.shape[1:]
        if like.device.type == "cpu":
            return like.new_zeros((heads, self.rows, width), dtype=dtype).transpose(0, 1)
        return like.new_zeros((self.rows, heads, width), dtype=dtype)


class StrandPlace(NamedTuple):
    """Where the keys of a strand lie."""

    block: KvBlock
    row: int
    room: int
    """Rows for its own tokens and for those that it is going to say."""


class Segment(NamedTuple):
    """Tokens of a strand that are read in one pass: its tokens first .. last - 1."""

    strand: Strand
    first: int
    last: int


class KernelCall(NamedTuple):
    """One kernel call: the queries of a pass over some rows of a block."""

    block: KvBlock
    keys: slice
    bands: Bands
    """Keys are counted from the start of `keys`."""


def attend_parts(
    q_THD: torch.Tensor, parts: Sequence[KernelCall], *, layer: int, scale: float, kernel: AttentionKernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [T, H, D] and lse [T, H] over the keys of all parts.

    Keys that are held elsewhere, by another rank say, can be joined to these by `kernels.attention.merge`.
    """
    joined: tuple[torch.Tensor, torch.Tensor] | None = None
    for block, keys, bands in parts:
        k_SKD, v_SKD = block.read(layer, keys)
        found = kernel.forward(q_THD.to(k_SKD.dtype), k_SKD, v_SKD, bands, scale)
        joined = found if joined is None else merge(*joined, *found)
    assert joined is not None
    return joined


_Reach = tuple[int | None, int | None]
"""Window and chunk of a layer's attention, None where they hide nothing."""

_Spans = tuple[KvBlock, TokenSpans]


def _reach(form: AttentionForm, longest: int) -> _Reach:
    window, chunk = (
        None if limit is None or limit >= longest else limit for limit in (form.window, form.attention_chunk)
    )
    return window, chunk


def _kernel_of(form: AttentionForm, q: torch.Tensor, kernel: AttentionKernel) -> AttentionKernel:
    """Return the kernel of a layer: that of the pass, unless scores are capped."""
    return kernel if form.softcap is None else choose_kernel(q.device, softcap=form.softcap)


class PrefillPass:
    """Tokens of several strands in one forward pass, in place of a document table.

    Args:
        segments: what is read, each strand's tokens in order; what they see of other strands was read before, or
            stands in front of them here.
        places: where the keys of strands lie; all segments in one block.
        states: of the strands, in layers that have some.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        places: dict[Strand, StrandPlace],
        states: TreeStates,
        kernel: AttentionKernel,
    ) -> None:
        self.segments, self._places, self._states, self._kernel = segments, places, states, kernel
        lengths = [last - first for _, first, last in segments]
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._block = places[segments[0].strand].block
        self._rows = _as_rows([(places[s].row + first, last - first) for s, first, last in segments])
        self._longest = max(strand.start + last for strand, _, last in segments)
        self._parts: dict[_Reach, list[KernelCall]] = {}
        self._pairs: dict[_Reach, int] = {}
        self._attended: set[int] = set()
        self.attention_flops = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of this pass."""
        return int(self.offsets[-1])

    def ids(self) -> NDArray[np.int64]:
        """Return the token ids [T]."""
        return np.concatenate([strand.ids[first:last] for strand, first, last in self.segments])

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the position of each token in its prompt, int64 [T]."""
        found = [
            np.arange(strand.start + first, strand.start + last) for strand, first, last in self.segments
        ]
        return torch.from_numpy(np.concatenate(found)).to(device)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        form: AttentionForm,
        *,
        layer: int | None = None,
    ) -> torch.Tensor:
        """Keep k, v [T, K, D] and return the attention of q [T, H, D] over all that its tokens see."""
        layer = _numbered(layer)
        refuse_second_call(self._attended, layer)
        if isinstance(self._rows, torch.Tensor):
            self._rows = self._rows.to(k.device)
        self._block.append(layer, self._rows, k, v)
        reach = _reach(form, self._longest)
        if reach not in self._parts:
            self._parts[reach] = self.parts(*reach)
            self._pairs[reach] = sum(part.bands.num_pairs() for part in self._parts[reach])
        self.attention_flops += 4 * self._pairs[reach] * q.shape[1] * q.shape[2]
        kernel = _kernel_of(form, q, self._kernel)
        out, lse = attend_parts(q, self._parts[reach], layer=layer, scale=form.factor(q), kernel=kernel)
        return with_sinks(out, lse, form.sinks)[0].to(q.dtype)

    def convolve(self, call: Convolution, *, layer: int | None = None) -> torch.Tensor:
        """Return a causal convolution [T, channels] of strands behind what they leave, and keep their tails."""
        place = place_of(_numbered(layer), "convolution")
        lengths, tails = [], []
        for (strand, first, last), offset in zip(self.segments, self.offsets.tolist()):
            tail = self._states.before(strand, first, place)
            rows = call.x[offset : offset + last - first]
            seen = rows if tail is None else torch.cat((tail, rows.to(tail.dtype)))
            skipped = len(seen) - len(rows) - first
            for tokens in self._stops(strand, first, last):
                self._states.keep(strand, tokens, place, padded_tail(seen[: skipped + tokens], call.reach))
            lengths.append(last - first)
            tails.append(tail)
        return convolve_pieces(call, lengths, tails)

    def scan(self, scan: Scan, *, layer: int | None = None) -> torch.Tensor:
        """Return a recurrence [T, H, ...] over strands, from the states where they leave others, and keep theirs."""
        place = place_of(_numbered(layer), "state")
        outs: list[torch.Tensor] = []
        for (strand, first, last), offset in zip(self.segments, self.offsets.tolist()):
            stops = self._stops(strand, first, last)
            begins = [first, *stops[:-1]]
            spans = [(offset + begin - first, offset + stop - first) for begin, stop in zip(begins, stops)]
            found, states = scan_pieces(scan, spans, self._states.before(strand, first, place))
            outs += found
            for tokens, state in zip(stops, states):
                self._states.keep(strand, tokens, place, state)
        return torch.cat(outs)

    def _stops(self, strand: Strand, first: int, last: int) -> list[int]:
        """Return behind which tokens of a segment a state is wanted: where others leave it, and at its end."""
        return sorted({last, *(tokens for tokens in self._states.forks(strand) if first < tokens < last)})

    def parts(self, window: int | None, attention_chunk: int | None = None) -> list[KernelCall]:
        """Return the kernel calls of a layer with such a window or chunks; the first covers every query."""
        own = _Table(self._block)
        above: dict[tuple[KvBlock, int], _Table] = {}
        for strand, first, last, offset in self._cut(attention_chunk):
            # Query i is the strand's token first + i; key j is its token skipped + j.
            oldest = oldest_seen(strand.start + first, None, attention_chunk)
            skipped = max(0, oldest - strand.start)
            hi = NO_LIMIT if window is None else window - 1 - first + skipped
            row = self._places[strand].row + skipped
            own.add(offset, last - first, row, last - skipped, lo=skipped - first, hi=hi)
            chain = list(strand.ancestors())
            for level, (ancestor, seen) in enumerate(reversed(chain)):
                # Key j stands at ancestor.start + skipped + j, before every query.
                skipped = min(max(oldest - ancestor.start, 0), seen)
                ahead = strand.start + first - ancestor.start - skipped
                hi = NO_LIMIT if window is None else window - 1 - ahead
                place = self._places[ancestor]
                table = above.setdefault((place.block, level), _Table(place.block))
                table.add(offset, last - first, place.row + skipped, seen - skipped, lo=-NO_LIMIT, hi=hi)
        tables = [own, *above.values()]
        return [part for table in tables for part in table.parts()]

    def _cut(self, attention_chunk: int | None) -> Iterator[tuple[Strand, int, int, int]]:
        """Yield (strand, first, last, row of the pass) of the segments, cut where chunks of attention begin."""
        for (strand, first, last), offset in zip(self.segments, self.offsets.tolist()):
            begin = first
            while begin < last:
                end = last
                if attention_chunk is not None:
                    cut = oldest_seen(strand.start + begin, None, attention_chunk) + attention_chunk
                    end = min(last, cut - strand.start)
                yield strand, begin, end, offset + begin - first
                begin = end


class DecodePass:
    """One new token for each of several strands, again and again.

    Args:
        strands: a place has room for what is said.
        places: of the strands, all in one block, and of their ancestors.
        states: of the strands, in layers that have some; those of the steps are there after `hand_back`.
    """

    def __init__(
        self,
        strands: Sequence[Strand],
        places: dict[Strand, StrandPlace],
        states: TreeStates,
        kernel: AttentionKernel,
    ) -> None:
        self.strands, self._places, self._states, self._kernel = strands, places, states, kernel
        self._now_states: dict[Hashable, torch.Tensor] = {}
        self._block = places[strands[0]].block
        self._first_row = np.array([places[strand].row for strand in strands], dtype=np.int64)
        self._start = np.array([strand.start for strand in strands], dtype=np.int64)
        self._own = np.array([len(strand.ids) for strand in strands], dtype=np.int64)
        self._above: list[_Spans] | None = None
        self._now: dict[_Reach, list[_Spans]] = {}
        self._rows: torch.Tensor | None = None
        self.attention_flops = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of a step."""
        return len(self.strands)

    def step(self, said: NDArray[np.int64]) -> None:
        """Go to the step in which strand n reads its token number said[n] after those of its prompt."""
        self._length = self._own + said + 1
        self._rows = torch.from_numpy(self._first_row + self._length - 1)
        self._now.clear()

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the position of each token, int64 [T]."""
        return torch.from_numpy(self._start + self._length - 1).to(device)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        form: AttentionForm,
        *,
        layer: int | None = None,
    ) -> torch.Tensor:
        """Keep k, v [T, K, D] and return the attention of q [T, H, D] over all that its tokens see."""
        layer = _numbered(layer)
        assert self._rows is not None
        self._rows = self._rows.to(k.device)
        self._block.append(layer, self._rows, k, v)
        reach = _reach(form, int((self._start + self._length).max()))
        if reach not in self._now:
            self._now[reach] = self._spans(reach)
        kernel = _kernel_of(form, q, self._kernel)
        joined: tuple[torch.Tensor, torch.Tensor] | None = None
        for block, spans in self._now[reach]:
            k_SKD, v_SKD = block.read(layer, spans.keys)
            found = spans.attend(q.to(k_SKD.dtype), k_SKD, v_SKD, form.factor(q), kernel)
            joined = found if joined is None else merge(*joined, *found)
            self.attention_flops += 4 * spans.num_pairs * q.shape[1] * q.shape[2]
        assert joined is not None
        return with_sinks(*joined, form.sinks)[0].to(q.dtype)

    def convolve(self, call: Convolution, *, layer: int | None = None) -> torch.Tensor:
        """Return a causal convolution [T, channels] of the tokens of a step."""
        place = place_of(_numbered(layer), "convolution")
        out, self._now_states[place] = step_convolution(call, self._side_by_side(place))
        return out

    def scan(self, scan: Scan, *, layer: int | None = None) -> torch.Tensor:
        """Return a recurrence [T, H, ...] over the tokens of a step."""
        place = place_of(_numbered(layer), "state")
        out, self._now_states[place] = step_scan(scan, self._side_by_side(place))
        return out

    def _side_by_side(self, place: Hashable) -> torch.Tensor:
        """Return what the tokens of a step find, [T, ...]."""
        if place not in self._now_states:
            read = (self._length - 1).tolist()
            found = [self._states.before(*each, place) for each in zip(self.strands, read)]
            self._now_states[place] = torch.stack([state for state in found if state is not None])
        return self._now_states[place]

    def hand_back(self) -> None:
        """Let the states of the last step be those of the strands."""
        for place, states in self._now_states.items():
            for strand, tokens, state in zip(self.strands, self._length.tolist(), states):
                self._states.keep(strand, tokens, place, state)
        self._now_states.clear()

    def _oldest(self, reach: _Reach) -> NDArray[np.int64]:
        """Return the first position that each token sees."""
        positions = (self._start + self._length - 1).tolist()
        return np.array([oldest_seen(position, *reach) for position in positions], dtype=np.int64)

    def _spans(self, reach: _Reach) -> list[_Spans]:
        """Return what the tokens see of their own strand, which is something for each, and of those above."""
        first = np.maximum(self._oldest(reach) - self._start, 0)
        own = TokenSpans(self._first_row + first, self._length - first)
        if reach != (None, None):
            return [(self._block, own), *self._spans_above(reach)]
        if self._above is None:
            self._above = self._spans_above(reach)
        return [(self._block, own), *self._above]

    def _spans_above(self, reach: _Reach) -> list[_Spans]:
        columns: dict[tuple[KvBlock, int], NDArray[np.int64]] = {}
        for index, (strand, oldest) in enumerate(zip(self.strands, self._oldest(reach).tolist())):
            for level, (ancestor, seen) in enumerate(reversed(list(strand.ancestors()))):
                place = self._places[ancestor]
                skipped = min(max(oldest - ancestor.start, 0), seen)
                empty = np.zeros((2, self.num_tokens), dtype=np.int64)
                columns.setdefault((place.block, level), empty)[:, index] = (
                    place.row + skipped,
                    seen - skipped,
                )
        return [(block, TokenSpans(*column)) for (block, _), column in columns.items() if column[1].any()]


class _Table:
    """Bands over one block, in its rows, that have no query in common."""

    def __init__(self, block: KvBlock) -> None:
        self._block = block
        self._bands: list[tuple[int, int, int, int, int, int]] = []

    def add(
        self, q_start: int, q_len: int, k_start: int, k_len: int, *, lo: int = -NO_LIMIT, hi: int = NO_LIMIT
    ) -> None:
        if self._bands and (lo, hi) == (-NO_LIMIT, NO_LIMIT):
            # Neighbours that see all of the same keys are one rectangle.
            start, length, *rest = self._bands[-1]
            if start + length == q_start and rest == [k_start, k_len, lo, hi]:
                self._bands[-1] = (start, length + q_len, k_start, k_len, lo, hi)
                return
        self._bands.append((q_start, q_len, k_start, k_len, lo, hi))

    def parts(self) -> list[KernelCall]:
        """Return the kernel call, if anything is seen."""
        q_start, q_len, k_start, k_len, lo, hi = np.array(self._bands, dtype=np.int64).T
        first, last = int(k_start.min()), int((k_start + k_len).max())
        bands = Bands(q_start, q_len, k_start - first, k_len, lo=lo, hi=hi)
        return [KernelCall(self._block, slice(first, last), bands)] if len(bands) else []


def _as_rows(spans: Sequence[tuple[int, int]]) -> slice | torch.Tensor:
    """Return the rows of spans (start, length) one behind the other, as a slice where they are one."""
    start, stop = spans[0][0], spans[0][0]
    for first, length in spans:
        if first != stop:
            rows = np.concatenate([np.arange(first, first + length) for first, length in spans])
            return torch.from_numpy(rows)
        stop += length
    return slice(start, stop)


def _numbered(layer: int | None) -> int:
    if layer is None:
        raise ArgumentError(
            "this model does not number its attention layers, so their keys cannot be kept",
            fix="run it without prefix reuse",
        )
    return layer
