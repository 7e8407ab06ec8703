"""Cutting documents into pieces: where each piece starts and what it holds, over whole columns of documents.

With rows of 8 tokens, `overlap` 2 and a token in front of continuations (M), a document of 15 tokens a to o
that begins where 3 tokens of a row are left is cut into

    ... a b c | M b c d e f g h | M g h i j k l m | M l m n o         repeated: b c, g h, l m
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from longspan.data.plans.pack_config import PackConfig, Pieces


class _Cuts(NamedTuple):
    """How documents are cut: the first piece takes `first` tokens, the second `second`, others `other`."""

    kept: np.ndarray
    """Framed tokens that are placed."""
    num_pieces: np.ndarray
    first: np.ndarray
    second: np.ndarray
    other: int
    repeated: np.ndarray
    """Tokens of the first piece that the second repeats."""


def cut_where_rows_end(spec: PackConfig, tokens: np.ndarray, phase: int, dropped: dict[str, int]) -> Pieces:
    """Cut documents of `tokens` int64 [documents], none of them 0; count the own tokens that are left out.

    Pieces fill rows one after another; `phase` is the number of tokens in the row that is being filled.
    """
    framed = _framed(spec, tokens, dropped)
    cuts = _cuts(spec, framed, spec.length - _phases(spec, framed, phase))
    return _pieces(spec, _without_tails(spec, tokens, cuts, dropped))


def cut_to_rows(spec: PackConfig, tokens: np.ndarray, phase: int, dropped: dict[str, int]) -> Pieces:
    """Cut documents as above, each from the beginning of a row."""
    framed = _framed(spec, tokens, dropped)
    cuts = _without_tails(spec, tokens, _cuts(spec, framed, np.full_like(framed, spec.length)), dropped)
    if spec.remainder == "drop":
        last = _last(cuts)
        again = np.where(cuts.num_pieces > 2, spec.overlap, cuts.repeated) + spec.num_mos
        full = last + np.where(cuts.num_pieces > 1, again, 0) == spec.length
        cuts = _without_last(spec, tokens, cuts, np.where(full, 0, last), dropped, "remainder")
    return _pieces(spec, cuts)


def cut_to_lengths(spec: PackConfig, tokens: np.ndarray, phase: int, dropped: dict[str, int]) -> Pieces:
    """Cut documents into the longest of `split_lengths` that fit (with overflow drop_tail the first piece alone); keep
    those of `piece_length`."""
    mos = spec.num_mos
    framed = tokens + spec.num_bos + spec.num_eos
    position = np.zeros_like(framed)
    pieces = Pieces(*(np.zeros(0, np.int64) for _ in range(4)))
    for length in spec.split_lengths:
        # The first piece of a document has no MOS, so it takes `mos` tokens more.
        first = np.where(position == 0, mos, 0)
        count = np.maximum(framed - position - first, 0) // (length - mos)
        if spec.overflow == "drop_tail":
            count = np.minimum(count, position == 0)
        end = position + count * (length - mos) + first * (count > 0)
        if length == spec.piece_length:
            document = np.repeat(np.arange(len(framed)), count)
            ordinal = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
            start = position[document] + ordinal * (length - mos) + first[document] * (ordinal > 0)
            pieces = Pieces(document, start, np.full_like(start, length), np.zeros_like(start))
        else:
            dropped["other_lengths"] += _between(spec, tokens, position, end)
        position = end
    if spec.overflow == "drop_tail":
        rest = np.where(position > 0, framed, 0)
        dropped["overflow"] += _between(spec, tokens, np.minimum(position, rest), rest)
        position = np.maximum(position, rest)
    dropped["tail"] += _between(spec, tokens, position, framed)
    return pieces


def own_tokens(
    spec: PackConfig, tokens: np.ndarray, start: np.ndarray, count: np.ndarray, repeated: np.ndarray
) -> np.ndarray:
    """Return how many tokens of each span are the document's own and not repeated, int64 [spans].

    Framed position p is token p - num_bos; `tokens` are the lengths of the spans' documents.
    """
    begin = start.astype(np.int64)
    low = np.maximum(begin + repeated, spec.num_bos)
    high = np.minimum(begin + count - spec.num_mos * (begin > 0), spec.num_bos + tokens.astype(np.int64))
    return np.maximum(high - low, 0)


def cut_across(spec: PackConfig, tokens: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """Cut documents into rows that begin with the last `overlap` tokens of the row before, whatever they are of.

    With rows of 8 tokens and `overlap` 2, documents a to e and A to M stand in

        a b c d e A B C | B C D E F G H I | H I J K L M

    Returns the pieces, which stand in the order of the rows, and int64 [rows + 1] the pieces before each row. The last
    row may be short, and may hold repeated tokens alone.
    """
    framed = tokens + spec.num_bos + spec.num_eos
    ends = np.cumsum(framed)
    total = int(ends[-1]) if len(ends) else 0
    # A row is begun as soon as the one before it is full.
    stop = total - spec.overlap + 1 if total >= spec.length else min(total, 1)
    row_starts = np.arange(0, stop, spec.length - spec.overlap)
    row_ends = np.minimum(row_starts + spec.length, total)
    first = np.searchsorted(ends, row_starts, side="right")
    counts = np.searchsorted(ends, row_ends, side="left") + 1 - first
    offsets = np.concatenate([[0], np.cumsum(counts)])
    row = np.repeat(np.arange(len(row_starts)), counts)
    document = np.arange(len(row)) - np.repeat(offsets[:-1] - first, counts)
    begin = ends[document] - framed[document]
    start = np.maximum(row_starts[row] - begin, 0)
    end = np.minimum(row_ends[row], ends[document]) - begin
    again = np.minimum(row_starts[row] + spec.overlap * (row > 0) - begin, end)
    return Pieces(document, start, end - start, np.maximum(again - start, 0)), offsets


def _framed(spec: PackConfig, tokens: np.ndarray, dropped: dict[str, int]) -> np.ndarray:
    """Return the framed tokens of each document that are placed."""
    framed = tokens + spec.num_bos + spec.num_eos
    if spec.overflow == "drop_tail":
        heads = np.minimum(framed, spec.length)
        dropped["overflow"] += _between(spec, tokens, heads, framed)
        return heads
    return framed


def _phases(spec: PackConfig, framed: np.ndarray, phase: int) -> np.ndarray:
    """Return how many tokens the row holds in which each document begins."""
    length, least, overlap, mos = spec.length, spec.min_tail, spec.overlap, spec.num_mos
    if least == 1 and not overlap and not mos:
        return (phase + np.cumsum(framed) - framed) % length
    # A dropped or repeated token moves all that follows, so this is a loop: 0.3 us a document.
    phases = []
    other = length - mos - overlap
    for tokens in framed.tolist():
        phases.append(phase)
        room = length - phase
        if tokens <= room:
            phase = (phase + tokens) % length
            continue
        repeated = overlap if room > overlap else 0
        second = length - mos - repeated
        rest = tokens - room
        if rest <= second:
            new, again = rest, mos + repeated
        else:
            new, again = (rest - second - 1) % other + 1, mos + overlap
        phase = 0 if new < least else (new + again) % length
    return np.array(phases, np.int64)


def _cuts(spec: PackConfig, framed: np.ndarray, room: np.ndarray) -> _Cuts:
    first = np.minimum(framed, room)
    repeated = np.where(first > spec.overlap, spec.overlap, 0)
    second = spec.length - spec.num_mos - repeated
    other = spec.length - spec.num_mos - spec.overlap
    rest = framed - first
    num_pieces = 1 + (rest > 0) + np.maximum(rest - second + other - 1, 0) // other
    return _Cuts(framed, num_pieces, first, second, other, repeated)


def _last(cuts: _Cuts) -> np.ndarray:
    """Return the new tokens of the last piece of each document."""
    before = cuts.first + cuts.second + (cuts.num_pieces - 3) * cuts.other
    before = np.where(cuts.num_pieces == 2, cuts.first, before)
    return cuts.kept - np.where(cuts.num_pieces < 2, 0, before)


def _without_tails(spec: PackConfig, tokens: np.ndarray, cuts: _Cuts, dropped: dict[str, int]) -> _Cuts:
    tail = _last(cuts)
    short = (cuts.num_pieces > 1) & (tail < spec.min_tail)
    return _without_last(spec, tokens, cuts, np.where(short, tail, 0), dropped, "tail")


def _without_last(
    spec: PackConfig,
    tokens: np.ndarray,
    cuts: _Cuts,
    lost: np.ndarray,
    dropped: dict[str, int],
    reason: str,
) -> _Cuts:
    """Leave the last piece of some documents out: `lost` is its new tokens, 0 where it stays."""
    if not lost.any():
        return cuts
    kept = cuts.kept - lost
    dropped[reason] += _between(spec, tokens, kept, cuts.kept)
    return cuts._replace(
        kept=kept, num_pieces=cuts.num_pieces - (lost > 0), first=np.minimum(cuts.first, kept)
    )


def _pieces(spec: PackConfig, cuts: _Cuts) -> Pieces:
    document = np.repeat(np.arange(len(cuts.kept)), cuts.num_pieces)
    ordinal = np.arange(len(document)) - np.repeat(
        np.cumsum(cuts.num_pieces) - cuts.num_pieces, cuts.num_pieces
    )
    later = np.maximum(ordinal - 1, 0) * cuts.other
    ends = np.where(ordinal > 0, cuts.second[document], 0) + later + cuts.first[document]
    end = np.minimum(ends, cuts.kept[document])
    repeated = np.where(ordinal > 1, spec.overlap, np.where(ordinal > 0, cuts.repeated[document], 0))
    begin = np.zeros_like(end)
    begin[1:] = end[:-1]
    start = np.where(ordinal > 0, begin - repeated, 0)
    return Pieces(document, start, end - start + spec.num_mos * (ordinal > 0), repeated)


def _between(spec: PackConfig, tokens: np.ndarray, low: np.ndarray, high: np.ndarray) -> int:
    """Return the documents' own tokens between two framed positions."""
    own = np.minimum(high, spec.num_bos + tokens) - np.maximum(low, spec.num_bos)
    return int(np.maximum(own, 0).sum())
