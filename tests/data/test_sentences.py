"""Where sentences begin and end, in any script and however lines are wrapped."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.texts.sentences import is_whole, place_between, sentence_around, sentence_borders

WRAPPED = """The lamp of the harbour stood on a tower that Dr. Ada Stone had built for the
town, and it burned with oil. In the winter of 1893 a storm broke it, e.g. the
glass and the door. Nobody mended it until the spring came and brought the
masons.

CHAPTER II. The Storm

- a rope that was long enough for two boats and had been paid for by all of
  the town
- a lamp

1. Tie the boats.
2. Wait.
"""


def cut(text: str) -> list[str]:
    return [text[start:end].strip() for start, end in pairwise(sentence_borders(text))]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ('He came. She left "at once." Then?  "No!" he said.', 4),
        ("See 3.14 in main.py of J. R. Stone, p. 7, fig. 2 and http://a.b/c?d=E.F at e.g. noon.", 1),
        (
            "\u4ed6\u6765\u4e86\u3002\u5979\u8bf4\uff1a\u201c\u597d\u3002\u201d\u771f\u7684\u5417\uff1f\u662f",
            4,
        ),
        ("\u732b\u304c\u3044\u308b\uff01\u72ac\u3082\u3044\u308b\uff61\u7d42", 3),
        ("\u092f\u0939 \u090f\u0915\u0964 \u0926\u0942\u0938\u0930\u093e\u0965 \u0924\u0940\u0928\u0964", 3),
        ("\u0647\u0644 \u0647\u0630\u0627\u061f \u0646\u0639\u0645. \u0644\u0627\u06d4", 3),
        ("\u1362\u12a0\u1362 \u12a0\u1362", 3),
        ("x = a.b(c); y != z; print(x.y, 3.5)", 1),
    ],
)
def test_sentences_of_any_script(text: str, sentences: int) -> None:
    """Full stops of other scripts, and those of them without a space behind, were none: depths fell together."""
    assert len(cut(text)) == sentences, cut(text)


def test_wrapped_lines_go_on_and_lines_of_their_own_do_not() -> None:
    """A sentence that ended at every line end made fragments of most quotes, and needles split it."""
    assert [each.replace("\n", " ") for each in cut(WRAPPED)] == [
        "The lamp of the harbour stood on a tower that Dr. Ada Stone had built for the town, and it burned with oil.",
        "In the winter of 1893 a storm broke it, e.g. the glass and the door.",
        "Nobody mended it until the spring came and brought the masons.",
        "CHAPTER II. The Storm",
        "- a rope that was long enough for two boats and had been paid for by all of   the town",
        "- a lamp",
        "1. Tie the boats.",
        "2. Wait.",
    ]
    start, end = sentence_around(WRAPPED, WRAPPED.index("winter"))
    assert WRAPPED[start:end].startswith("In the winter") and WRAPPED[start:end].endswith("the door.")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("It is so.", True),
        ("\u662f\u3002", True),
        ('"So!"', True),
        ("so it is.", False),
        ("The Storm", False),
        ("- It is.", False),
    ],
)
def test_what_can_be_quoted(text: str, whole: bool) -> None:
    """Headings, items of lists and ends of sentences are not sentences."""
    assert is_whole(text) is whole


@settings(max_examples=80, deadline=None)
@given(text=st.text("ab. \n\u3002!\u0301A-", max_size=120), share=st.floats(0, 1))
def test_any_text_has_a_place_where_it_is_asked_for(text: str, share: float) -> None:
    """Where there is no border the place itself is taken, never one outside of the bounds."""
    at = round(share * len(text))
    low, high = max(0, at - 5), min(len(text), at + 5)
    assert low <= place_between(text, at, low=low, high=high) <= max(high, at + text.count("\u0301"))
    borders = sentence_borders(text)
    assert borders == sorted(set(borders)) and borders[0] == 0 and borders[-1] == len(text)


def test_text_without_sentences_is_parted_at_a_line_a_space_or_a_character() -> None:
    """Code in one line and text without marks had their borders at their ends alone."""
    words = "word " * 400
    assert place_between(words, 1001, low=900, high=1100) == 1000
    assert place_between("x" * 2000, 1001, low=900, high=1100) == 1001
    assert place_between("e\u0301" * 900, 1001, low=900, high=1100) == 1002
