"""Calls in long histories: the step that is asked for, its place, and what counts as right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from longspan.data.tokenizer import Tokenizer
from longspan.eval.prompts import PromptForm
from longspan.eval.scorers import scorer_named
from longspan.eval.tool_calls import ANSWER_TOKENS, ToolCalls, ToolCallsConfig
from tests.eval.perfect import run_perfect, run_wrong


def make(tokenizer: Tokenizer, **values: object) -> ToolCalls:
    return ToolCalls(ToolCallsConfig.from_dict({"lengths": [1500], **values}), PromptForm(tokenizer))


def test_perfect_answers_score_one_and_wrong_ones_zero(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A maximum below 1 would make perfect models look flawed."""
    task = make(tokenizer, lengths=[1200, 1500], depths=[0, 1], samples=2)
    assert run_perfect(task, tokenizer, tmp_path / "perfect.jsonl")["mean"] == 1.0
    assert run_wrong(task, tokenizer, tmp_path / "wrong.jsonl")["mean"] == 0.0


def test_step_length_and_history(tokenizer: Tokenizer) -> None:
    """Another step than the one of that depth, or a history that changes with the question, is another task."""
    task = make(tokenizer, depths=[0, 0.5, 1], samples=1)
    histories = []
    for planned in task.plan():
        built = task.build(planned)
        assert built.request.prompt_ids is not None
        tokens = len(built.request.prompt_ids) + ANSWER_TOKENS
        assert tokens == built.fields["achieved_length"] <= 1500 and tokens > 1500 - 250
        asked, steps = built.fields["step"], built.fields["steps"]
        assert asked == 1 + round(planned.key[1] * (steps - 1))
        lines = re.findall(r"^Step (\d+): (.*) -> (.*)$", built.request.prompt, re.MULTILINE)
        assert [int(number) for number, _, _ in lines] == list(range(1, steps + 1))
        expected = json.loads(str(built.expected))
        assert {**json.loads(lines[asked - 1][1]), **json.loads(lines[asked - 1][2])} == expected
        histories.append([line for _, line, _ in lines][: steps - 1])
    shortest = min(map(len, histories))
    assert len({tuple(history[:shortest]) for history in histories}) == 1


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ('{"name": "run", "arguments": {"command": "a", "seconds": 3}, "result": "x 1"}', 1),
        ('Sure: {"result":"x 1","arguments":{"seconds":3,"command":"a"},"name":"run"}\nDone.', 1),
        ('```json\n{"name": "run", "arguments": {"command": "a", "seconds": 3}, "result": "x 1"}\n```', 1),
        ('{"name": "run", "arguments": {"command": "a", "seconds": "3"}, "result": "x 1"}', 0),
        ('{"name": "run", "arguments": {"command": "a", "seconds": 3}, "result": "x 2"}', 0),
        ('{"name": "run", "arguments": {"command": "a", "seconds": 3}', 0),
        ("[" * 5000, 0),
        ("", 0),
    ],
)
def test_exact_call_match(output: str, score: int) -> None:
    """White space and the order of keys say nothing; a number as a text does."""
    expected = '{"name": "run", "arguments": {"command": "a", "seconds": 3}, "result": "x 1"}'
    assert scorer_named("call_match").score(expected, output) == score
