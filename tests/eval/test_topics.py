from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.prompts import PromptForm
from longspan.eval.records import read_records
from longspan.eval.topics import NUM_LINES, NUM_TOPICS, Topics, TopicsConfig
from longspan.eval.word_lists import LISTS, word_list
from tests.eval.perfect import run_perfect, run_wrong


def make(tokenizer: Tokenizer, **values: object) -> Topics:
    return Topics(TopicsConfig.from_dict(values), PromptForm(tokenizer))


@pytest.mark.parametrize(
    "values",
    [
        {"counts": [2, 7], "samples": 2, "questions": 2},
        {"kind": "lines", "counts": [20, 40], "samples": 2, "questions": 3},
    ],
)
def test_perfect_answers_score_one_and_wrong_ones_zero(
    values: dict[str, object], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Groups are counts of topics or lines; by mean tokens two of them can fall together."""
    task = make(tokenizer, **values)
    summary = run_perfect(task, tokenizer, tmp_path / "perfect.jsonl")
    assert summary["mean"] == 1.0
    assert run_wrong(task, tokenizer, tmp_path / "wrong.jsonl")["mean"] == 0.0
    field = f"num_{task.name}"
    assert [row[field] for row in summary["by_count"]] == values["counts"]
    header, samples, _ = read_records(tmp_path / "perfect.jsonl")
    assert header["task"] == task.name
    assert all(sample["length"] == sample["prompt_tokens"] + 50 for sample in samples)


@settings(max_examples=10, deadline=None)
@given(count=st.integers(1, 30), sample=st.integers(0, 50))
def test_first_topic_of_the_talk_is_expected(tokenizer: Tokenizer, count: int, sample: int) -> None:
    """Read from the talk itself; topics never repeat, so the answer is one."""
    task = make(tokenizer, counts=[count], samples=sample + 1, turns=2)
    built = task.build(task.plan()[-1])
    named = re.findall(r"USER: I would like to discuss the topic of (.*)\.\n", built.request.prompt)
    assert len(named) == len(set(named)) == count
    assert built.expected == named[0]


def test_line_in_question_is_expected(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, kind="lines", counts=[30], samples=1, questions=4)
    built = [task.build(planned) for planned in task.plan()]
    assert len({each.request.prompt.rpartition("Now the record is over")[0] for each in built}) == 1
    for each in built:
        lines = dict(re.findall(r"line (\S+): REGISTER_CONTENT is <(\d+)>\n", each.request.prompt))
        asked = re.search(r"in line (\S+)\?", each.request.prompt)
        assert asked is not None and len(lines) == 30
        assert lines[asked.group(1)] == each.expected


def test_counts_of_longchat(tokenizer: Tokenizer) -> None:
    assert TopicsConfig().in_effect == NUM_TOPICS
    assert TopicsConfig(kind="lines").in_effect == NUM_LINES


def test_planned_length_is_near(tokenizer: Tokenizer) -> None:
    """What is too long for the model is refused by the planned length."""
    task = make(tokenizer, counts=[4, 30], samples=1)
    for planned in task.plan():
        assert planned.tokens == pytest.approx(task.build(planned).fields["length"], rel=0.15)


@pytest.mark.parametrize(
    "values",
    [
        {"counts": [101]},
        {"counts": [5, 5]},
        {"counts": [2], "questions": 3},
        {"kind": "words"},
        {"turns": 0},
    ],
)
def test_malformed_settings_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        TopicsConfig.from_dict(values)


@pytest.mark.parametrize("counts", ["abc", "2,", "1:5:3", "-3"])
def test_what_is_no_count_is_said_in_plain_words(counts: str) -> None:
    with pytest.raises(ConfigError, match="not counts, such as 5,10,20"):
        TopicsConfig.from_dict({"counts": counts})


def test_lists_have_no_word_twice() -> None:
    """The same word twice in a list of different words, or one topic inside another, has two answers."""
    words = [word for name in LISTS for word in word_list(name)]
    assert len(words) == len(set(words))
    topics = word_list("topics")
    assert not [(one, other) for one in topics for other in topics if one != other and one in other]
