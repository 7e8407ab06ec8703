"""Best-fit-decreasing bin packing over equal lengths at once.

Pieces are taken from long to short; each goes to the fullest bin that still has room. Pieces of one length are
placed together, so the cost follows the number of different lengths and free spaces and not that of pieces.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit_decreasing(tokens: np.ndarray, capacity: int) -> np.ndarray:
    """Return the bin of each piece, int64 [pieces]; bins are numbered from 0 without gaps.

    `tokens` [pieces] are lengths from 1 to `capacity`. Equal lengths keep their order. Fewer than 11/9 of the
    smallest possible number of bins, plus one (Johnson 1973).

    capacity 10, tokens [6, 3, 5, 4, 2] -> bins [0, 1, 1, 0, 1]: 6 + 4, 5 + 3 + 2
    """
    order = np.argsort(-tokens, kind="stable")
    lengths, starts = np.unique(-tokens[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    bins = np.empty(len(order), np.int64)
    num_bins = 0
    free: list[int] = []  # free spaces that some bin has, ascending
    open_bins: dict[int, list[int]] = {}  # free space -> bins, the next one last
    for length, start, end in zip((-lengths).tolist(), starts.tolist(), ends.tolist()):
        at = start
        while at < end:
            fitting = bisect_left(free, length)
            if fitting == len(free):
                space, available = capacity, None
            else:
                space = free[fitting]
                available = open_bins[space]
            # A bin that took one piece is now the fullest with room, so it takes all it can.
            each = space // length
            wanted = -(-(end - at) // each)
            if available is None:
                taken = list(range(num_bins, num_bins + wanted))
                num_bins += wanted
            else:
                taken = available[-wanted:][::-1]
                del available[-wanted:]
                if not available:
                    del open_bins[space], free[fitting]
            count = min(end - at, each * len(taken))
            bins[order[at : at + count]] = np.repeat(taken, each)[:count]
            full, rest = divmod(count, each)
            _open(open_bins, free, space - each * length, taken[:full])
            if rest:
                _open(open_bins, free, space - rest * length, taken[full:])
            at += count
    return bins


def _open(open_bins: dict[int, list[int]], free: list[int], space: int, bins: list[int]) -> None:
    """Note bins with a free space; the first of `bins` is the next to be used."""
    if space == 0 or not bins:
        return
    if space in open_bins:
        open_bins[space].extend(reversed(bins))
    else:
        open_bins[space] = bins[::-1]
        insort(free, space)
