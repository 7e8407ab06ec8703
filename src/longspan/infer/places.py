"""Where the keys of strands lie while they are held: trunks in blocks of their own, all others side by side in one.

    a, b, c are written     a a . | b b . | c c c . .        each has room for its tokens and for what it says
    a has ended             b b . |       | c c c . .        the last of its size takes its place
    d is to be read         b b . | d d . | c c c . .        in a place that is free; where none is, all are moved

Places of one size lie next to each other: those at an even distance are read in one kernel call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from longspan.infer.kv import KvBlock, StrandPlace
from longspan.infer.kv_types import KvDtype
from longspan.infer.prefix_tree import Strand
from longspan.kernels.attention import AttentionKernel

__all__ = ["StrandPlaces"]


class StrandPlaces:
    """The places of strands that are held.

    Args:
        kernel: reads the keys.
        kind: type in which they are held; None: as they are computed.
    """

    def __init__(self, kernel: AttentionKernel, kind: KvDtype | None) -> None:
        self.of: dict[Strand, StrandPlace] = {}
        self._kernel, self._kind = kernel, kind
        self._block = KvBlock(0, kernel, kind)
        self._free: list[StrandPlace] = []

    def hold_alone(self, strand: Strand, room: int) -> None:
        """Give a strand a block of its own."""
        if self._free:
            self._move({})
        self.of[strand] = StrandPlace(KvBlock(room, self._kernel, self._kind), 0, room)

    def hold(self, rooms: Mapping[Strand, int]) -> None:
        """Give room to some strands, or more of it to some that have a place."""
        if not self._fill(rooms):
            self._move(rooms)

    def release(self, strand: Strand) -> None:
        """Take back the place of a strand."""
        place = self.of.pop(strand)
        if place.block is self._block:
            self._free.append(place)

    def close_gaps(self, strands: Iterable[Strand]) -> None:
        """Let some strands lie next to those of their size, in places that are free before them."""
        places: dict[int, list[Strand]] = {}
        for strand in strands:
            places.setdefault(self.of[strand].room, []).append(strand)
        for room, last in places.items():
            last.sort(key=lambda strand: self.of[strand].row)
            self._free.sort(key=lambda place: place.row)
            for number, free in enumerate(self._free):
                if free.room == room and last and self.of[last[-1]].row > free.row:
                    strand = last.pop()
                    self._free[number] = self._bring(strand, free)

    def _fill(self, rooms: Mapping[Strand, int]) -> bool:
        """Give rooms in places that are free and at most twice as large; return whether there are enough."""
        free = sorted(self._free, key=lambda place: (place.room, place.row))
        found: dict[Strand, StrandPlace] = {}
        for strand in _by_size(rooms):
            number = next((n for n, place in enumerate(free) if place.room >= rooms[strand]), None)
            if number is None or free[number].room > 2 * rooms[strand]:
                return False
            found[strand] = free.pop(number)
        self._free = free
        for strand, place in found.items():
            self._block.clear(place.row, place.room)
            if strand in self.of:
                self._free.append(self._bring(strand, place))
            self.of[strand] = place
        return True

    def _bring(self, strand: Strand, place: StrandPlace) -> StrandPlace:
        """Copy a strand to a place that is at least as large as its own; return that."""
        before = self.of[strand]
        self._block.copy(before.row, place.row, before.room)
        self.of[strand] = place
        return before

    def _move(self, rooms: Mapping[Strand, int]) -> None:
        """Lay out all strands of the block anew."""
        before = {strand: place for strand, place in self.of.items() if place.block is self._block}
        rooms = {strand: place.room for strand, place in before.items()} | dict(rooms)
        moves, row = [], 0
        for strand in _by_size(rooms):
            if strand in before:
                moves.append((before[strand].row, row, before[strand].room))
            self.of[strand] = StrandPlace(self._block, row, rooms[strand])
            row += rooms[strand]
        self._block.move(row, moves)
        self._free.clear()


def _by_size(rooms: Mapping[Strand, int]) -> list[Strand]:
    """Return strands by their rooms; of one size those that others leave come last, as they stay for these."""
    return sorted(rooms, key=lambda strand: (rooms[strand], bool(strand.children)))
