"""Conversations as tools and data sets store them: one form of all, and nothing lost without a count."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longspan.data.chat import ChatFormat, MessagesError
from longspan.data.chat.chat_config import ChatConfig
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import Tokenizer
from tests.data.chat_tokenizers import chatty_tokenizer
from tests.data.malformed_chats import ARGUMENTS, CALL, DIALECTS, STEPS, XML, malformed

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
    "</think>\n{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chatty_tokenizer(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def chat(chatty: Tokenizer) -> ChatFormat:
    return ChatFormat(chatty, TEMPLATE)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_the_same_conversation(chat, dialect):
    """A call kept as a text, a result in the user's turn, a thought in a turn of its own were learnt as they stood."""
    wanted = chat.render(*DIALECTS["openai"])
    assert chat.render(*DIALECTS[dialect]) == wanted
    assert wanted.count("<think>look first</think>\n<call>") == wanted.count("12 C") == 1


def test_calls_in_xml(chat, chatty):
    """Values of an XML call are texts; what is broken, or goes on behind the call, stays what the turn says."""
    ask, said = {"role": "user", "content": "Where?"}, "I look.\n\n"
    for wrapped in (XML, f"<tool_call>\n{XML}\n</tool_call>"):
        answer = {"role": "assistant", "content": said + wrapped}
        call = json.dumps({"name": "look", "arguments": {**ARGUMENTS, "n": "3"}})
        assert f"I look.<call>{call}</call>" in chat.render([ask, answer])
        assert said + wrapped in ChatFormat(chatty, TEXTS).render([ask, answer])
    for content in (
        "<tool_call>{</tool_call>",
        '<tool_call>{"name": "a", "id": 1}</tool_call>',
        f"<tool_call>{json.dumps(CALL)}</tool_call> done",
        f"<tool_call>{json.dumps(CALL)}</tool_call> and <tool_call>{json.dumps(CALL)}</tool_call>",
        "<function=a><parameter=b>1</parameter><parameter=b>2</parameter></function>",
    ):
        assert content in chat.render([ask, {"role": "assistant", "content": content}])


def test_parallel_calls_and_ids(chat):
    """Results without ids belong to calls in their order; calls of one answer in turns of their own are one turn."""
    calls = [{"from": "function_call", "value": json.dumps({**CALL, "name": name})} for name in ("a", "b")]
    turns = [
        {"from": "human", "value": "x"},
        *calls,
        *({"from": "observation", "value": v} for v in ("1", "2")),
    ]
    stored = chat.read([*turns, *calls])
    made = stored.turns
    assert [turn["role"] for turn in made] == ["user", "assistant", "tool", "tool", "assistant"]
    ids = [call["id"] for call in made[1]["tool_calls"]]
    assert [turn["tool_call_id"] for turn in made[2:4]] == ids and len({*ids}) == 2
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    several = [{"from": "function_call", "value": json.dumps([CALL, CALL])}]
    assert len(chat.read([turns[0], *several]).turns[1]["tool_calls"]) == 2


def test_steps_of_an_agent(chat):
    """Trajectories name turns otherwise, and some keep what a tool said in the step that asked for it."""
    made = chat.read(STEPS).turns
    assert [(turn["role"], turn["content"]) for turn in made] == [
        ("system", "Be brief."),
        ("user", "Fix it."),
        ("assistant", "I look.\n\nls"),
        ("assistant", "It is there.\n\ncat a.py"),
        ("user", "x = 1"),
        ("assistant", "Done."),
    ]


def test_what_is_lost_is_counted(chatty):
    """Encrypted thoughts, images and a second system turn vanished, or took their record with them."""
    blocks = [{"type": "image", "source": {}}, {"type": "text", "text": "What?"}]
    turns = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": blocks},
        {
            "role": "assistant",
            "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "A cat."}],
        },
    ]
    with pytest.raises(MessagesError, match="part of type image"):
        ChatFormat(chatty, TEMPLATE).encode(turns)
    chat = ChatFormat(chatty, TEMPLATE, config=ChatConfig(images="replace"))
    assert "a\n\nb" in chat.render(turns) and "[image]\nWhat?" in chat.render(turns)
    assert chat.encode_record(turns).notes == {
        "conversations whose first system turns are joined to one": 1,
        "images and the like replaced by a word": 1,
        "thoughts that the record keeps encrypted or not at all": 1,
    }


ASK = {"role": "user", "content": "Where?"}
SAID = {"role": "assistant", "content": "There."}
TEXT_PART = {"type": "text", "text": "12 C"}
EMPTY_PART = {"type": "text", "text": None, "image": None}


def called(result: Any = "12 C", **function: Any) -> list[dict[str, Any]]:
    """Return a conversation with one call and its result."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", **function}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return [ASK, answer, {"role": "tool", "tool_call_id": "c1", "content": result}, SAID]


@pytest.mark.parametrize(
    ("function", "written"),
    [
        ({"arguments": ""}, "{}"),
        ({"arguments": None}, "{}"),
        ({}, "{}"),
        ({"parameters": ARGUMENTS}, json.dumps(ARGUMENTS)),
        ({"arguments": json.dumps(json.dumps(ARGUMENTS))}, json.dumps(ARGUMENTS)),
    ],
)
def test_arguments_of_a_call(chat, function, written):
    """A call without arguments was learnt as broken JSON, or ended in a template's own error; JSON in JSON as text."""
    encoded = chat.encode_record(called(**function))
    assert f'"arguments": {written}}}</call>' in chat.render(called(**function)) and not encoded.notes


def test_calls_that_are_a_text_are_read_as_others(chat):
    """A column of JSON: calls without arguments were learnt as broken JSON, results did not say whose they are."""
    for function in ({"arguments": ""}, {"parameters": ARGUMENTS}):
        turns = called(**function)
        del turns[1]["tool_calls"][0]["id"], turns[2]["tool_call_id"]
        wanted = chat.read(turns)
        turns[1] = {**turns[1], "tool_calls": json.dumps(turns[1]["tool_calls"])}
        assert (
            chat.read(turns) == wanted
            and wanted.turns[2]["tool_call_id"] == wanted.turns[1]["tool_calls"][0]["id"]
        )
    assert chat.read([ASK, {**SAID, "tool_calls": "null"}]).turns == [ASK, SAID]


@pytest.mark.parametrize("arguments", ["{'at': 'a'}", "[1, 2]", '"a"', [1], 3])
def test_arguments_that_are_no_object_are_counted(chat, arguments):
    """They are learnt as the model is said to have written them, which nobody was told."""
    assert chat.read(called(arguments=arguments)).notes == {"calls whose arguments are no JSON object": 1}


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ([{"at": 12}, {"at": 13}], '[{"at": 12}, {"at": 13}]'),
        (["a", None], '["a", null]'),
        ([{"type": "Feature", "id": 1}], '[{"type": "Feature", "id": 1}]'),
        ({"at": 12}, '{"at": 12}'),
        (0, "0"),
        ([TEXT_PART, EMPTY_PART], "12 C"),
        ([{"text": "12 C"}], "12 C"),
        (None, ""),
    ],
)
def test_results_of_tools_are_any_json(chat, result, text):
    """Records whose tools return lists were left out as if the list were a content in parts."""
    for turns in (
        called(result),
        [*called()[:2], {"type": "function_call_output", "call_id": "c1", "output": result}, SAID],
        [*called()[:2], {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": result}]},
         SAID],
    ):  # fmt: skip
        assert f"<|im_start|>tool\n{text}<|im_end|>" in chat.render(turns)


def test_channels_in_parts(chat):
    """Thoughts and calls of gpt-oss's own library are in parts: their JSON was learnt as what the model thought."""

    def say(text: str, **more: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": [{"type": "text", "text": text}], **more}

    turns = [
        ASK,
        {**say("look first", channel="analysis"), "content": [{"type": "text", "text": "look first"}, EMPTY_PART]},
        say("I look.", channel="commentary"),
        say(json.dumps(ARGUMENTS), channel="commentary", recipient="functions.look"),
        {"role": "tool", "name": "functions.look", "channel": "commentary", "recipient": "assistant", "content": "1"},
        say("There.", channel="final"),
    ]  # fmt: skip
    text = chat.render(turns)
    assert f"<think>look first</think>\nI look.<call>{json.dumps(CALL)}" in text
    assert not any("channel" in name or "recipient" in name for name in chat.encode_record(turns).notes)
    turns[1]["weight"] = 0
    with pytest.raises(MessagesError, match="one is to be learnt and another not"):
        chat.read(turns)


def test_what_else_is_odd_but_legal(chat):
    """A refusal was learnt as an empty answer, Gemini's parts as nothing; what is put in another order was not said."""
    assert "I cannot.<|im_end|>" in chat.render(
        [ASK, {"role": "assistant", "content": None, "refusal": "I cannot."}]
    )
    refused = {"type": "refusal", "text": None, "refusal": "I cannot either."}
    assert "I cannot either.<|im_end|>" in chat.render([ASK, {"role": "assistant", "content": [refused]}])
    with pytest.raises(MessagesError, match="no content, but a `parts`"):
        chat.read([{"role": "user", "parts": [{"text": "Where?"}]}, SAID])
    rules = [
        {"role": role, "content": [{"type": "input_text", "text": role}]} for role in ("system", "developer")
    ]
    assert "system\n\ndeveloper" in chat.render([*rules, ASK, SAID])
    twice = {"role": "assistant", "content": "<think>so</think>There.", "reasoning_content": "so"}
    assert chat.render([ASK, twice]).count("so<") == 1
    other = {**twice, "reasoning_content": "or so"}
    broken = {"role": "assistant", "content": "<tool_call>{</tool_call>"}
    blocks = [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}]
    failed = {"type": "tool_result", "tool_use_id": "c1", "is_error": True, "content": "no"}
    for turns, note in (
        ([ASK, other], "thoughts in their text and others beside it"),
        ([ASK, broken], "stay text"),
        ([ASK, {"role": "assistant", "content": blocks}], "put in this order"),
        ([*called(arguments={})[:2], {"role": "user", "content": [failed]}, SAID], "`is_error`"),
    ):
        assert any(note in name for name in chat.encode_record(turns).notes), note


def crash_test(chats: list[ChatFormat], numbers: range) -> int:
    left_out = 0
    for number in numbers:
        turns, values = malformed(number)
        for chat in chats:
            try:
                encoded = chat.encode_record(turns, values)
                assert len(encoded.ids) == len(encoded.mask)
            except MessagesError:
                left_out += 1
    return left_out


def test_malformed_records_of_every_dialect(chat, chatty):
    """A traceback names no record."""
    left_out = crash_test([chat, ChatFormat(chatty, TEXTS)], range(250))
    assert 50 < left_out < 450


@pytest.mark.slow
def test_ten_thousand_malformed_records(chat, chatty, tmp_path):
    """None crashes; those of a file are in the store or counted, none is neither."""
    records = [dict(zip(("messages", "more"), malformed(number))) for number in range(10_000)]
    lines = [json.dumps({"messages": each["messages"], **each["more"]}) for each in records]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines))
    store = tokenize_corpus([path], chatty, tmp_path / "store", chat=chat)
    counts = store.manifest.counts
    kinds = ("broken_records", "missing_fields", "wrong_types", "invalid_text", "empty_documents")
    assert len(store) + sum(counts.get(kind, 0) for kind in kinds) == 10_000
