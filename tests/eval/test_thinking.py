"""Models that think before they answer: what their templates are told, where answers stand, what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from longspan.core.errors import ConfigError
from longspan.data.tokenizer import Tokenizer, load_tokenizer
from longspan.eval.passkey import Passkey, PasskeyConfig
from longspan.eval.prompts import THOUGHT_TOKENS, PromptForm
from longspan.eval.records import read_records
from longspan.eval.ruler.task import Ruler, RulerConfig
from longspan.eval.runner import run_task
from longspan.infer.requests import Answer
from tests.eval.answerers import Knowing
from tests.eval.tokenizer_styles import build_tokenizer

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
SWITCHED = TURNS + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENED = TURNS + "<think>\n{% endif %}"
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final<|message|>"
    "{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
QUESTION = "What is the magic number of iron?"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build_tokenizer("qwen", tmp_path_factory.mktemp("qwen"))


@pytest.fixture()
def template(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        (tmp_path / "chat.jinja").write_text(text)
        return str(tmp_path / "chat.jinja")

    return write


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_variables_reach_the_template(qwen: Tokenizer, template: Any, variables: dict[str, Any]) -> None:
    """The ids are those of transformers with the same variables."""
    form = PromptForm(qwen, chat_template=template(SWITCHED), template_args=variables)
    reference = transformers.AutoTokenizer.from_pretrained(qwen.path.parent)
    expected = reference.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        chat_template=SWITCHED,
        add_generation_prompt=True,
        tokenize=False,
        **variables,
    )
    request = form.request(QUESTION)
    assert request.prompt == expected and request.prompt_ids is not None
    assert request.prompt_ids.tolist() == reference(expected, add_special_tokens=False)["input_ids"]
    assert form.thinks == (variables != {"enable_thinking": False})
    assert form.params().get("template_args") == (variables or None)


@pytest.mark.parametrize(
    ("text", "thinking", "thinks", "ends", "said"),
    [
        (SWITCHED, "auto", True, "assistant\n", "expected"),
        (SWITCHED, "on", True, "assistant\n", "expected"),
        (SWITCHED, "off", False, EMPTY, "none"),
        (OPENED, "auto", True, "<think>\n", "opened"),
        (OPENED, "off", False, EMPTY, "none"),
        (CHANNELS, "auto", True, "assistant", "expected"),
        (CHANNELS, "off", False, "<|channel|>final<|message|>", "none"),
        (TURNS + "{% endif %}", "auto", False, "assistant\n", "unknown"),
        (TURNS + "{% endif %}", "on", True, "assistant\n", "expected"),
    ],
)
def test_a_template_says_whether_its_model_thinks(
    qwen: Tokenizer, template: Any, text: str, thinking: Any, thinks: bool, ends: str, said: str
) -> None:
    """Room, the answer's beginning and the words on stop texts all hang on it."""
    form = PromptForm(qwen, chat_template=template(text), thinking=thinking)
    request = form.request(QUESTION, answer_prefix=" The number is", max_new_tokens=10)
    begun = "" if thinks else "The number is"
    assert (form.thinks, request.thinking) == (thinks, said)
    assert request.prompt.endswith(ends + begun) and request.prompt_ids is not None
    assert qwen.decode(request.prompt_ids) == request.prompt
    assert request.max_new_tokens == 10 + THOUGHT_TOKENS * thinks
    assert form.params()["answer_prefix"] == ("none" if thinks else "assistant")


@pytest.mark.parametrize(
    ("text", "ends"), [(SWITCHED, EMPTY), (OPENED, EMPTY), (CHANNELS, "final<|message|>")]
)
def test_a_given_answer_stands_outside_of_thoughts(
    qwen: Tokenizer, template: Any, text: str, ends: str
) -> None:
    """Inside the open block, or where the model would begin to think, no right answer is likely."""
    form = PromptForm(qwen, chat_template=template(text))
    request = form.request(QUESTION, answer="12345")
    assert request.prompt_ids is not None and request.answer_ids is not None
    assert qwen.decode(request.prompt_ids).endswith(ends) and qwen.decode(request.answer_ids) == "12345"
    assert form.count(QUESTION, answer="12345") == len(request.prompt_ids) + len(request.answer_ids)
    on = PromptForm(qwen, chat_template=template(text), thinking="on")
    for refused in (lambda: on.request(QUESTION, answer="1"), lambda: on.count(QUESTION, answer="1")):
        with pytest.raises(ConfigError, match="is to think before it"):
            refused()


def test_plain_text_has_no_thinking(qwen: Tokenizer) -> None:
    """A setting that nothing reads would look as if it had been followed."""
    for settings in ({"thinking": "off"}, {"template_args": {"enable_thinking": False}}):
        with pytest.raises(ConfigError, match="no chat template"):
            PromptForm(qwen, **settings)  # type: ignore[arg-type]
    assert PromptForm(qwen, thinking="on", chat_server=True).request(QUESTION).thinking == "expected"


def test_a_bos_that_begins_turns_stays(tmp_path: Path) -> None:
    """`never` took the mark of the first turn away, where that is the tokenizer's BOS."""
    build_tokenizer("qwen", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bos_token": "<|im_start|>"}))
    tokenizer = load_tokenizer(tmp_path)
    ids = [
        PromptForm(tokenizer, bos=bos, chat_template="qwen").encode("Hi").tolist()  # type: ignore[arg-type]
        for bos in ("never", "auto", "always")
    ]
    assert ids[0] == ids[1] == ids[2] and tokenizer.decode(ids[0]).startswith("<|im_start|>")


@pytest.mark.parametrize(
    ("server", "roles", "place"),
    [
        ({}, ["user", "assistant"], "assistant"),
        ({"chat_server": True}, ["user"], "end of prompt"),
        ({"chat_server": True, "continues": True}, ["user", "assistant"], "assistant"),
        ({"chat_server": True, "thinking": "on"}, ["user"], "none"),
    ],
)
def test_where_rulers_answers_begin(
    tokenizer: Tokenizer, server: dict[str, Any], roles: list[str], place: str
) -> None:
    """Most servers close an assistant's turn and begin another: the beginning of the answer was lost there."""
    form = PromptForm(tokenizer, chat_template="qwen", **server)
    settings = RulerConfig.from_dict({"lengths": [2000], "subtasks": ["niah_single_1"], "samples": 1})
    task = Ruler(settings, form, essay="A sentence. ")
    request = task.build(task.plan()[0]).request
    assert request.messages is not None and [message["role"] for message in request.messages] == roles
    beginning = "The special magic number for"
    assert (beginning in request.messages[-1]["content"][-120:]) == (place != "none")
    assert task.params()["answer_prefix"] == place
    assert request.prompt_ids is not None and 1800 < len(request.prompt_ids) + 128 <= 2000


class Thinking(Knowing):
    """Thinks of the right number, and says what it is told to."""

    answer = Answer("I do not know.", finish="stop", thoughts="48213?")

    def generate(self, requests: Any) -> Any:
        self.seen += requests
        yield from ((index, self.answer) for index in range(len(requests)))


def test_records_hold_thoughts_apart_and_count_what_was_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A cut answer is wrong, but it is not a wrong answer: both are to be seen beside the mean."""
    task = Passkey(
        PasskeyConfig.from_dict({"lengths": [900], "depths": [0.5], "samples": 2}),
        PromptForm(tokenizer, max_new_tokens=500),
    )
    model = Thinking(tokenizer)
    first = run_task(task, model, tokenizer=tokenizer, label="a", out=tmp_path / "a.jsonl")
    assert (first["mean"], first["no_answer"]) == (0.0, {})
    cost = len(tokenizer.encode("48213?"))
    assert first["thoughts"] == {"samples": 2, "tokens": 2 * cost, "most": cost}
    header, samples, _ = read_records(tmp_path / "a.jsonl")
    assert header["params"]["max_new_tokens"] == 500 == model.seen[0].max_new_tokens
    assert {(each["output"], each["thoughts"], each["finish"]) for each in samples} == {
        ("I do not know.", "48213?", "stop")
    }
    model.answer = Answer("", finish="length", thoughts="48213?")
    second = run_task(task, model, tokenizer=tokenizer, label="b", out=tmp_path / "b.jsonl")
    assert (second["mean"], second["scored"], second["no_answer"]) == (0.0, 2, {"cut while thinking": 2})
    assert {each["no_answer"] for each in read_records(tmp_path / "b.jsonl").samples} == {
        "cut while thinking"
    }
    # What is given on top of a stated length counts where the model's limit is looked at.
    limited = Thinking(tokenizer, max_length=600)
    with pytest.raises(ConfigError, match="1,368 tokens"):
        run_task(task, limited, tokenizer=tokenizer, label="c", out=tmp_path / "c.jsonl")
    assert np.all([len(each.prompt_ids) + 32 <= 900 for each in model.seen])
