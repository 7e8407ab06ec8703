from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError, DataError
from longspan.core.seeds import rng
from longspan.data.tokenizer import Tokenizer
from longspan.eval.documents import HeldOutDocument, describe_documents
from longspan.eval.haystack import Haystack
from longspan.eval.needle import NeedleBuilder, NeedleTask, length_tolerance

Documents = list[HeldOutDocument]


@pytest.fixture(scope="module")
def builders(documents: Documents, tokenizer: Tokenizer) -> dict[int, NeedleBuilder]:
    """Builders without and with three distractors; they draw from the same documents."""
    return {
        count: NeedleBuilder(NeedleTask(lengths=(1024,), num_distractors=count, seed=3), documents, tokenizer)
        for count in (0, 3)
    }


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(256, 1024),
    depth=st.floats(0, 1),
    sample=st.integers(0, 5),
    num_distractors=st.sampled_from([0, 3]),
)
def test_length_and_depth_are_what_the_sample_says(
    builders: dict[int, NeedleBuilder],
    tokenizer: Tokenizer,
    length: int,
    depth: float,
    sample: int,
    num_distractors: int,
) -> None:
    """Prompts longer than stated, and depths that silently became 0, made published heat maps wrong."""
    built = builders[num_distractors].build(length, depth, sample)
    tokens = tokenizer.encode(f"{built.prompt} {built.expected}")
    assert built.achieved_length == len(tokens)
    assert length - length_tolerance(length) < len(tokens) <= length
    assert np.array_equal(tokens, np.concatenate([built.prompt_ids, built.answer_ids]))
    # Measured by hand: tokens of the text before the needle and of the text after it.
    needle = f"{built.question} {built.expected}."
    context = built.prompt.removesuffix(built.question)
    assert context.count(needle) == 1
    before, after = (len(tokenizer.encode(part)) for part in context.split(needle))
    assert built.achieved_depth == pytest.approx(before / (before + after), abs=4 / length)
    # Sentences are at most some 40 tokens long, so a border is at most half of that away.
    assert built.achieved_depth == pytest.approx(depth, abs=0.02 + (25 + 8 * num_distractors) / length)


def test_prompt_reads_as_documented(builders: dict[int, NeedleBuilder], tokenizer: Tokenizer) -> None:
    """The needle stands on its own line and the prompt ends with the question, without a trailing space."""
    built = builders[0].build(512, 0.5, 0)
    key = re.fullmatch(r"The magic number of ([a-z]+) is", built.question)
    assert key is not None
    lines = built.prompt.split("\n")
    assert lines[-1] == built.question
    assert lines.count(f"{built.question} {built.expected}.") == 1
    assert len(built.expected) == 5
    assert tokenizer.decode(built.answer_ids).strip() == built.expected
    assert f"\n{built.question} {built.expected}.\n" in built.needle_window
    # Nothing else in the text mentions the key or gives the value away.
    assert len(re.findall(key[1], built.prompt.lower())) == 2
    assert built.prompt.count(built.expected) == 1


@pytest.mark.parametrize(("depth", "line"), [(0.0, 0), (1.0, -2)])
def test_ends_of_the_haystack_are_reached(
    builders: dict[int, NeedleBuilder], depth: float, line: int
) -> None:
    """Depth 0 is the first line; depth 1 is the line before the question."""
    built = builders[0].build(512, depth, 0)
    assert built.prompt.split("\n")[line] == f"{built.question} {built.expected}."
    assert built.achieved_depth == depth


@pytest.mark.parametrize("sample", range(8))
def test_distractors_keep_their_side_in_a_short_context(
    builders: dict[int, NeedleBuilder], tokenizer: Tokenizer, sample: int
) -> None:
    """Three distractors outweigh a short haystack; planted at one border, they used to push the needle to an end."""
    built = builders[3].build(200, 0.5, sample)
    needle = f"{built.question} {built.expected}."
    before, after = built.prompt.removesuffix(built.question).split(needle)
    facts_before, facts_after = before.count("magic number"), after.count("magic number")
    assert facts_before + facts_after == 3
    # All three on one side weigh about as much as the haystack itself; only then may the middle be missed.
    tolerance = 0.15 if facts_before in (1, 2) else 0.35
    assert built.achieved_depth == pytest.approx(0.5, abs=tolerance)


def test_distractors_have_other_keys_values_and_places(builders: dict[int, NeedleBuilder]) -> None:
    """A distractor that repeats the needle's key or value would make the question ambiguous."""
    built = builders[3].build(1024, 0.5, 0)
    facts = re.findall(r"^The magic number of ([a-z]+) is (\d{5})\.$", built.prompt, flags=re.MULTILINE)
    assert len(facts) == 4
    assert len({key for key, _ in facts}) == len({value for _, value in facts}) == 4


def test_sample_is_a_pure_function_of_seed_and_cell(documents: Documents, tokenizer: Tokenizer) -> None:
    """The order in which samples are built, or which were built before a kill, must not change them."""
    task = NeedleTask(lengths=(256,), seed=1)
    first = NeedleBuilder(task, documents, tokenizer)
    second = NeedleBuilder(task, documents, tokenizer)
    second.build(256, 1.0, 7)
    assert first.build(256, 0.5, 0).prompt == second.build(256, 0.5, 0).prompt
    others = [first.build(256, 0.5, 1), first.build(256, 0.25, 0)]
    others.append(NeedleBuilder(NeedleTask(lengths=(256,), seed=2), documents, tokenizer).build(256, 0.5, 0))
    prompts = {first.build(256, 0.5, 0).prompt, *(sample.prompt for sample in others)}
    assert len(prompts) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lengths": [256], "depths": [0, 50, 100]}, "between 0"),
        ({"lengths": [256], "depths": [0.5, 0.5]}, "depths: a value stands twice"),
        ({"lengths": ["1k", 1024]}, "lengths: a value stands twice"),
        ({"lengths": []}, "at least one value"),
        ({"lengths": ["4kk"]}, "not a context length"),
        ({"lengths": [256], "sample": 3}, "did you mean 'samples'"),
        ({"lengths": [256], "num_distractors": 9, "answer_digits": 1}, "more than 1 digits"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    """Depths in percent, doubled cells and misspelt keys used to run and plot nonsense."""
    with pytest.raises(ConfigError, match=message):
        NeedleTask.from_dict(values)


def test_lengths_are_read_as_people_write_them() -> None:
    """`128k` is 131072 tokens everywhere."""
    assert NeedleTask.from_dict({"lengths": ["1k", "128k", 300]}).lengths == (1024, 131072, 300)


def test_too_short_a_length_is_refused(documents: Documents, tokenizer: Tokenizer) -> None:
    """A context of needle and question alone measures nothing."""
    with pytest.raises(ConfigError, match="no room for the planted facts"):
        NeedleBuilder(NeedleTask(lengths=(512, 30)), documents, tokenizer)


def test_too_short_a_haystack_is_refused(documents: Documents, tokenizer: Tokenizer) -> None:
    """Repeating the documents until the context is full would plant the same text many times."""
    with pytest.raises(DataError, match=r"haystack is too short\s+found: [\d,]+ tokens in 12"):
        NeedleBuilder(NeedleTask(lengths=(512, 10_000_000)), documents, tokenizer)


def test_documents_without_keys_are_refused(tokenizer: Tokenizer) -> None:
    """Text without lower-case words has nothing that can be a key."""
    with pytest.raises(DataError, match="too few words"):
        NeedleBuilder(NeedleTask(lengths=(256,)), [HeldOutDocument("a", "123 456\n" * 500)], tokenizer)


def test_documents_are_identified_by_all_they_hold(documents: Documents) -> None:
    """Two corpora must not share records; an id stands for one text."""
    changed = [documents[0]._replace(text=documents[0].text + "x"), *documents[1:]]
    assert describe_documents(documents) != describe_documents(changed)
    with pytest.raises(DataError, match="same id"):
        describe_documents([documents[0], documents[0]])
    with pytest.raises(DataError, match="none"):
        describe_documents([])


def test_window_holds_no_text_twice(documents: Documents, tokenizer: Tokenizer) -> None:
    """A window of all tokens there are holds every document once, wherever in the first one it began."""
    haystack = Haystack(documents, tokenizer)
    total = sum(len(tokenizer.encode(document.text)) for document in documents)
    for sample in range(5):
        window = haystack.window(rng(0, "window", sample), total - 20)
        lines = [line for line in window.text.split("\n") if line]
        assert len(set(lines)) == len(lines)
    with pytest.raises(DataError, match="too short"):
        haystack.window(rng(0, "window"), total + 20)


def test_window_is_cut_at_token_ends(documents: Documents, tokenizer: Tokenizer) -> None:
    """The text of n tokens has n tokens again: nothing is decoded, so nothing drifts."""
    haystack = Haystack(documents, tokenizer)
    window = haystack.window(rng(0, "cut"), 300)
    for num_tokens in (1, 10, 100):
        assert len(tokenizer.encode(window.head(num_tokens))) == pytest.approx(num_tokens, abs=1)
    assert window.head(0) == ""
    assert window.char_at(0.0, 100) == 0
    assert window.char_at(1.0, 100) == len(window.head(100))
