"""The parts of a set: prompts, sections, language, filters, claims, questions made without a model."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError, DataError
from longspan.synth import UsedDocuments, load_set, shipped_sets
from longspan.synth.config import SetConfig
from longspan.synth.filters import NearDuplicates, content_words, find_quote, find_support, knows, recall
from longspan.synth.headings import heading_pairs
from longspan.synth.language import PROFILES, detect_language
from longspan.synth.offline import make_questions
from longspan.synth.sections import Span, TokenRuler, cut_sections, spread_groups
from longspan.synth.selection import content_hash
from longspan.synth.templates import PromptTemplate
from tests.synth.writer import document


def test_shipped_sets_are_those_that_were_published():
    """Documents and limits in tokens of arXiv:2404.19553, and four questions for each 4,096 tokens."""
    found = {spec.name: (spec.documents, spec.min_tokens, spec.max_tokens) for spec in shipped_sets()}
    offline = [found.pop(name) for name in ("offline", "offline_sentences", "offline_chains")]
    assert offline == 3 * [(None, 256, None)]
    books, papers = (64_000, 80_000), (32_000, 80_000)
    assert found == {
        "one_detail_book": (2000, *books),
        "bio_book": (150, *books),
        "multi_detail_book": (150, *books),
        "one_detail_paper": (1000, *papers),
        "multi_detail_paper": (100, *papers),
        "paper_questions": (100, *papers),
    }
    assert (load_set("one_detail_book").section_tokens, load_set("one_detail_book").questions) == (4096, 4)
    for spec in shipped_sets():
        if spec.prompt:
            assert "JSON" in spec.template().text


def test_a_text_cannot_reach_into_its_prompt():
    """A book with $, {} or the very name of a field must be sent as it is."""
    template = PromptTemplate(name="p", version=1, fields=("text", "about"), text="{{about}}: {{text}}")
    text = "{{about}} costs $5 {text} ${about} %s \\1 {% raw %}"
    assert template.render(about="A", text=text) == f"A: {text}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "one_detial_v1"}, "one_detail_v1"),
        ({"prompt": "biography_v1", "kind": "multi_detail"}, "sections_per_request"),
        ({"max_tokens": 1}, "no document can be that long"),
        ({"fixed_questions": ["Why?"]}, "fixed_questions"),
        ({"kind": "one_detial"}, "kind"),
        ({"prompt": None}, "needs a prompt"),
        ({"language": "english"}, "no such language"),
    ],
)
def test_a_set_with_a_mistake_says_which(change, message):
    with pytest.raises(ConfigError, match=message):
        SetConfig.from_dict({**load_set("one_detail_book").to_dict(), **change}).template()


def test_a_prompt_that_does_not_fit_its_set(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("{name: mine, version: 1, fields: [about], text: 'On {{about}}'}")
    spec = load_set("one_detail_book").model_copy(update={"prompt": str(path)})
    with pytest.raises(ConfigError, match="does not fit a set of kind one_detail"):
        spec.template()
    path.write_text("{name: mine, version: 1, fields: [about, text], text: 'On {{about}}'}")
    with pytest.raises(ConfigError, match="does not use the fields"):
        spec.template()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a lamp ", "to Harrow. ", "\n\n", "\n", "x" * 30, "\u00e9\u4e2d", " "]), max_size=60
    ),
    st.integers(1, 40),
)
def test_sections_join_to_exactly_the_text(student, pieces, capacity):
    """The published splitter may lose white space between chunks; evidence offsets would be off."""
    text = "".join(pieces)
    spans = cut_sections(text, capacity, student.tokenizer)
    assert "".join(span.of(text) for span in spans) == text
    for span in spans:
        assert span.end > span.start
        assert len(student.tokenizer.encode(span.of(text))) <= capacity or span.end == span.start + 1


def test_sections_are_full_and_end_where_a_reader_would(student):
    text = document(3, 120)
    spans = cut_sections(text, 200, student.tokenizer)
    sizes = [len(student.tokenizer.encode(span.of(text))) for span in spans]
    assert all(140 < size <= 200 for size in sizes[:-1])
    assert all(re.search(r"[.\n]\s*$", span.of(text)) for span in spans)


def test_a_ruler_measures_as_the_tokenizer(student):
    text = document(2, 200)
    ruler = TokenRuler(text, student.tokenizer)
    for at in (0, 17, 3000, 9999, len(text)):
        exact = len(student.tokenizer.encode(text[:at]))
        assert abs(float(ruler.before([at])[0]) - exact) <= 12
    for tokens in (0, 5, 700, 2001):
        end = ruler.last_before(tokens)
        assert 0.75 * tokens - 12 <= len(student.tokenizer.encode(text[:end])) <= tokens + 12
    assert ruler.last_before(10**9) == len(text)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 60), st.integers(1, 8), st.integers(1, 5))
def test_groups_of_sections_are_spread_and_differ(count, size, groups):
    found = spread_groups(count, size, groups)
    assert len(set(found)) == len(found) <= groups
    for group in found:
        assert len(group) == min(size, count) and list(group) == sorted(set(group))
        assert all(0 <= each < count for each in group)
    if count >= 2 * size and size > 1 and groups > 1:
        assert len(found) > 1


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "It was the best of times, and he said that she had been there with them before."),
        ("de", "Es war die beste Zeit, und er sagte nicht, dass sie mit ihm in der Stadt gewesen ist."),
        ("fr", "Elle est dans la maison avec les enfants, et il ne sait pas ce que nous avons sur la table."),
        ("es", "El hombre que estaba en la casa no se fue con los otros, pero su hija lo hizo por ella."),
        (None, "def f(x):\n    return [y * 2 for y in range(x)]\n" * 5),
        (None, ""),
        (None, "\u6211\u5011\u53bb\u5317\u4eac\u3002" * 20),
    ],
)
def test_language(language, text):
    assert detect_language(text * 3) == language


def test_every_language_knows_its_own_words():
    for language, words in PROFILES.items():
        assert detect_language(" ".join(sorted(words))) == language


def test_answers_are_looked_for_in_their_evidence():
    evidence = "On day 3 Ada Stone, the miller, carried a copper\nlamp to Harrow. Nothing else was said."
    assert recall("A copper lamp.", evidence) == 1
    assert recall("She carried a silver lamp to Norwold", evidence) == pytest.approx(2 / 4)
    assert recall("Yes.", evidence) == 0
    assert find_quote("carried a copper lamp to  HARROW", evidence, Span(0, len(evidence))) == Span(32, 63)
    assert find_quote("carried a silver lamp", evidence, Span(0, len(evidence))) is None
    assert find_quote("...", evidence, Span(0, len(evidence))) is None
    assert (
        find_support(["nothing", "said"], evidence, Span(0, len(evidence))).of(evidence).startswith("Nothing")
    )
    assert find_support(["zzz"], evidence, Span(5, 20)) == Span(5, 20)


@pytest.mark.parametrize(
    ("reply", "expected", "known"),
    [
        ("It was a copper lamp, I believe.", "A copper lamp.", True),
        ("unknown", "A copper lamp.", False),
        ("I don't know.", "I don't know.", False),
        ("A silver lamp.", "A copper lamp.", False),
        (
            "He left because the bridge was closed by snow",
            "The bridge had been closed by heavy snow, so he left.",
            True,
        ),
        (
            "He left because he was tired of waiting",
            "The bridge had been closed by heavy snow, so he left.",
            False,
        ),
    ],
)
def test_what_a_model_knows_without_the_text(reply, expected, known):
    assert knows(reply, expected) is known


def test_near_duplicates_by_their_words():
    seen = NearDuplicates()
    texts = [
        ("What did Ada Stone carry to Harrow on day 17?", True),
        ("On day 17, what did Ada Stone carry to Harrow?", False),
        ("What did Ada Stone carry to Harrow on day 18?", True),
        ("Who is she?", True),
        ("Who IS she...", False),
    ]
    assert [seen.add(content_words(text)) for text, _ in texts] == [new for _, new in texts]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8), max_size=12))
def test_near_duplicates_are_those_of_all_pairs(questions):
    """Prefix filtering must not lose a pair."""
    seen = NearDuplicates(0.8)
    kept: list[set[str]] = []
    for words in questions:
        own = set(words)
        is_new = all(len(own & other) < 0.8 * len(own | other) for other in kept)
        assert seen.add(words) is is_new
        if is_new:
            kept.append(own)


def test_claims_are_shared_and_follow_their_owner(tmp_path):
    one, two = (UsedDocuments(tmp_path / "used.sqlite") for _ in range(2))
    assert one.owners() == {} and not (tmp_path / "used.sqlite").exists()
    assert one.claim(["a", "b"], "books") == {"a", "b"}
    assert two.claim(["b", "c"], "papers") == {"c"}
    assert one.claim(["b", "d"], "books") == {"b", "d"}, "what is not wanted any more is free again"
    assert two.claim(["a", "c"], "papers") == {"a", "c"}
    assert two.owners() == {"a": "papers", "b": "books", "c": "papers", "d": "books"}
    (tmp_path / "other").write_text("not a database, and long enough to be seen as none" * 10)
    with pytest.raises(DataError, match="not a file of used documents"):
        UsedDocuments(tmp_path / "other").owners()
    assert content_hash("a b\n c") == content_hash(" a  b c")


BOOK = """# The Mill

Ada Stone lived at the mill, and the mill was old. Nobody came there.

## The River

Every spring Ada Stone went down to the river with a lamp. It was cold. Ada Stone did not mind the cold at all.

## The Return

Then she came back, and there was nothing left of the house but the stones and the door.
"""


def test_questions_without_a_model_have_their_answer_where_they_say():
    text = BOOK + document(5, 40)
    made = make_questions(2, {"text": text, "id": "x"}, 12, seed=1)
    assert set(made.kinds) == {"planted facts", "section titles", "repeated names"}
    assert len(made.items) == 12
    for item in made.items:
        (span,) = item.evidence
        assert item.answer in span.of(made.text)
    asked = {item.question: item.answer for item in made.items}
    titles = {question: reply for question, reply in asked.items() if question.startswith("Which heading")}
    following = {"The Mill": "The River", "The River": "The Return"}
    assert titles and all(reply == following[question.split('"')[1]] for question, reply in titles.items())
    parts = sorted(item.evidence[0].middle * 12 // len(made.text) for item in made.items)
    assert len(set(parts)) >= 10, "one in each part, but for what planting has moved"
    assert len({item.answer for item in made.items if item.answer.isdigit()}) == made.kinds["planted facts"]
    # What was planted are lines of their own: without them the text is what it was.
    kept = [line for line in made.text.split("\n") if not line.startswith("The magic number of ")]
    assert " ".join("\n".join(kept).split()) == " ".join(text.split())


WRAPPED = """1. The Harbour

The harbour lies open to the west, and for as long as anyone remembers old
Martha Quill has kept its lamp. Boats that are late look for the light of
Martha
Quill and for nothing else.

1.1. The Lamp

Oil is brought up every evening in a can of tin, which holds enough for one
night. In the year of the flood Martha Quill carried it through water up to
her knees.

1.2.1. A Door

Their door might be open. Wherever it leads, nobody has seen behind it since
Martha Quill had it painted; the key is kept by the sisters of the mill.

2. The Mill

First:

1. Grind.

2. Wait.
"""


def test_wrapped_text_is_asked_about_in_whole_sentences():
    """Sentences ended at line ends, headings left out a level, and keys were "their" and "might"."""
    made = make_questions(0, {"text": WRAPPED, "id": "w"}, 12, seed=4)
    asked = {item.question: " ".join(item.answer.split()) for item in made.items}
    quote = "Quote the sentence in which Martha Quill is named for the {} time."
    assert asked[quote.format("first")] == (
        "The harbour lies open to the west, and for as long as anyone remembers old Martha Quill has kept its lamp."
    )
    assert asked[quote.format("last")].startswith("Wherever it leads") and asked[
        quote.format("last")
    ].endswith("mill.")
    assert {question: reply for question, reply in asked.items() if "heading" in question} == {
        'Which heading comes right after "1. The Harbour"?': "1.1. The Lamp",
        'Which heading comes right after "1.2.1. A Door"?': "2. The Mill",
    }
    for item in made.items:
        (span,) = item.evidence
        assert item.answer in span.of(made.text)


def test_keys_are_words_that_mean_something():
    words = "their might which would lantern harbour timber window because therefore candle "
    made = make_questions(0, {"text": words * 3, "id": "k"}, 12, seed=1)
    keys = {item.question.split()[-1].rstrip("?") for item in made.items}
    assert keys and keys <= {"lantern", "harbour", "timber", "window", "candle"}


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("# A\n\ntext\n\n### B\n\n## C\n", [("A", "B"), ("B", "C")]),
        ("# A\n\n```\n# comment\n```\n\n# B\n", [("A", "B")]),
        ("x = 1\n# set y\ny = 2\n# set z\nz = 3\n", []),
        ("Scope\n=====\n\ntext\n\nAim\n---\ntext", [("Scope", "Aim")]),
        ("CHAPTER I\n\nIt was.\n\nCHAPTER II\n\nIt is.\n\nCHAPTER IV\n", [("CHAPTER I", "CHAPTER II")]),
        ("CHAPTER I\n\nThe Cave\n\nIt was.\n\nCHAPTER II\n", []),
        ("1 One\n2 Two\n3 Three\n", []),
        ("\\section{A}\ntext\n\\subsection{B}\n", [("A", "B")]),
    ],
)
def test_headings_follow_one_another_only_where_none_is_left_out(text, pairs):
    assert [(title, following.title) for title, following in heading_pairs(text)] == pairs


def test_a_text_without_words_or_headings_makes_no_question():
    assert make_questions(0, {"text": "1 2 3 \n" * 50, "id": "x"}, 6, seed=0).items == []


def test_facts_are_planted_at_all_depths():
    found: list[float] = []
    for number in range(60):
        made = make_questions(number, {"text": document(number, 60), "id": str(number)}, 2, seed=3)
        found += [
            item.evidence[0].start / len(made.text) for item in made.items if "magic number" in item.question
        ]
    shares = np.histogram(found, bins=5, range=(0, 1))[0] / len(found)
    assert len(found) == 120 and abs(shares - 0.2).max() < 0.06
