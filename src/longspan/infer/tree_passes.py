"""Passes over a prefix tree: tokens that are read, or one more of each answer, over the keys of their strands.

A pass stands in the place of a document table: it keeps the keys and values of its tokens and says which others each of
them sees. On several ranks each has its stripes of every strand (`infer.stripes`): of a stretch that is read it
computes its own tokens, of answers' new tokens all, and its keys are shown to the queries of all.

Shape legend: T = tokens of a pass on this rank, S = rows of a block, H = query heads, K = key/value heads,
D = head dim or width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError
from longspan.infer.kv import KernelCall, KvBlock, Segment, StrandPlace, attend_parts
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
from longspan.infer.stripes import WHOLE, Stripes
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
from longspan.kernels.attention.merging import accumulation_dtype
from longspan.kernels.scans import Convolution, Scan
from longspan.models.documents import refuse_second_call

__all__ = ["DecodePass", "PrefillPass"]

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
        states: of the strands, in layers that have some; one rank alone has these.
        stripes: which tokens are this rank's; rows behind its last one fill up to as many as any has.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        places: dict[Strand, StrandPlace],
        states: TreeStates,
        kernel: AttentionKernel,
        stripes: Stripes = WHOLE,
    ) -> None:
        self.segments, self._places, self._states, self._kernel = segments, places, states, kernel
        self._stripes, self._block = stripes, places[segments[0].strand].block
        starts, ends = np.array([(s.start + first, s.start + last) for s, first, last in segments]).T
        ranks = range(stripes.ranks)
        lengths = np.array([stripes.below(ends, rank) - stripes.below(starts, rank) for rank in ranks])
        self._starts, self._offsets = starts, np.cumsum(lengths, axis=1) - lengths
        self._own = lengths[stripes.rank]
        self.num_tokens = int(lengths.sum(axis=1).max())
        """Tokens of this pass on each rank."""
        rows = [places[s].row + stripes.below(s.start + f) - stripes.below(s.start) for s, f, _ in segments]
        self._rows = _as_rows(list(zip(rows, self._own.tolist())))
        self._longest = int(ends.max())
        self._parts: dict[_Reach, list[KernelCall]] = {}
        self._pairs: dict[_Reach, int] = {}
        self._attended: set[int] = set()
        self.attention_flops = 0

    def ids(self) -> NDArray[np.int64]:
        """Return the token ids [T]."""
        return self._mine([strand.ids[first:last] for strand, first, last in self.segments])

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the position of each token in its prompt, int64 [T]."""
        found = [
            np.arange(strand.start + first, strand.start + last) for strand, first, last in self.segments
        ]
        return torch.from_numpy(self._mine(found)).to(device)

    def _mine(self, parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Return what this rank has of something of every token of the segments, filled up with 0."""
        ranks = self._stripes.ranks
        firsts = (self._stripes.rank - self._starts) % ranks
        found = np.concatenate([part[first::ranks] for part, first in zip(parts, firsts.tolist())])
        return np.pad(found, (0, self.num_tokens - len(found)))

    def hidden_of(self, hidden_TD: torch.Tensor, wanted: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return the hidden states [A, D] of (number of the segment, token of its strand), on every rank."""
        numbers, tokens = np.array(wanted, dtype=np.int64).T
        strand_starts = np.array([self.segments[number].strand.start for number in numbers])
        positions, starts = strand_starts + tokens, self._starts[numbers]
        ranks = positions % self._stripes.ranks
        rows = self._offsets[ranks, numbers] + self._stripes.below(positions, ranks)
        rows -= self._stripes.below(starts, ranks)
        if self._stripes.ranks == 1:
            return hidden_TD[torch.from_numpy(rows).to(hidden_TD.device)]
        return self._stripes.collect(hidden_TD, rows, ranks == self._stripes.rank)

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
        if (own := int(self._own.sum())) < self.num_tokens:
            k, v = k[:own], v[:own]
        self._block.append(layer, self._rows, k, v)
        reach = _reach(form, self._longest)
        if reach not in self._parts:
            self._parts[reach] = self.parts(*reach)
            self._pairs[reach] = sum(part.bands.num_pairs() for part in self._parts[reach])
        self.attention_flops += 4 * self._pairs[reach] * q.shape[1] * q.shape[2]
        kernel = _kernel_of(form, q, self._kernel)
        q_all = self._stripes.gather(q)
        out, lse = attend_parts(q_all, self._parts[reach], layer=layer, scale=form.factor(q), kernel=kernel)
        if self._stripes.ranks > 1:
            out, lse = self._stripes.home(out, lse)
        return with_sinks(out, lse, form.sinks)[0].to(q.dtype)

    def convolve(self, call: Convolution, *, layer: int | None = None) -> torch.Tensor:
        """Return a causal convolution [T, channels] of strands behind what they leave, and keep their tails."""
        place = place_of(_numbered(layer), "convolution")
        lengths, tails = [], []
        for (strand, first, last), offset in zip(self.segments, self._offsets[0].tolist()):
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
        for (strand, first, last), offset in zip(self.segments, self._offsets[0].tolist()):
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
        """Return the kernel calls of a layer with such a window or chunks, over the queries of all ranks.

        Of one process the first covers every query.
        """
        own = _Table(self._block)
        above: dict[tuple[KvBlock, int], _Table] = {}
        below = self._stripes.below
        for rank in range(self._stripes.ranks):
            for number, strand, start, end in self._cut(attention_chunk):
                # Query i is the rank's token before + i of its sequence, key j is this rank's `skipped` + j.
                before = below(start, rank)
                count = below(end, rank) - before
                row = rank * self.num_tokens + self._offsets[rank, number] + before
                row -= below(self._starts[number], rank)
                oldest = oldest_seen(start, None, attention_chunk)
                levels = list(reversed(list(strand.ancestors())))
                seen_of = [(each, each.start + seen) for each, seen in levels] + [(strand, end)]
                for level, (holder, last) in enumerate(seen_of):
                    place = self._places[holder]
                    skipped = below(max(oldest, holder.start))
                    num_keys = below(last) - skipped
                    if count == 0 or num_keys <= 0:
                        continue
                    # On its way to a rank behind this one the diagonal is shifted by a row.
                    shift = (rank - self._stripes.rank) // self._stripes.ranks
                    lo, table = skipped - before - shift, own
                    if holder is not strand:
                        lo, table = -NO_LIMIT, above.setdefault((place.block, level), _Table(place.block))
                    hi = NO_LIMIT
                    if window is not None:
                        reach = window - 1 - rank + self._stripes.rank
                        hi = reach // self._stripes.ranks + skipped - before
                    first = place.row + skipped - below(holder.start)
                    table.add(int(row), count, first, num_keys, lo=lo, hi=hi)
        return [part for table in (own, *above.values()) for part in table.parts()]

    def _cut(self, attention_chunk: int | None) -> Iterator[tuple[int, Strand, int, int]]:
        """Yield (number, strand, from position, to position) of segments, cut where chunks of attention begin."""
        for number, (strand, first, last) in enumerate(self.segments):
            begin, stop = strand.start + first, strand.start + last
            while begin < stop:
                end = stop
                if attention_chunk is not None:
                    end = min(stop, oldest_seen(begin, None, attention_chunk) + attention_chunk)
                yield number, strand, begin, end
                begin = end


class DecodePass:
    """One new token for each of several strands, again and again.

    Args:
        strands: a place has room for what is said.
        places: of the strands, all in one block, and of their ancestors.
        states: of the strands, in layers that have some; those of the steps are there after `hand_back`.
        stripes: which of the keys are this rank's.
    """

    def __init__(
        self,
        strands: Sequence[Strand],
        places: dict[Strand, StrandPlace],
        states: TreeStates,
        kernel: AttentionKernel,
        stripes: Stripes = WHOLE,
    ) -> None:
        self.strands, self._places, self._states, self._kernel = strands, places, states, kernel
        self._stripes = stripes
        self._now_states: dict[Hashable, torch.Tensor] = {}
        self._block = places[strands[0]].block
        self._start = np.array([strand.start for strand in strands], dtype=np.int64)
        rows = np.array([places[strand].row for strand in strands], dtype=np.int64)
        self._origin = rows - stripes.below(self._start)
        """A token that comes behind n of this rank's in its sequence is in the row `origin` + n."""
        self._own = np.array([len(strand.ids) for strand in strands], dtype=np.int64)
        self._above: list[_Spans] | None = None
        self._now: dict[_Reach, list[_Spans]] = {}
        self._rows: torch.Tensor | None = None
        self._mine: torch.Tensor | None = None
        self.attention_flops = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of a step, on every rank the same."""
        return len(self.strands)

    def step(self, said: NDArray[np.int64]) -> None:
        """Go to the step in which strand n reads its token number said[n] after those of its prompt."""
        self._length = self._own + said + 1
        positions = self._start + self._length - 1
        self._longest = int(positions.max()) + 1
        rows = self._origin + self._stripes.below(positions)
        if self._stripes.ranks > 1:
            mine = np.flatnonzero(positions % self._stripes.ranks == self._stripes.rank)
            rows, self._mine = rows[mine], torch.from_numpy(mine)
        self._rows = torch.from_numpy(rows)
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
        if self._mine is not None:
            self._mine = self._mine.to(k.device)
            k, v = k[self._mine], v[self._mine]
        self._block.append(layer, self._rows, k, v)
        reach = _reach(form, self._longest)
        if reach not in self._now:
            self._now[reach] = self._spans(reach)
        kernel = _kernel_of(form, q, self._kernel)
        joined: tuple[torch.Tensor, torch.Tensor] | None = None
        for block, spans in self._now[reach]:
            k_SKD, v_SKD = block.read(layer, spans.keys)
            found = spans.attend(q.to(k_SKD.dtype), k_SKD, v_SKD, form.factor(q), kernel)
            joined = found if joined is None else merge(*joined, *found)
            self.attention_flops += 4 * spans.num_pairs * q.shape[1] * q.shape[2]
        if joined is None:
            out = q.new_zeros(q.shape, dtype=accumulation_dtype(q))
            joined = out, out.new_full(out.shape[:2], float("-inf"))
        if self._stripes.ranks > 1:
            joined = self._stripes.everywhere(*joined)
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
        """Return what the tokens see of their own strand and of those above."""
        below = self._stripes.below
        first = below(np.maximum(self._oldest(reach), self._start))
        length = below(self._start + self._length) - first
        own = [(self._block, TokenSpans(self._origin + first, length))] if length.any() else []
        if reach != (None, None):
            return [*own, *self._spans_above(reach)]
        if self._above is None:
            self._above = self._spans_above(reach)
        return [*own, *self._above]

    def _spans_above(self, reach: _Reach) -> list[_Spans]:
        columns: dict[tuple[KvBlock, int], NDArray[np.int64]] = {}
        below = self._stripes.below
        for index, (strand, oldest) in enumerate(zip(self.strands, self._oldest(reach).tolist())):
            for level, (ancestor, seen) in enumerate(reversed(list(strand.ancestors()))):
                place, fork = self._places[ancestor], ancestor.start + seen
                first = below(min(max(oldest, ancestor.start), fork))
                empty = np.zeros((2, self.num_tokens), dtype=np.int64)
                columns.setdefault((place.block, level), empty)[:, index] = (
                    place.row + first - below(ancestor.start),
                    below(fork) - first,
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
        if not self._bands:
            return []
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
