"""What token sequences share at their start, as a tree in which every token stands once.

The tree is cut into strands. A strand is a path that goes on where its parent strand has a certain length:

    a b c d e f        strand 0: a b c d e f    from position 0
    a b c x y          strand 1: x y            from position 3, the parent's first three tokens before it
    a b c d z          strand 2: z              from position 4

Where a path forks, the strand goes on into the branch with the most sequences, so a path to the root crosses at most
log2(sequences) strands (Sleator and Tarjan's heavy paths): the haystack of a needle grid is one strand, and each cell
is one strand that leaves it at its needle. Building costs one comparison of each sequence with its neighbour in
sorted order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError


@dataclass(eq=False, slots=True)
class Strand:
    """A path of the tree that is read from front to end."""

    parent: Strand | None
    start: int
    """Position of its first token: so many tokens of its ancestors stand before it."""
    ids: NDArray[np.int64]
    children: list[Strand] = field(default_factory=list)
    """Strands that leave this one, by the position where they do."""

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.start + len(self.ids)

    def ancestors(self) -> Iterator[tuple[Strand, int]]:
        """Yield (strand, how many of its tokens stand before this one), the parent first."""
        child = self
        while child.parent is not None:
            yield child.parent, child.start - child.parent.start
            child = child.parent

    def holder(self, position: int) -> Strand:
        """Return the strand that holds a position of the path to this one."""
        strand = self
        while position < strand.start:
            assert strand.parent is not None
            strand = strand.parent
        return strand


class PrefixTree(NamedTuple):
    """The strands of a set of sequences."""

    roots: list[Strand]
    ends: list[Strand]
    """Of each sequence: the strand that holds its last token."""

    def strands(self) -> Iterator[Strand]:
        """Yield all strands, each behind its parent."""
        waiting = self.roots[::-1]
        while waiting:
            strand = waiting.pop()
            yield strand
            waiting.extend(reversed(strand.children))


def build_tree(sequences: Sequence[NDArray[np.integer]]) -> PrefixTree:
    """Return the tree of sequences of token ids, none of them empty.

    Raises:
        ArgumentError: an empty sequence.
    """
    if any(len(ids) == 0 for ids in sequences):
        raise ArgumentError("an empty sequence has no place in a prefix tree")
    ids = [np.asarray(each, dtype=np.int64) for each in sequences]
    root = _trie(ids)
    _weigh(root)
    ends: list[Strand | None] = [None] * len(ids)
    roots: list[Strand] = []
    waiting: list[tuple[Strand | None, _Node, _Node]] = [(None, root, child) for child in root.children[::-1]]
    while waiting:
        parent, above, node = waiting.pop()
        path = [node]
        while path[-1].children:
            path.append(max(path[-1].children, key=lambda child: (child.leaves, child.depth)))
        strand = Strand(parent, above.depth, ids[path[-1].sequence][above.depth : path[-1].depth])
        (roots if parent is None else parent.children).append(strand)
        for step, following in zip(path, [*path[1:], None]):
            for sequence in step.ends:
                ends[sequence] = strand
            waiting.extend((strand, step, child) for child in step.children if child is not following)
    for strand in (tree := PrefixTree(roots, [end for end in ends if end is not None])).strands():
        strand.children.sort(key=lambda child: child.start)
    return tree


@dataclass(eq=False, slots=True)
class _Node:
    """A fork or an end: the first `depth` tokens of `sequence`."""

    depth: int
    sequence: int
    children: list[_Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    leaves: int = 0


def _trie(sequences: Sequence[NDArray[np.int64]]) -> _Node:
    """Return the root; in sorted order a sequence shares most with its neighbour, so one pass with a stack does."""
    # Bytes of big-endian numbers are ordered as the numbers are, and compared by memcmp.
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].astype(">u4").tobytes())
    root = _Node(0, order[0] if order else 0)
    path = [root]
    before: NDArray[np.int64] | None = None
    for index in order:
        ids = sequences[index]
        shared = 0 if before is None else _shared(before, ids)
        while path[-1].depth > shared:
            last = path.pop()
            if path[-1].depth < shared:
                fork = _Node(shared, last.sequence, [last])
                path[-1].children[-1] = fork
                path.append(fork)
        if len(ids) > shared:
            leaf = _Node(len(ids), index)
            path[-1].children.append(leaf)
            path.append(leaf)
        path[-1].ends.append(index)
        before = ids
    return root


def _shared(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    length = min(len(a), len(b))
    differing = a[:length] != b[:length]
    first = int(differing.argmax()) if length else 0
    return first if length and differing[first] else length


def _weigh(root: _Node) -> None:
    order = [root]
    for node in order:
        order.extend(node.children)
    for node in reversed(order):
        node.leaves = max(1, len(node.ends)) if not node.children else sum(c.leaves for c in node.children)
