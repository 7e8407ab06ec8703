from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError, DataError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.passkey import ANSWER_TOKENS, NOISE, Passkey, PasskeyConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.records import read_records
from longspan.eval.task import Planned
from tests.eval.perfect import run_perfect, run_wrong
from tests.eval.tokenizer_styles import STYLES, build_tokenizer


def make(tokenizer: Tokenizer, **values: object) -> Passkey:
    return Passkey(PasskeyConfig.from_dict({"lengths": [600], **values}), PromptForm(tokenizer))


def test_perfect_answers_score_one_and_wrong_ones_zero(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A maximum below 1 would make perfect models look flawed."""
    task = make(tokenizer, lengths=[600, 900], depths=[0, 0.5, 1], samples=2)
    assert run_perfect(task, tokenizer, tmp_path / "perfect.jsonl")["mean"] == 1.0
    summary = run_wrong(task, tokenizer, tmp_path / "wrong.jsonl")
    assert summary["mean"] == 0.0
    assert [(cell["length"], cell["depth"], cell["samples"]) for cell in summary["cells"]] == [
        (length, depth, 2) for length in (600, 900) for depth in (0.0, 0.5, 1.0)
    ]
    record = read_records(tmp_path / "perfect.jsonl").samples[0]
    assert {"length", "depth", "sample", "achieved_length", "achieved_depth"} <= record.keys()


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(800, 3000), depth=st.floats(0, 1), digits=st.integers(1, 18), sample=st.integers(0, 99)
)
def test_length_depth_and_key(
    tokenizer: Tokenizer, length: int, depth: float, digits: int, sample: int
) -> None:
    """A prompt over the stated length is refused by servers; a key in the wrong place is another cell."""
    task = make(tokenizer, lengths=[length], digits=digits)
    built = task.build(Planned((length, depth, sample), length))
    prompt, key = built.request.prompt, str(built.expected)
    assert len(key) == digits and key[0] != "0"
    assert re.findall(r"pass key is (\d+)", prompt) == [key]
    unit = len(tokenizer.encode(NOISE))
    assert built.request.prompt_ids is not None
    assert length - 2 * unit <= len(built.request.prompt_ids) + ANSWER_TOKENS <= length
    units = prompt.count("The grass is green")
    assert abs(prompt.split("The pass key")[0].count("The grass") / units - depth) <= 1 / units


@pytest.mark.parametrize("style", STYLES)
def test_other_tokenizers(style: str, tmp_path: Path) -> None:
    """Digits, spaces and BOS are cut differently; lengths hold all the same."""
    task = make(build_tokenizer(style, tmp_path), lengths=[900], depths=[0.3])
    built = task.build(task.plan()[0])
    assert 800 <= built.fields["achieved_length"] <= 900


def test_samples_do_not_depend_on_their_order(tokenizer: Tokenizer) -> None:
    """A run that goes on must compose what the first would have composed."""
    plan = make(tokenizer, depths=[0, 1]).plan()
    forward = [make(tokenizer).build(planned).request.prompt for planned in plan]
    task = make(tokenizer)
    assert [task.build(planned).request.prompt for planned in reversed(plan)] == forward[::-1]
    assert len(set(forward)) == len(forward)
    assert make(tokenizer, seed=1).build(plan[0]).request.prompt != forward[0]


def test_grid_of_longllm() -> None:
    """Twenty even lengths from 8192 to 131072, both included."""
    lengths = PasskeyConfig.from_dict({"lengths": "8192:131072:20"}).lengths
    assert (len(lengths), lengths[0], lengths[-1]) == (20, 8192, 131072)


def test_a_key_that_cannot_stand_at_its_depth_is_not_scored(tokenizer: Tokenizer) -> None:
    """One line of noise has a start and an end: the key of depth 0.5 stood at 0 and was scored as if it did not."""
    task = Passkey(PasskeyConfig(lengths=(4096,)), PromptForm(tokenizer))
    fixed, per_unit = task._sizes()
    length = int(fixed + 1.5 * per_unit) + ANSWER_TOKENS
    assert task.build(Planned((length, 1.0, 0), length)).fields["achieved_depth"] == 1.0
    with pytest.raises(DataError, match=r"1 lines of noise .* no place at depth 0.5"):
        task.build(Planned((length, 0.5, 0), length))


def test_no_room_is_a_reason_not_a_crash(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, lengths=[60])
    with pytest.raises(
        DataError, match="not fit into 60 tokens: a prompt has 299 tokens at the least, and 28 "
    ):
        task.build(task.plan()[0])


@pytest.mark.parametrize(
    "values", [{"depths": [1.5]}, {"lengths": [400, 400]}, {"digits": 0}, {"depth": [1]}]
)
def test_malformed_grids_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PasskeyConfig.from_dict({"lengths": [400], **values})
