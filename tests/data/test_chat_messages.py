"""Conversations as data sets write them, brought to one form."""

from __future__ import annotations

import pytest

from longspan.data.chat import MessagesError, as_messages
from longspan.data.readers import read_documents

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_both_spellings_are_one():
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": 1}]
    assert as_messages(shared) == [TURNS[0], {**TURNS[1], "weight": 1}]
    assert as_messages(TURNS) == TURNS


def test_first_system_turn_null_content_and_repeated_roles_are_kept():
    turns = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "a"},
        {"from": "human", "value": None},
    ]
    assert [turn["role"] for turn in as_messages(turns)] == ["system", "user", "user"]
    assert as_messages(turns)[2]["content"] == ""


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "not a conversation"),
        ("user: Hi", "not a conversation"),
        (None, "not a conversation"),
        (["Hi"], "not an object"),
        ([{"text": "Hi"}], "who speaks"),
        ([{"role": "narrator", "content": "Hi"}], "unknown role"),
        ([{"role": 3, "content": "Hi"}], "unknown role"),
        ([{"role": ["user"], "content": "Hi"}], "unknown role"),
        ([{"role": "user", "content": ["Hi"]}], "not text"),
        ([{"role": "user", "content": "Hi"}, {"role": "system", "content": "S"}], "system turn"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "call without a name"),
        ([{"role": "user", "content": "\ud83d"}], "surrogate"),
        ([{"role": "user", "content": "\U000f00031\U000f0004"}], "private-use"),
    ],
)
def test_malformed_turns_are_named(turns, message):
    with pytest.raises(MessagesError, match=message):
        as_messages(turns)


def test_readers_carry_conversations(write_jsonl):
    """Two conversations that differ in one word are two documents; an empty one is none."""
    other = [TURNS[0], {"role": "assistant", "content": "Hello!"}]
    path = write_jsonl("talk.jsonl", {"messages": TURNS}, {"messages": []}, {"messages": other})
    documents = list(read_documents([str(path)], messages_field="messages"))
    assert [as_messages(document.messages) for document in documents] == [TURNS, other]
    assert documents[0].text != documents[1].text
