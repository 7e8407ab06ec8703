"""Thoughts are never the answer: where they end, what stop texts do in them, what servers say of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.api import Client, Endpoint, Limits
from longspan.infer.answer_stream import AnswerStream
from longspan.infer.plain import finished
from longspan.infer.remote import RemoteAnswerer
from longspan.infer.requests import Request, no_answer
from longspan.infer.thinking import MARKS, answer_start, closing_of, split_thoughts
from tests.api.fake_server import chat, chunk, events, reply_json, serving
from tests.api.made_clock import MadeClock
from tests.infer.engines import Bytes, request

NUMBER = "Is it 11111? No."


@pytest.mark.parametrize("marks", MARKS)
def test_the_answer_stands_behind_the_last_closing_mark(marks: Any) -> None:
    """A number in the thoughts scored as an answer, by each of the marks that published models write."""
    whole = f"\n{marks.opening}\n{NUMBER}\n{marks.closing}\n\n48213"
    assert split_thoughts(whole) == ("48213", NUMBER, True)
    assert split_thoughts(whole.replace(marks.opening, ""), opened=True) == ("48213", NUMBER, True)
    # A server's template opened the block, and nobody said so.
    assert split_thoughts(whole.replace(marks.opening, "")).answer == "48213"
    # Some models write them in capitals.
    assert split_thoughts(f"{marks.opening.upper()}{NUMBER}{marks.closing.upper()}48213").thoughts == NUMBER
    again = f"{whole}{marks.opening}{NUMBER}{marks.closing} 7"
    assert split_thoughts(again).answer == "7"
    assert split_thoughts(f"{marks.opening}{NUMBER}") == ("", NUMBER, False)
    assert closing_of(f"user: hi\nassistant: {marks.opening}\n") == marks.closing
    assert closing_of(f"assistant: {marks.opening}\n\n{marks.closing}\n\n") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>7?</think>\n<answer>\n8\n</answer>", "8"),
        ("<think>7?</think>\n\n<response>\n8\n", "8"),
        (
            "<|begin_of_thought|>\n7?\n<|end_of_thought|>\n\n<|begin_of_solution|>\n8\n<|end_of_solution|>",
            "8",
        ),
        ("<|START_THINKING|>7?<|END_THINKING|><|START_RESPONSE|>8<|END_RESPONSE|>", "8"),
        (
            "<|channel|>analysis<|message|>7?<|end|><|start|>assistant<|channel|>final<|message|>8<|return|>",
            "8",
        ),
        ("Here are my reasoning steps:\n7?\n[BEGIN FINAL RESPONSE]\n8\n[END FINAL RESPONSE]", "8"),
        ("Here is my thought process: 7?\nHere is my response: 8", "8"),
        ("<answer>8</answer>", "<answer>8</answer>"),
        ("<THINK>7?</THINK><answer>8</answer><|im_end|>", "8"),
        ("8<|im_end|>", "8"),
        ("8 <|eot_id|>\n", "8"),
        ("8<end_of_turn>\n<eos>", "8"),
        ("<|im_end|>", ""),
        ("<s>9</s>", "<s>9</s>"),
        ("<|im_end|> ends a turn ", "<|im_end|> ends a turn "),
        ("I say: Here is my response: 8", "I say: Here is my response: 8"),
    ],
)
def test_marks_around_an_answer_are_no_part_of_it(text: str, answer: str) -> None:
    """Guards against `<answer>` scored as words of the answer, or as its first line; without thoughts all stays."""
    spoken = split_thoughts(text)
    assert spoken.answer == answer
    assert ("7" in spoken.thoughts) == ("7" in text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Let me see.\n<think>I saw 7 and", "Let me see.\n"),
        ("<think>a</think>I check.<think>7 and", "I check."),
        ("analysisThe user wants 7. We need", ""),
    ],
)
def test_thoughts_that_begin_after_words_and_have_no_end_are_no_answer(text: str, answer: str) -> None:
    """Guards against a number in cut thoughts scored as the answer because a word stands before them."""
    spoken = split_thoughts(text)
    assert spoken.answer == answer
    assert "7" in spoken.thoughts


def test_words_that_name_a_channel_open_nothing() -> None:
    """Guards against an answer about an analysis, or code, taken for thoughts."""
    for text in ("analysis of 7 samples", "analysisResult = 7", "Analysis: 7"):
        assert split_thoughts(text) == (text, "", True)


def test_channels_and_their_bare_names() -> None:
    """gpt-oss writes its answer into a channel; servers that drop special tokens leave the names alone."""
    begin = "<|channel|>analysis<|message|>7?<|end|><|start|>assistant"
    assert split_thoughts(f"{begin}<|channel|>final<|message|>8") == ("8", "7?", True)
    assert split_thoughts("<|channel|>final<|message|>8").answer == "8"
    assert split_thoughts("analysis7?assistantfinal8") == ("8", "7?", True)
    for ordinary in ("analysis of the text", "The assistantfinal is 8", "a < b", "8\n<think>", "", " \n"):
        assert split_thoughts(ordinary) == (ordinary, "", True)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("<think>/ 8\n"), max_size=60), opened=st.booleans())
def test_nothing_is_lost_or_made_up(text: str, opened: bool) -> None:
    """Whatever a model writes, the answer is its end, and holds no whole block."""
    spoken = split_thoughts(text, opened=opened)
    assert text.endswith(spoken.answer) and "</think>" not in spoken.answer
    assert spoken.answered == (answer_start(text, opened=opened) is not None)
    assert spoken.thoughts in text


def write(text: str, **fields: Any) -> tuple[str, AnswerStream]:
    """Push the bytes of a text until the answer ends."""
    asked = request([1], **{"max_new_tokens": 400, "stop": ("\n",), **fields})
    stream = AnswerStream(asked, Bytes())  # type: ignore[arg-type]
    for token in text.encode():
        if stream.push(token):
            break
    return finished(asked, np.array(stream.ids), Bytes(), seconds=0.0).text, stream  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "thinking"),
    [
        ("<think>\n11111?\n</think>\n\n48213\nmore", "unknown"),
        ("\n<think>\n11111?\n</think>\n\n48213\nmore", "expected"),
        ("11111?\n22222?\n</think>\n48213\nmore", "opened"),
        ("<think>a\n</think><think>b\n</think>48213\nmore", "unknown"),
        ("<think>" + "a long thought\n" * 20 + "</think>48213\nmore", "unknown"),
        ("48213\nmore", "expected"),
    ],
)
def test_stop_texts_do_not_act_inside_thoughts(text: str, thinking: str) -> None:
    """An answer that ends at its first line ended in the first line of the thoughts."""
    answer, stream = write(text, thinking=thinking)
    assert answer == "48213" and stream.finish == "stop"
    assert bytes(stream.ids).decode() == text.removesuffix("more")


def test_without_thoughts_a_stop_text_acts_at_once() -> None:
    """A base model that begins with a new line is not waited for."""
    assert write("\n48213")[0] == "" and bytes(write("\n48213")[1].ids) == b"\n"


def test_a_cut_answer_says_why_it_is_empty() -> None:
    """An answer that never came was a wrong answer like any other."""
    asked = request([1], max_new_tokens=9)
    said = {"<think>ab": "cut while thinking", "        \n": "cut before an answer", "8 and 9  ": None}
    for text, reason in said.items():
        assert no_answer(finished(asked, np.array([*text.encode()]), Bytes(), seconds=0.0)) == reason  # type: ignore[arg-type]
    stopped = request([1], stop_ids=(0,))
    answer = finished(stopped, np.array([*b"<think>a</think>", 0]), Bytes(), seconds=0.0)  # type: ignore[arg-type]
    assert (answer.text, answer.thoughts, no_answer(answer)) == ("", "a", "thoughts without an answer")


def reply(content: Any, *, finish: str = "stop", **fields: Any) -> Any:
    message = {"role": "assistant", "content": content, **fields}
    return reply_json({"choices": [{"index": 0, "message": message, "finish_reason": finish}]})


def ask(server_reply: Any, *, kind: str = "chat", **fields: Any) -> tuple[Any, Any]:
    """Return what a scripted server's answer is taken for, and the body it was asked with."""
    with serving([server_reply]) as server:
        endpoint = Endpoint(kind=kind, model="m", base_url=server.url)  # type: ignore[arg-type]
        answerer = RemoteAnswerer(Client(endpoint, clock=MadeClock(), limits=Limits(concurrency=1)))
        ((_, answer),) = answerer.generate([Request("q", **fields)])
        answerer.close()
    return answer, server.asked[0].body


@pytest.mark.parametrize(
    ("server_reply", "answer", "thoughts", "reason"),
    [
        (reply("8", reasoning_content="7?"), "8", "7?", None),
        (reply("8", reasoning="7?"), "8", "7?", None),
        (reply("<think>\n7?</think>\n8"), "8", "7?", None),
        (reply("7?</think>8", reasoning={"effort": "low"}), "8", "7?", None),
        (reply(None, finish="length", reasoning_content="7?"), "", "7?", "cut while thinking"),
        (reply("<think>7?", finish="length"), "", "7?", "cut while thinking"),
        (reply(None, finish="length"), "", "", "cut before an answer"),
        (reply("", reasoning="7?"), "", "7?", "thoughts without an answer"),
        (reply(None, reasoning="7?"), "", "7?", "thoughts without an answer"),
        (reply(""), "", "", "empty answer"),
        (
            reply([{"type": "thinking", "thinking": [{"text": "7?"}]}, {"type": "text", "text": "8"}]),
            "8",
            "7?",
            None,
        ),
    ],
)
def test_servers_give_thoughts_in_many_ways(
    server_reply: Any, answer: str, thoughts: str, reason: str | None
) -> None:
    """Apart by either name, in the text, as parts, or not at all when they were cut."""
    found, _ = ask(server_reply)
    assert (found.text, found.thoughts, no_answer(found)) == (answer, thoughts, reason)


def test_a_text_without_marks_is_thought_where_the_model_thinks_and_was_cut() -> None:
    """The server's template opened the block, so the text alone does not show that it never ended."""
    found, _ = ask(chat("Is it 7? Or per", finish="length"), thinking="opened")
    assert (found.text, no_answer(found)) == ("", "cut while thinking")
    found, _ = ask(chat("8", finish="stop"), thinking="opened")  # parted by the server, thoughts kept back
    assert found.text == "8"


@pytest.mark.parametrize(
    ("kind", "thinking", "sent"),
    [
        ("chat", "unknown", False),
        ("chat", "expected", False),
        ("chat", "none", True),
        ("completions", "unknown", True),
        ("completions", "opened", False),
    ],
)
def test_stop_texts_are_kept_from_servers_whose_model_may_think(kind: str, thinking: str, sent: bool) -> None:
    """A server looks for them in all that is written, and ended the thoughts at their first line."""
    text = reply_json({"choices": [{"text": "8\n9", "finish_reason": "stop"}]})
    if thinking == "opened":
        text = reply_json({"choices": [{"text": "7?\n</think>8\n9", "finish_reason": "stop"}]})
    found, body = ask(chat("8\n9") if kind == "chat" else text, kind=kind, stop=("\n",), thinking=thinking)
    assert (found.text, found.finish, "stop" in body) == ("8", "stop", sent)


def test_streams_keep_thoughts_apart() -> None:
    """What is shown as it comes is the answer, and the whole is parted as an answer that came at once."""
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": "7?"}, "finish_reason": None}]}
    with serving([events(thought, chunk("8", "stop"))]) as server:
        endpoint = Endpoint(kind="chat", model="m", base_url=server.url)
        answerer = RemoteAnswerer(Client(endpoint, clock=MadeClock()))
        pieces: list[str] = []
        answer = answerer.generate_stream(Request("q"), pieces.append)
        answerer.close()
    assert (answer.text, answer.thoughts, pieces) == ("8", "7?", ["8"])
