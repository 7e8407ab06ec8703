from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError
from longspan.infer.prefix_tree import PrefixTree, Strand, build_tree


def tree_of(*texts: str) -> PrefixTree:
    return build_tree([np.array([ord(letter) for letter in text]) for text in texts])


def text_of(strand: Strand) -> str:
    return "".join(chr(token) for token in strand.ids)


def test_example_of_the_docstring() -> None:
    """Strands begin where they leave their parent, not at the fork before."""
    tree = tree_of("abcdef", "abcxy", "abcdz")
    assert [(text_of(s), s.start) for s in tree.strands()] == [("abcdef", 0), ("xy", 3), ("z", 4)]
    assert [text_of(end) for end in tree.ends] == ["abcdef", "xy", "z"]
    assert [(text_of(s), seen) for s, seen in tree.ends[2].ancestors()] == [("abcdef", 4)]


def test_a_ladder_is_one_trunk_with_branches() -> None:
    """In chains of strands every cell would attend to as many pieces as there are cells before it."""
    haystack = "abcdefghijklmnop"
    cells = [haystack[:cut] + "#" + haystack[cut:length] for length in (8, 12, 16) for cut in (2, 5, 7)]
    tree = tree_of(*cells)
    assert len(tree.roots) == 1
    assert max(len(list(end.ancestors())) for end in tree.ends) <= 2
    own = [cell.replace("#", str(number)) for number, cell in enumerate(cells)]
    assert [len(list(end.ancestors())) for end in tree_of(*own).ends].count(1) == len(own) - 1


def test_prompts_within_and_equal_to_each_other() -> None:
    """What ends inside a strand has no strand of its own."""
    tree = tree_of("ab", "abcd", "abcd", "a", "x")
    assert [(text_of(s), s.start) for s in tree.strands()] == [("abcd", 0), ("x", 0)]
    assert [text_of(end) for end in tree.ends] == ["abcd"] * 4 + ["x"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=12))
@example(["aa", "aa", "aba", "abb"])  # equal sequences weigh as many
def test_strands_spell_every_sequence_with_each_prefix_once(texts: list[str]) -> None:
    """Paths through the tree are the sequences; tokens in all are the distinct prefixes; paths cross few strands."""
    tree = tree_of(*texts)
    for text, end in zip(texts, tree.ends):
        spelled = text_of(end)[: len(text) - end.start]
        for strand, seen in end.ancestors():
            spelled = text_of(strand)[:seen] + spelled
        assert spelled == text
        assert [end.holder(n).ids[n - end.holder(n).start] for n in range(len(text))] == [*map(ord, text)]
        assert len(list(end.ancestors())) <= math.log2(len(texts))
    prefixes = {text[:n] for text in texts for n in range(1, len(text) + 1)}
    strands = list(tree.strands())
    assert sum(len(strand.ids) for strand in strands) == len(prefixes)
    assert all(strand.parent is None or strand.parent in strands[:n] for n, strand in enumerate(strands))


def test_ids_beyond_a_byte_are_ordered_as_numbers() -> None:
    """Compared as little-endian bytes, 256 would stand before 1 and its neighbour would be another's."""
    tree = build_tree([np.array(ids) for ids in ([1, 256, 1], [1, 256, 2], [256, 1], [1, 1])])
    assert sum(len(strand.ids) for strand in tree.strands()) == 4 + 2 + 1


def test_empty_sequence_is_refused() -> None:
    """It has no last token to predict from."""
    with pytest.raises(ArgumentError, match="empty sequence"):
        build_tree([np.array([1]), np.array([], dtype=np.int64)])
    assert build_tree([]) == PrefixTree([], [])
