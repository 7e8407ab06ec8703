"""Conversations longer than there is room for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.chat import ChatFormat, MessagesError
from longspan.data.chat.chat_config import ChatConfig
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import Tokenizer
from tests.data.chat_tokenizers import chatty_tokenizer

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chatty_tokenizer(tmp_path_factory.mktemp("long"))


def chat_of(shape: list[int], *, system: bool = True) -> list[dict[str, Any]]:
    """Return a conversation of so many exchanges, each of so many steps."""
    turns = [{"role": "system", "content": "S"}] if system else []
    for number, steps in enumerate(shape):
        turns.append({"role": "user", "content": f"Q{number}"})
        for step in range(steps):
            turns.append({"role": "assistant", "content": f"A{number}.{step}"})
            if step + 1 < steps:
                turns.append({"role": "tool", "content": f"T{number}.{step}"})
    return turns


def texts(tokenizer: Tokenizer, turns: list[dict[str, Any]], **config: Any) -> list[str]:
    chat = ChatFormat(tokenizer, PLAIN, config=ChatConfig(**config))
    return [tokenizer.decode(each.ids) for each in chat.encode_all(turns)]


def said(text: str) -> list[str]:
    return [turn.partition("\n")[2].removesuffix("<|im_end|>\n") for turn in text.split("<|im_start|>")[1:]]


def test_the_middle_is_cut_at_turns(chatty):
    """A row that ends in the middle of a conversation learns answers to what stands in no row."""
    turns = chat_of([1] * 7)
    chat = ChatFormat(chatty, PLAIN)
    room = len(chat.encode(chat_of([1] * 4)).ids)
    (text,) = texts(chatty, turns, max_tokens=room)
    assert said(text) == ["S", "Q0", "A0.0", "Q1", "A1.0", "Q5", "A5.0", "Q6", "A6.0"]
    (encoded,) = ChatFormat(chatty, PLAIN, config=ChatConfig(max_tokens=room)).encode_all(turns)
    assert encoded.notes["turns cut out of them"] == 6 and encoded.notes["tokens cut out of them"] > 0
    # One question, and an agent of many steps.
    (text,) = texts(chatty, chat_of([9]), max_tokens=room)
    left = said(text)
    assert left[:2] == ["S", "Q0"] and left[-1] == "A0.8" and left[2] == "A0.0" and len(left) > 5
    with pytest.raises(MessagesError, match="also without its middle"):
        texts(chatty, turns, max_tokens=20)


def test_split_and_drop(chatty):
    """What is split keeps the system's turn and whole exchanges; what is dropped is a reason with a length."""
    chat = ChatFormat(chatty, PLAIN)
    room = len(chat.encode(chat_of([1, 1])).ids)
    found = [
        said(text) for text in texts(chatty, chat_of([1, 1, 1, 4, 1]), max_tokens=room, too_long="split")
    ]
    assert found[:2] == [["S", "Q0", "A0.0", "Q1", "A1.0"], ["S", "Q2", "A2.0"]]
    assert found[2][:2] == ["S", "Q3"] and found[2][-1] == "A3.3" and found[3] == ["S", "Q4", "A4.0"]
    with pytest.raises(MessagesError, match="longer than max_tokens"):
        texts(chatty, chat_of([1, 1, 1]), max_tokens=room, too_long="drop")
    assert len(texts(chatty, chat_of([1, 1]), max_tokens=room, too_long="drop")) == 1


def test_results_of_tools_are_shortened(chatty):
    """One result of a tool can be longer than all the rest."""
    turns = [*chat_of([1])[:2], *chat_of([2])[2:]]
    turns[3] = {"role": "tool", "content": "a" * 50 + "b" * 50}
    chat = ChatFormat(chatty, PLAIN, config=ChatConfig(truncate_tool_results=10))
    encoded = chat.encode_record(turns)
    result = said(chatty.decode(encoded.ids))[3]
    assert result.startswith("aaaaa\n[... ") and result.endswith(" ...]\nbbbbb")
    assert encoded.notes["results of tools that were shortened"] == 1
    assert f"[... {encoded.notes['tokens left out of them']} tokens" in result
    assert chat.encode_record(chat_of([2])).notes == {}


def test_several_documents_of_one_record(chatty, tmp_path):
    """Parts under one key would be told from one another by nobody; what became of a record is counted."""
    path = tmp_path / "chats.jsonl"
    path.write_text(
        json.dumps({"messages": chat_of([1] * 6)}) + "\n" + json.dumps({"messages": chat_of([1])})
    )
    chat = ChatFormat(chatty, PLAIN, config=ChatConfig(max_tokens=70, too_long="split"))
    store = tokenize_corpus([path], chatty, tmp_path / "store", chat=chat)
    assert len(store) == 3 and len({*store.lengths.key.tolist()}) == len(store)
    assert store.manifest.counts["notes"]["conversations that these became"] == len(store) - 1
    assert all(np.asarray(store.mask(number)).any() for number in range(len(store)))


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    room=st.integers(10, 200),
    way=st.sampled_from(["cut", "split"]),
    system=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_never_an_answer_without_its_question(chatty, shape, room, way, system):
    """Whatever is cut: what is left is in order, fits, and every answer stands behind its own question."""
    turns = chat_of(shape, system=system)
    try:
        found = texts(chatty, turns, max_tokens=room, too_long=way)
    except MessagesError:
        return
    every = [turn["content"] for turn in turns]
    for text in found:
        left = said(text)
        assert len(chatty.encode(text)) >= 1 and [each for each in every if each in left] == left
        assert (left[0] == "S") == system
        for each in left:
            if each[0] in "AT":
                assert f"Q{each[1]}" in left
            if each[0] == "T":
                assert f"A{each[1:]}" in left
    if way == "split":
        assert [each for text in found for each in said(text) if each[0] == "Q"] == [
            f"Q{n}" for n in range(len(shape))
        ]
