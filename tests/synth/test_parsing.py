"""Replies as models write them: whatever is meant comes out whole, whatever is not has a reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longspan.synth.parsing import parse_reply

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=40)
OBJECTS = st.lists(
    st.dictionaries(st.sampled_from(["question", "answer", "evidence"]), TEXT, min_size=1),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(OBJECTS)
@example([{"question": "'", "answer": '"'}])
@example([{"question": "a', 'b': 'c", "answer": 'x", "y": "z'}])
@example([{"question": "\\", "answer": "\U0001f600 \x85\u2028"}])
def test_what_is_written_well_or_in_python_comes_back(objects):
    assert parse_reply(json.dumps(objects)).objects == objects
    assert parse_reply(json.dumps(objects, ensure_ascii=False, indent=2)).objects == objects
    assert parse_reply(repr(objects)).objects == objects
    assert parse_reply(json.dumps({"questions": objects})).objects == objects


@settings(max_examples=150, deadline=None)
@given(OBJECTS, st.integers(0, 400))
def test_a_cut_reply_keeps_whole_objects_and_no_other(objects, cut):
    """Half an answer must not be trained on."""
    for text in (json.dumps(objects), repr(objects)):
        parsed = parse_reply(text[:cut])
        assert parsed.objects == objects[: len(parsed.objects)]
        assert parsed.objects or parsed.error


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("[]{}\"':,\\ \n#/*`abTruen0159.-u"), max_size=60) | st.text(max_size=60))
@example("[" * 5000)
@example('{"a":' * 3000)
@example("```")
@example('[{"a": 1' + "0" * 5000 + "}]")
@example('[{"a": "\\ud800"}]')
@example("[{'a': '\\U0011ffff'}]")
def test_nothing_makes_it_raise(text):
    parsed = parse_reply(text)
    assert bool(parsed.objects) == (parsed.error is None)
    assert all(isinstance(each, dict) for each in parsed.objects)


@pytest.mark.parametrize(
    ("text", "objects", "repair"),
    [
        ('```json\n[{"a": "b"}]\n```', [{"a": "b"}], "fence"),
        ('```\n[{"a": "b"}', [{"a": "b"}], "cut off"),
        ('Sure [as asked]: [{"a": "b"}] Good luck!', [{"a": "b"}], "text around"),
        ("[{'a': 'it's fine', 'b': True}]", [{"a": "it's fine", "b": True}], "quotes inside a string"),
        ('[{"a": "He said "no", and left"}]', [{"a": 'He said "no", and left'}], "quotes inside a string"),
        ('[{"a": "one\ntwo"},]', [{"a": "one\ntwo"}], "comma too many"),
        ('{"a": "b"}\n{"a": "c"}', [{"a": "b"}, {"a": "c"}], "no list around"),
        ('<think>[{"a": 0}]</think>[{"a": 1}]', [{"a": 1}], None),
        ('{"items": [{"a": 1}], "note": "x"}', [{"a": 1}], "list inside an object"),
        ('{"a": "b", "sections": [1, 2]}', [{"a": "b", "sections": [1, 2]}], None),
        ("[{a: 1, // first\n b: None}]", [{"a": 1, "b": None}], "name without quotes"),
        ('[{"a": "b"}, {"a": "c", "b": "unfin', [{"a": "b"}], "cut off"),
    ],
)
def test_usual_faults_are_mended_and_named(text, objects, repair):
    parsed = parse_reply(text)
    assert parsed.objects == objects
    assert (repair in parsed.repairs) if repair else parsed.repairs == ()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty reply"),
        ("I cannot do that.", "no JSON"),
        ("[1, 2, 3]", "no list of objects"),
        ("[]", "no list of objects"),
    ],
)
def test_what_holds_nothing_has_a_reason(text, error):
    assert parse_reply(text).error == error
