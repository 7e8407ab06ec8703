"""Needles: length, depth and text are what the sample says, and what is shared is shared."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.seeds import rng
from longspan.data.tokenizer import Tokenizer, load_tokenizer
from longspan.eval.haystack import Haystack
from longspan.eval.held_out import HeldOutDocument, default_documents, describe_documents
from longspan.eval.needle import NeedleTask, length_tolerance
from longspan.eval.needle_config import NeedleConfig, fill
from longspan.eval.needle_multikey import MultiKeyTask
from longspan.eval.needle_originals import OriginalHaystack, Parts
from longspan.eval.needle_presets import PRESETS, preset_named
from longspan.eval.planting import Planted, check_depth, reach
from longspan.eval.prompts import PromptForm
from longspan.eval.runner import run_task
from longspan.eval.scorers import scorer_named
from longspan.eval.task import Built, Planned
from tests.cli import theirs
from tests.eval.answerers import Knowing
from tests.eval.tokenizer_styles import STYLES, build_tokenizer

Documents = list[HeldOutDocument]
Make = Callable[..., NeedleTask]


@pytest.fixture(scope="module")
def make(documents: Documents, tokenizer: Tokenizer) -> Make:
    """Return a function that makes a task of some settings over the small documents."""

    def task(**values: Any) -> NeedleTask:
        settings_ = NeedleConfig.from_dict({"lengths": [1024], "seed": 3, **values})
        return NeedleTask(settings_, documents, PromptForm(tokenizer))

    return task


@pytest.fixture(scope="module")
def tasks(make: Make) -> dict[int, NeedleTask]:
    """Tasks without and with three distractors; they draw from the same documents."""
    return {count: make(num_distractors=count) for count in (0, 3)}


def build(task: NeedleTask | MultiKeyTask, length: int, depth: float, sample: int) -> Built:
    return task.build(Planned((length, depth, sample), length))


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(256, 1024),
    depth=st.floats(0, 1),
    sample=st.integers(0, 5),
    num_distractors=st.sampled_from([0, 3]),
)
def test_length_and_depth_are_what_the_sample_says(
    tasks: dict[int, NeedleTask],
    tokenizer: Tokenizer,
    length: int,
    depth: float,
    sample: int,
    num_distractors: int,
) -> None:
    """Prompts longer than stated, and depths that silently became 0, made published heat maps wrong."""
    built = build(tasks[num_distractors], length, depth, sample)
    request, fields = built.request, built.fields
    tokens = tokenizer.encode(f"{request.prompt} {built.expected}")
    assert fields["achieved_length"] == len(tokens)
    assert length - length_tolerance(length) < len(tokens) <= length
    assert request.prompt_ids is not None and request.answer_ids is not None
    assert np.array_equal(tokens, np.concatenate([request.prompt_ids, request.answer_ids]))
    # Measured by hand: tokens of the text before the needle and of the text after it.
    needle = f"{fields['question']} {built.expected}."
    context = request.prompt.removesuffix(fields["question"])
    assert context.count(needle) == 1
    before, after = (len(tokenizer.encode(part)) for part in context.split(needle))
    assert fields["achieved_depth"] == pytest.approx(before / (before + after), abs=4 / length)
    # Sentences are at most some 40 tokens long, so a border is at most half of that away.
    assert fields["achieved_depth"] == pytest.approx(depth, abs=0.02 + (25 + 8 * num_distractors) / length)


def test_prompt_reads_as_documented(tasks: dict[int, NeedleTask], tokenizer: Tokenizer) -> None:
    """The needle stands on its own line and the prompt ends with the question, without a trailing space."""
    built = build(tasks[0], 512, 0.5, 0)
    question = built.fields["question"]
    key = re.fullmatch(r"The magic number of ([a-z]+) is", question)
    assert key is not None
    lines = built.request.prompt.split("\n")
    assert lines[-1] == question
    assert lines.count(f"{question} {built.expected}.") == 1
    assert len(built.expected) == 5
    assert built.request.answer_ids is not None
    assert tokenizer.decode(built.request.answer_ids).strip() == built.expected
    assert f"\n{question} {built.expected}.\n" in built.fields["needle_window"]
    # Nothing else in the text mentions the key or gives the value away.
    assert len(re.findall(key[1], built.request.prompt.lower())) == 2
    assert built.request.prompt.count(str(built.expected)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "".join(chr(0x4E00 + (place * 37) % 900) + "\u3002" * (place % 17 == 16) for place in range(6000)),
        "".join(f"f{place}(x[{place}]);" for place in range(2000)),
        "".join(chr(0x4E00 + (place * 37) % 900) for place in range(6000)),
    ],
    ids=["full stops of Chinese", "code in one line", "no border at all"],
)
def test_depths_do_not_fall_together(tokenizer: Tokenizer, text: str) -> None:
    """Without ". " and new lines every needle stood at the start or the end, and was scored as if it did not."""
    settings_ = NeedleConfig(lengths=(600,), samples=1, keys=("iron",))
    task = NeedleTask(settings_, [HeldOutDocument("x", text)], PromptForm(tokenizer))
    for depth in settings_.depths:
        assert build(task, 600, depth, 0).fields["achieved_depth"] == pytest.approx(depth, abs=0.07)


def test_needle_far_from_its_depth_is_not_scored() -> None:
    """The tolerance grew with the distance of the border that was taken, so that it could not fail."""
    planted = Planted("", [(0, 0)], [0.5], 0.1)
    check_depth(0.45, planted, 0)
    with pytest.raises(DataError, match=r"depth 0.750 instead of 0.500[\s\S]*0.100 off"):
        check_depth(0.75, planted, 0)
    assert [reach(tokens) for tokens in (80, 512, 1000, 100_000)] == [10, 64, 64, 2000]


@pytest.mark.parametrize(("depth", "line"), [(0.0, 0), (1.0, -2)])
def test_ends_of_the_haystack_are_reached(tasks: dict[int, NeedleTask], depth: float, line: int) -> None:
    """Depth 0 is the first line; depth 1 is the line before the question."""
    built = build(tasks[0], 512, depth, 0)
    assert built.request.prompt.split("\n")[line] == f"{built.fields['question']} {built.expected}."
    assert built.fields["achieved_depth"] == depth


@pytest.mark.parametrize("sample", range(8))
def test_distractors_keep_their_side_in_a_short_context(tasks: dict[int, NeedleTask], sample: int) -> None:
    """Three distractors outweigh a short haystack; planted at one border, they used to push the needle to an end."""
    built = build(tasks[3], 200, 0.5, sample)
    needle = f"{built.fields['question']} {built.expected}."
    before, after = built.request.prompt.removesuffix(built.fields["question"]).split(needle)
    facts_before, facts_after = before.count("magic number"), after.count("magic number")
    assert facts_before + facts_after == 3
    # All three on one side weigh about as much as the haystack itself; only then may the middle be missed.
    tolerance = 0.15 if facts_before in (1, 2) else 0.35
    assert built.fields["achieved_depth"] == pytest.approx(0.5, abs=tolerance)


def test_distractors_have_other_keys_values_and_places(tasks: dict[int, NeedleTask]) -> None:
    """A distractor that repeats the needle's key or value would make the question ambiguous."""
    prompt = build(tasks[3], 1024, 0.5, 0).request.prompt
    facts = re.findall(r"^The magic number of ([a-z]+) is (\d{5})\.$", prompt, flags=re.MULTILINE)
    assert len(facts) == 4
    assert len({key for key, _ in facts}) == len({value for _, value in facts}) == 4


def test_sample_is_a_pure_function_of_seed_and_cell(make: Make) -> None:
    """The order in which samples are built, or which were built before a kill, must not change them."""
    first, second = make(lengths=[256]), make(lengths=[256])
    build(second, 256, 1.0, 7)
    prompt = build(first, 256, 0.5, 0).request.prompt
    assert prompt == build(second, 256, 0.5, 0).request.prompt
    others = [build(first, 256, 0.5, 1), build(first, 256, 0.25, 0), build(make(seed=2), 256, 0.5, 0)]
    assert len({prompt, *(built.request.prompt for built in others)}) == 4


@pytest.mark.parametrize("style", STYLES)
def test_what_stands_before_the_needle_is_the_same_tokens(
    style: str, documents: Documents, tmp_path: Path
) -> None:
    """A prefix that differs in one token is read again for every cell.

    Up to its needle every prompt of a haystack has the tokens of the prompt whose needle stands last, at any
    length.
    """
    form = PromptForm(build_tokenizer(style, tmp_path), chat_template=style)
    settings_ = NeedleConfig(lengths=(600, 1200), depths=(0.0, 0.3, 0.7, 1.0), samples=2)
    task = NeedleTask(settings_, documents, form)
    plan = task.plan()
    assert [planned.group for planned in plan] == ["haystack 0"] * 8 + ["haystack 1"] * 8
    for number in (0, 1):
        built = {planned.key[:2]: task.build(planned) for planned in plan if planned.key[2] == number}
        trunk = built[1200, 1.0].request.prompt_ids
        assert trunk is not None
        for (length, depth), each in built.items():
            ids = each.request.prompt_ids
            assert ids is not None
            same = int(np.argmin(np.append(ids[: len(trunk)] == trunk[: len(ids)], False)))
            shared = form.tokenizer.decode(ids[:same])
            text = each.request.prompt
            needle = text.index(f"{each.fields['question']} {each.expected}.")
            # One token may straddle the border where the needle begins.
            assert len(text[:needle]) - len(shared) <= 12, (length, depth)


def test_needle_value_and_key_differ_by_cell(make: Make) -> None:
    """One value for a whole grid would be answered by a model that reads another cell's cache."""
    task = make(lengths=[256, 512], depths=[0.0, 0.5, 1.0], samples=1)
    built = [task.build(planned) for planned in task.plan()]
    assert (
        len({str(each.expected) for each in built}) == len({each.fields["question"] for each in built}) == 6
    )


def test_a_begun_answer_is_in_the_header(make: Make) -> None:
    """With the answer begun or not, the header was the same: records were mixed, and models paired."""
    begun = ("", "The number is", "It is")
    found = [make(mode="generate", answer_prefix=text).params() for text in begun]
    assert [each.get("answer_begun", "") for each in found] == list(begun)
    assert {each["answer_prefix"] for each in found} == {"end of prompt"}


def test_room_for_an_answer_in_the_stated_length_is_in_the_header(
    documents: Documents, tokenizer: Tokenizer
) -> None:
    """Haystacks of other lengths were one evaluation where --max-new-tokens says how long answers may get."""
    form, given = PromptForm(tokenizer, max_new_tokens=200), (32, 100, 200)
    tasks = [
        NeedleTask(NeedleConfig(lengths=(1024,), mode="generate", max_new_tokens=room), documents, form)
        for room in given
    ]
    found = [task.params() for task in tasks]
    assert [each.get("answer_room", 32) for each in found] == list(given)
    assert {each["max_new_tokens"] for each in found} == {200}
    assert len({build(task, 1024, 0.5, 0).request.prompt for task in tasks}) == 3


def test_answers_stand_in_no_haystack(make: Make) -> None:
    """Two needles at one depth, or a number that the text holds anyway, make a wrong answer right."""
    task = make(num_needles=3, num_distractors=2, mode="generate", depths=[0.0, 1.0], samples=2)
    for planned in task.plan():
        built = task.build(planned)
        assert isinstance(built.expected, list) and len(set(built.expected)) == 3
        for number in built.expected:
            assert built.request.prompt.count(number) == 1
        assert len(re.findall(r"magic number of \w+ is \d", built.request.prompt)) == 5


def test_several_needles_are_asked_together_and_counted(
    make: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The score of several needles is the share that is found."""
    task = make(num_needles=2, mode="generate", depths=[0.5], samples=2, lengths=[512])
    assert (task.name, task.scorer) == ("needle_multi", "string_match_all")
    built = build(task, 512, 0.5, 0)
    keys = re.findall(r"magic number of (\w+) is \d", built.request.prompt)
    first, second = re.fullmatch(r"The magic number of (\w+) and (\w+) is", built.fields["question"]).groups()
    assert sorted(keys) == sorted([first, second])
    facts = dict(re.findall(r"magic number of (\w+) is (\d+)", built.request.prompt))
    assert built.expected == [facts[first], facts[second]]
    half = Knowing(tokenizer, knows=lambda prompt: re.findall(r"is (\d{5})\.", prompt)[0])
    summary = run_task(task, half, tokenizer=tokenizer, label="half", out=tmp_path / "half.jsonl")
    assert summary["mean"] == 0.5 and summary["scored"] == 2


def test_generated_answers_fit_into_the_stated_length(make: Make) -> None:
    """A prompt that fills the window leaves no room for the answer."""
    built = build(make(mode="generate", max_new_tokens=40), 512, 0.5, 0)
    assert built.request.prompt_ids is not None
    assert 512 - 8 < len(built.request.prompt_ids) + 40 <= 512
    assert built.fields["achieved_length"] == len(built.request.prompt_ids) + 40
    assert built.request.answer_ids is None and built.request.max_new_tokens == 40


def test_modes_have_the_same_prompt_where_the_answer_has_its_room(make: Make) -> None:
    """Generated and teacher-forced answers can only be compared on the same prompts."""
    forced = build(make(), 512, 0.5, 0)
    assert forced.request.answer_ids is not None
    free = build(make(mode="generate", max_new_tokens=len(forced.request.answer_ids)), 512, 0.5, 0)
    assert free.request.prompt == forced.request.prompt


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_tokenizer_gets_the_stated_length(
    style: str, documents: Documents, tmp_path: Path
) -> None:
    """BOS counts, and needles are found by text: sentence ends by the ids of one tokenizer are nowhere in another."""
    form = PromptForm(build_tokenizer(style, tmp_path))
    task = NeedleTask(NeedleConfig(lengths=(700, 1500), depths=(0.0, 0.4, 1.0), samples=1), documents, form)
    for planned in task.plan():
        built = task.build(planned)
        length, depth = planned.key[:2]
        assert length - length_tolerance(int(length)) < built.fields["achieved_length"] <= length
        assert built.fields["achieved_depth"] == pytest.approx(depth, abs=0.08)
        bos = form.tokenizer.bos_id
        if bos is not None:
            assert built.request.prompt_ids is not None
            assert (built.request.prompt_ids == bos).sum() == 1 and built.request.prompt_ids[0] == bos


# -- one's own texts -----------------------------------------------------------------------------------------


def test_sentence_needles_are_asked_as_they_are(make: Make) -> None:
    """A needle without fields is planted once, with its own question and answer."""
    task = make(
        needle="The best thing to do in Foo is to eat a sandwich.",
        question="What is the best thing to do?",
        answer="eat a sandwich",
        prompt="<book> {context} </book>\nQuestion: {question}\nAnswer:",
        mode="generate",
        lengths=[400],
    )
    built = build(task, 400, 0.5, 0)
    assert built.request.prompt.startswith("<book> ")
    assert built.request.prompt.endswith(" </book>\nQuestion: What is the best thing to do?\nAnswer:")
    assert built.request.prompt.count("\nThe best thing to do in Foo is to eat a sandwich.\n") == 1
    assert built.expected == "eat a sandwich"
    assert task.scorer == "contains"


def test_fields_are_filled_once() -> None:
    """A haystack that holds "{question}" is text."""
    assert fill("{context}|{question}|{}", context="{question}", question="why") == "{question}|why|{}"


def test_given_keys_serve_distractors_in_turn(make: Make) -> None:
    """Six cities and eight distractors: keys repeat, numbers do not."""
    task = make(
        needle="The Singapore number is {number}.",
        question="The Singapore number is",
        distractors=("The {key} number is {number}.",),
        keys=("London", "Paris"),
        num_distractors=5,
    )
    prompt = build(task, 1024, 0.5, 0).request.prompt
    facts = re.findall(r"^The (\w+) number is (\d+)\.$", prompt, flags=re.MULTILINE)
    assert sorted(key for key, _ in facts) in (
        ["London"] * 2 + ["Paris"] * 3 + ["Singapore"],
        ["London"] * 3 + ["Paris"] * 2 + ["Singapore"],
    )
    assert len({number for _, number in facts}) == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depths": [0, 50, 100]}, "between 0"),
        ({"depths": [-0.1]}, "between 0"),
        ({"depths": [0.5, 0.5]}, "depths: 0.5 stands twice"),
        ({"depths": "0:1"}, "not start:end:count"),
        ({"depths": "0:1:0"}, "no count of values of 1 or more"),
        ({"depths": "0:1:1"}, "one value between two"),
        ({"depths": "0,half"}, "'half' is not a depth"),
        ({"depths": "0:2:3"}, "between 0"),
        ({"lengths": ["1k", 1024]}, "lengths: 1024 stands twice"),
        ({"lengths": "10:12:5"}, "lengths: 10 stands twice"),
        ({"lengths": []}, "at least one value"),
        ({"lengths": ["4kk"]}, "not a context length"),
        ({"lengths": "1k:4kk:3"}, "not a context length"),
        ({"lengths": [0]}, "greater than 0"),
        ({"sample": 3}, "did you mean 'samples'"),
        ({"num_distractors": 9, "answer_digits": 1}, "more than 1 digits"),
        ({"needle": "It is {nmber}."}, r"needle holds \{nmber\}"),
        ({"needle": "It is so."}, r"\{key\}, which the needle does not say"),
        ({"needle": "It is so.", "question": "Is it?"}, r"answer holds \{number\}"),
        ({"prompt": "{question} {context}"}, "asks before the context"),
        ({"prompt": "{context}"}, r"\{question\} 0 times"),
        ({"num_needles": 2}, "mode: generate"),
        ({"num_needles": 2, "mode": "generate", "question": "What?"}, "to tell them apart"),
        (
            {"num_distractors": 1, "needle": "It is.", "question": "Is it?", "answer": "yes"},
            "give the answer",
        ),
        ({"scorer": "rouge"}, "no scorer 'rouge'"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    """Depths in percent, doubled cells, misspelt keys and fields used to run and plot nonsense."""
    with pytest.raises(ConfigError, match=message):
        NeedleConfig.from_dict({"lengths": [256], **values})


@given(count=st.integers(2, 60))
def test_grids_are_even_and_end_where_they_say(count: int) -> None:
    """Steps of 0.3 made a depth of 1.2, and depths rounded to tens fell together."""
    grid = NeedleConfig.from_dict({"lengths": f"1000:128000:{count}", "depths": f"0:1:{count}"})
    assert (len(grid.lengths), len(grid.depths)) == (count, count)
    assert (grid.lengths[0], grid.lengths[-1]) == (1000, 128000)
    assert (grid.depths[0], grid.depths[-1]) == (0.0, 1.0)
    assert np.allclose(np.diff(grid.depths), 1 / (count - 1))
    assert max(np.diff(grid.lengths)) - min(np.diff(grid.lengths)) <= 1


def test_grids_are_read_as_people_write_them() -> None:
    """`128k` is 131072 tokens everywhere, and a tenth is 0.1."""
    grid = NeedleConfig.from_dict({"lengths": ["1k", "128k", 300], "depths": "0:1:11"})
    assert grid.lengths == (1024, 131072, 300)
    assert grid.depths == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert NeedleConfig.from_dict({"lengths": "1k:4k:4,6k"}).lengths == (1024, 2048, 3072, 4096, 6144)


def test_too_short_a_length_is_refused(make: Make) -> None:
    """A context of needle and question alone measures nothing."""
    with pytest.raises(ConfigError, match="no room for the planted facts"):
        make(lengths=[512, 30])


def test_too_short_a_haystack_is_refused_or_repeated(make: Make) -> None:
    """Repeating the documents until the context is full, without a word, plants the same text many times."""
    with pytest.raises(DataError, match=r"haystack is too short\s+found: [\d,]+ tokens in 12"):
        make(lengths=[512, 10_000_000])
    built = build(make(lengths=[40_000], repeat=True), 40_000, 0.5, 0)
    assert 40_000 - 400 < built.fields["achieved_length"] <= 40_000


def test_documents_without_keys_are_refused(tokenizer: Tokenizer) -> None:
    """Text without lower-case words has nothing that can be a key."""
    documents = [HeldOutDocument("a", "123 456\n" * 500)]
    with pytest.raises(DataError, match="too few words"):
        NeedleTask(NeedleConfig(lengths=(256,)), documents, PromptForm(tokenizer))


def test_documents_are_identified_by_all_they_hold(documents: Documents) -> None:
    """Two corpora must not share records; an id stands for one text."""
    changed = [documents[0]._replace(text=documents[0].text + "x"), *documents[1:]]
    assert describe_documents(documents) != describe_documents(changed)
    with pytest.raises(DataError, match="same id"):
        describe_documents([documents[0], documents[0]])
    with pytest.raises(DataError, match="none"):
        describe_documents([])


def test_header_holds_all_that_determines_the_prompts(make: Make) -> None:
    """A key of length, depth and model alone took results of another needle for done."""
    params = make().params()
    for changes in (
        {"needle": "The number of {key} is {number}."},
        {"question": "The number of {key} is"},
        {"prompt": "{context} {question}"},
        {"seed": 4},
        {"order": "given"},
        {"num_distractors": 1},
        {"answer_digits": 6},
    ):
        assert make(**changes).params() != params, changes
    assert (
        params["documents"]["count"] == 12 and params["bos"] == "no BOS" and params["chat_template"] is None
    )
    assert make(mode="generate").params()["max_new_tokens"] == 32


# -- haystacks -----------------------------------------------------------------------------------------------


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


def test_documents_in_given_order(documents: Documents, tokenizer: Tokenizer, make: Make) -> None:
    """Essays in the order of a file listing differ between machines; here they stand as they were given."""
    window = Haystack(documents, tokenizer).first(2000)
    assert window.text.startswith(documents[0].text.rstrip("\n"))
    assert window.text.index(documents[1].text[:40]) < window.text.index(documents[2].text[:40])
    task = make(order="given", depths=[1.0], samples=2)
    first, second = (task.build(planned).request.prompt for planned in task.plan())
    assert first[:2000] == second[:2000] == window.text[:2000]
    assert first != second


def test_default_haystack_is_there_without_a_download(tokenizer: Tokenizer) -> None:
    """Whoever brings no text still gets real prose, long enough for 64K and repeated beyond."""
    documents = default_documents()
    assert sum(len(document.text) for document in documents) > 300_000
    assert "statement" in documents[0].text
    task = NeedleTask(NeedleConfig(lengths=(2048,), samples=1), documents, PromptForm(tokenizer))
    assert build(task, 2048, 0.5, 0).fields["achieved_depth"] == pytest.approx(0.5, abs=0.1)


# -- multi-key and presets -----------------------------------------------------------------------------------


def test_one_context_for_all_depths(documents: Documents, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """All questions of a context share everything before them, and each asks for its own needle."""
    settings_ = NeedleConfig(lengths=(512, 900), depths=(0.0, 0.25, 0.5, 0.75, 1.0), samples=2)
    task = MultiKeyTask(settings_, documents, PromptForm(tokenizer))
    assert task.name == "needle_multikey"
    for length in (512, 900):
        built = [build(task, length, depth, 0) for depth in settings_.depths]
        contexts = {each.request.prompt.removesuffix(each.fields["question"]) for each in built}
        assert len(contexts) == 1
        facts = re.findall(r"^(The magic number of \w+ is) (\d{5})\.$", contexts.pop(), flags=re.MULTILINE)
        assert [(each.fields["question"], each.expected) for each in built] == facts
        for each, depth in zip(built, settings_.depths):
            assert length - 16 < each.fields["achieved_length"] <= length
            assert each.fields["achieved_depth"] == pytest.approx(depth, abs=0.05)
    # In any order of building, and from any cell on.
    again = MultiKeyTask(settings_, documents, PromptForm(tokenizer))
    assert build(again, 900, 0.5, 0).request.prompt == build(task, 900, 0.5, 0).request.prompt
    summary = run_task(task, Knowing(tokenizer), tokenizer=tokenizer, label="x", out=tmp_path / "x.jsonl")
    assert (summary["samples"], summary["mean"]) == (20, 1.0)


@pytest.mark.parametrize(
    "values", [{"question": "What?"}, {"num_needles": 2, "mode": "generate"}], ids=["no key", "several"]
)
def test_multi_key_needs_keys(documents: Documents, tokenizer: Tokenizer, values: dict[str, Any]) -> None:
    """Five needles and one question that fits them all has no right answer."""
    settings_ = NeedleConfig.from_dict({"lengths": [512], **values})
    with pytest.raises(ConfigError, match=r"each depth|every depth"):
        MultiKeyTask(settings_, documents, PromptForm(tokenizer))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_perfect_answers_score_one_in_each_preset(
    name: str, documents: Documents, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A published metric gave a perfect answer 0.917, because the expected words hold "a" twice."""
    full = NeedleConfig.from_dict(preset_named(name))
    settings_ = NeedleConfig.from_dict({**preset_named(name), "lengths": [600], "depths": [0.0, 0.5, 1.0]})
    task = NeedleTask(settings_, documents, PromptForm(tokenizer))
    answerer = Knowing(tokenizer, knows=lambda prompt: f" {full.answer}")
    summary = run_task(task, answerer, tokenizer=tokenizer, label=name, out=tmp_path / "records.jsonl")
    assert summary["mean"] == 1.0 and summary["unscored"] == {}
    request = build(task, 600, 0.5, 0).request
    assert not request.prompt.endswith(" ")


def test_the_exact_preset_gives_the_originals_scores(documents: Documents, tokenizer: Tokenizer) -> None:
    """`rouge` 1.0.1 counts the empty lines around the original's needle as a word; values are the package's own."""
    settings_ = NeedleConfig.from_dict({**preset_named("longllm", exact=True), "lengths": [600]})
    needle = str(settings_.needle).strip()
    assert build(
        NeedleTask(settings_, documents, PromptForm(tokenizer)), 600, 0.5, 0
    ).request.prompt.startswith(
        "There is an important infomation hidden in the following context. Find the information and memorize it."
    )
    scorer = scorer_named(settings_.scorer_name)
    for output, plain, exact in (
        (needle, 0.999999995, 0.9743589693622617),
        ("Eat a sandwich and sit in Dolores Park on a sunny day.", 0.4666666620222223, 0.45161289864724247),
        (
            " The best thing to do in San Francisco is eating a hamburg on a sunny day.\nQuestion: why. not",
            0.8108108058144633,
            0.7894736792243767,
        ),
        ("", 0.0, 0.0),
    ):
        assert scorer.score(settings_.answer, output) == pytest.approx(exact, abs=2e-8)
        assert scorer.score(needle, output) == pytest.approx(plain, abs=2e-8)
    with pytest.raises(ArgumentError, match="no exact form"):
        preset_named("easycontext", exact=True)


@pytest.mark.parametrize(
    ("name", "digests"),
    [
        (
            "fu-2024",
            "7ff7515b8c72787d a729f5faa972a2ca d3b11410a8763873 62dfcf639396db67 "
            "4dd9973208ad8b2e 8aca767f8ad06399 ef6bfc07eb242bb8 d94ea8aabc5e0a1a",
        ),
        (
            "longllm",
            "d9ad18bc1e06a607 f89adb4f631fb1b8 3156cfdc66b24620 389265c55d7f192e "
            "5d73bbef4584cbae c6a24e14f7b19e80 12dd070c7eb75179 2f2305918cfff1f0",
        ),
    ],
)
def test_exact_prompts_are_those_of_the_originals(name: str, digests: str, tmp_path: Path) -> None:
    """A needle at another place, or a haystack of another length, is not the published test.

    The digests are of what `generate_context` and `generate_prompt` of needle_in_haystack.py, BOS left out, and
    `generate_sample` of Long_LLM's eval_needle.py made of these texts with this tokenizer.
    """
    tokenizer = load_tokenizer(theirs.write_tokenizer(tmp_path / "tokenizer"))
    essays = [HeldOutDocument(str(number), text) for number, text in enumerate(theirs.books())]
    grid = {"lengths": (1500, 9000), "depths": (0, 0.11, 0.56 if name == "fu-2024" else 0.55, 1)}
    settings_ = NeedleConfig.from_dict({**preset_named(name, exact=True), **grid})
    task = NeedleTask(settings_, essays, PromptForm(tokenizer))
    prompts = [task.build(planned).request.prompt for planned in task.plan()]
    assert [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in prompts] == digests.split()


def test_exact_prompts_longer_than_all_texts_and_shorter_than_their_parts(
    tokenizer: Tokenizer,
) -> None:
    """Texts start again where they end; what has no room is said, not cut to nothing."""
    settings_ = NeedleConfig.from_dict(
        {**preset_named("longllm", exact=True), "lengths": [3000], "depths": [0.5]}
    )
    task = NeedleTask(settings_, [HeldOutDocument("x", "It rains. " * 40)], PromptForm(tokenizer))
    (planned,) = task.plan()
    fields = task.build(planned).fields
    assert fields["achieved_length"] <= planned.tokens
    haystack = OriginalHaystack([HeldOutDocument("x", "It rains. ")], tokenizer, 300)
    for original in ("fu-2024", "longllm"):
        with pytest.raises(DataError, match="no room for a haystack in 20 tokens"):
            haystack.planted(original, Parts("Read: ", "A needle. " * 8, " What?"), 20, 0.5)
    with pytest.raises(DataError, match="holds no text"):
        OriginalHaystack([HeldOutDocument("x", "")], tokenizer, 300)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_distractors": 1, "distractors": ["No."]}, "one needle"),
        ({"order": "random"}, "given"),
        ({"mode": "teacher_forced"}, "generated"),
    ],
)
def test_exact_tests_take_no_other_form(values: dict[str, Any], message: str) -> None:
    """A setting that the original has no place for would be ignored in silence."""
    with pytest.raises(ConfigError, match=message):
        NeedleConfig.from_dict({**preset_named("fu-2024", exact=True), **values})


def test_presets_have_the_published_grids() -> None:
    """440 prompts of 50K to 1M, and 400 cells of 1K to 128K."""
    sizes = {}
    for name in PRESETS:
        grid = NeedleConfig.from_dict(preset_named(name))
        sizes[name] = (grid.lengths[0], grid.lengths[-1], len(grid.cells()), grid.samples)
    assert sizes == {
        "fu-2024": (1000, 128000, 400, 1),
        "easycontext": (50000, 1000000, 220, 2),
        "longllm": (8000, 80000, 100, 1),
    }
    lengths = NeedleConfig.from_dict(preset_named("easycontext")).lengths
    assert lengths == tuple(range(50_000, 1_000_001, 50_000))
