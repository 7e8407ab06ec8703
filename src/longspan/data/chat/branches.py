"""Samples that begin alike, as one tree: what they have in common once, and branches behind it.

A template that drops old thoughts writes answer k as a model wrote it, thoughts and all, only where nothing follows.
So each answer is a sample of its own (`true_prefixes`): the text up to it, as the model was asked, and the answer.
Or a record asks one long text many questions, each on its own (`continued`). As a tree a trace of n answers costs its
length and its thoughts, and a text with n questions the text and the questions; not n times the length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.data.chat.encoder import Encoded

_MOST_WEIGHT = 255
"""Of a token in a store."""
SHARED = "tokens that branches share with what they branch off"


def as_branches(name: str) -> str:
    """Return the note that counts branches, of what they are."""
    return f"{name}, as branches of one document"


class TokenTree(NamedTuple):
    """Samples as one run of tokens in parts."""

    ids: NDArray[np.uint32]
    """[tokens]; a branch begins with a copy of the last token that it shares."""
    mask: NDArray[np.uint8]
    """[tokens]; a sample's first token, and such a copy, is no label. What more than 255 samples learn weighs 255."""
    parts: NDArray[np.uint32]
    """[parts, 3]: first token, the part that it branches off (its own number: none), position of its first token."""
    num_heavier: int
    """Tokens that more than 255 samples learn."""


class _Branch:
    def __init__(
        self, ids: NDArray[np.uint32], mask: NDArray[np.integer], parent: int, position: int
    ) -> None:
        self.ids, self.parent, self.position = ids, parent, position
        self.mask = mask.astype(np.uint32)
        self.children: list[int] = []

    def copy(self) -> _Branch:
        made = _Branch(self.ids, self.mask, self.parent, self.position)
        made.children = list(self.children)
        return made


class GrowingTree:
    """A tree to which samples are added; the first is its trunk: let it be the longest.

    What several samples learn weighs so many times.
    """

    def __init__(self) -> None:
        self._parts: list[_Branch] = []
        self._roots: list[int] = []
        self.size = 0
        """Tokens."""

    def copy(self) -> GrowingTree:
        """Return a tree that grows by itself."""
        made = GrowingTree()
        made._parts = [part.copy() for part in self._parts]
        made._roots, made.size = list(self._roots), self.size
        return made

    def add(self, ids: NDArray[np.uint32], mask: NDArray[np.uint8]) -> None:
        """Add a sample; one without a token changes nothing."""
        if not len(ids):
            return
        parts = self._parts
        place = next((root for root in self._roots if parts[root].ids[0] == ids[0]), None)
        if place is None:
            self._roots.append(len(parts))
            self._append(ids, mask, len(parts), 0)
            return
        while True:
            part = parts[place]
            rest = ids[part.position :]
            size = min(len(rest), len(part.ids))
            other = np.flatnonzero(rest[:size] != part.ids[:size])
            shared = int(other[0]) if len(other) else size
            part.mask[1:shared] += mask[part.position + 1 : part.position + shared]
            end = part.position + shared
            if end == len(ids):
                return
            following = (each for each in part.children if parts[each].position == end - 1)
            child = next((each for each in following if parts[each].ids[1] == ids[end]), None)
            if child is None:
                own = mask[end - 1 :].copy()
                own[0] = 0
                part.children.append(len(parts))
                self._append(ids[end - 1 :], own, place, end - 1)
                return
            place = child

    def _append(self, ids: NDArray[np.uint32], mask: NDArray[np.uint8], parent: int, position: int) -> None:
        self._parts.append(_Branch(ids, mask, parent, position))
        self.size += len(ids)

    def tree(self) -> TokenTree:
        """Return what has grown."""
        starts = np.cumsum([0, *(len(part.ids) for part in self._parts)])[:-1]
        table = [(start, part.parent, part.position) for start, part in zip(starts.tolist(), self._parts)]
        mask = np.concatenate([part.mask for part in self._parts])
        return TokenTree(
            np.concatenate([part.ids for part in self._parts]),
            np.minimum(mask, _MOST_WEIGHT).astype(np.uint8),
            np.array(table, np.uint32).reshape(-1, 3),
            int(np.count_nonzero(mask > _MOST_WEIGHT)),
        )


def token_tree(samples: Iterable[tuple[NDArray[np.uint32], NDArray[np.uint8]]]) -> TokenTree:
    """Return the tree of samples (ids, mask)."""
    growing = GrowingTree()
    for ids, mask in samples:
        growing.add(ids, mask)
    return growing.tree()


def one_document(samples: Sequence[Encoded], name: str) -> Encoded:
    """Return samples as one document, a single one as it is; notes are added up.

    Args:
        name: what the branches are, for the note that counts them.
    """
    notes = sum((each.notes for each in samples), Counter[str]())
    written = [each for each in samples if len(each.ids)] or samples[:1]
    if len(written) < len(samples):
        notes["conversations of which the chat template writes nothing"] += len(samples) - len(written)
    if len(written) == 1:
        return written[0]._replace(notes=notes)
    tree = token_tree((each.ids, each.mask) for each in written)
    notes[as_branches(name)] += len(written) - 1
    shared = sum(len(each.ids) for each in written) - len(tree.ids)
    notes[SHARED] += shared
    if tree.num_heavier:
        notes[f"tokens that more than {_MOST_WEIGHT} branches learn, which weigh {_MOST_WEIGHT}"] += (
            tree.num_heavier
        )
    return Encoded(tree.ids, tree.mask, notes, tree.parts)
