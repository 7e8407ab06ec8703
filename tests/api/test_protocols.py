"""Bodies and answers as OpenAI and Anthropic write them, whole and as streams."""

from __future__ import annotations

import json

import pytest

from longspan.api import ChatRequest, Client, Endpoint, SpendingLimits, Usage
from longspan.api.events import EventDecoder
from longspan.core.errors import ArgumentError, RunError, UserError
from tests.api.fake_server import chat, chunk, error, events, reply_json, serving
from tests.api.made_clock import MadeClock

SYSTEM = {"role": "system", "content": "Be short."}
USER = {"role": "user", "content": "2, 4, 6,"}


def client_of(server, kind="chat", **settings):
    return Client(Endpoint(model="m", kind=kind, base_url=server.url), clock=MadeClock(), **settings)


def anthropic_answer(*texts, stop="end_turn", **usage):
    blocks = [{"type": "thinking", "thinking": "..."}] + [{"type": "text", "text": text} for text in texts]
    counts = {"input_tokens": 7, "output_tokens": 3} | usage
    return reply_json({"type": "message", "content": blocks, "stop_reason": stop, "usage": counts})


def test_chat_body_and_answer():
    with serving([chat("8", finish="length", usage=(11, 1))]) as server, client_of(server) as client:
        request = ChatRequest(
            (SYSTEM, USER), max_tokens=5, stop=("\n", "a", "b", "c", "d"), seed=3, top_p=0.5
        )
        result = client.ask(request)
    assert server.asked[0].path == "/v1/chat/completions"
    assert server.asked[0].body == {
        "model": "m",
        "messages": [SYSTEM, USER],
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 3,
        "stop": ["\n", "a", "b", "c"],  # servers refuse more than four
    }
    assert (result.text, result.finish, result.usage) == ("8", "length", Usage(11, 1))


def test_completions_body_and_answer():
    answer = {"choices": [{"text": " 8", "finish_reason": "stop", "logprobs": None}], "usage": None}
    with serving([reply_json(answer)]) as server, client_of(server, "completions") as client:
        result = client.ask(ChatRequest(prompt="2, 4, 6,", temperature=None))
        with pytest.raises(ArgumentError, match="continues a text"):
            client.ask(ChatRequest((USER,)))
    assert server.asked[0].path == "/v1/completions"
    assert server.asked[0].body == {"model": "m", "prompt": "2, 4, 6,", "max_tokens": 256}
    assert (result.text, result.finish) == (" 8", "stop")


def test_anthropic_body_and_answer():
    """The system prompt stands apart; cached tokens are tokens; thinking is no answer."""
    reply = anthropic_answer("8", "!", cache_read_input_tokens=100, cache_creation_input_tokens=None)
    with serving([reply]) as server, client_of(server, "anthropic") as client:
        result = client.ask(ChatRequest((SYSTEM, USER), max_tokens=5, stop=("\n", "END")))
    asked = server.asked[0]
    assert asked.path == "/v1/messages" and asked.headers["anthropic-version"] == "2023-06-01"
    assert asked.body == {
        "model": "m",
        "system": "Be short.",
        "messages": [USER],
        "max_tokens": 5,
        "temperature": 0.0,
        "stop_sequences": ["END"],  # the server refuses white space alone
    }
    assert (result.text, result.finish, result.usage) == ("8!", "stop", Usage(107, 3))
    assert result.thoughts == "..."


@pytest.mark.parametrize(
    ("stop", "texts", "expected"),
    [
        ("max_tokens", ["a"], ("a", "length", None)),
        ("model_context_window_exceeded", ["a"], ("a", "length", None)),
        ("stop_sequence", ["a"], ("a", "stop", None)),
        ("refusal", ["a"], ("", None, "refused")),
        ("end_turn", [], ("", "stop", None)),  # it thought, and said nothing
    ],
)
def test_anthropic_reasons(stop, texts, expected):
    with serving([anthropic_answer(*texts, stop=stop)]) as server, client_of(server, "anthropic") as client:
        result = client.ask(ChatRequest(prompt="q"))
    assert (result.text, result.finish, result.error) == expected
    assert result.usage == Usage(7, 3), "a refusal is paid for too"


@pytest.mark.parametrize(
    ("reply", "attempts"),
    [
        (reply_json({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, 529), 2),
        (reply_json({"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}}, 429), 2),
        (reply_json({"type": "error", "error": {"type": "api_error", "message": "oops"}}), 2),
        (reply_json({"type": "message"}), 2),
        (reply_json({"content": ["text"]}), 2),
    ],
)
def test_anthropic_failures_are_asked_again(reply, attempts):
    with serving([reply, anthropic_answer("8")]) as server, client_of(server, "anthropic") as client:
        result = client.ask(ChatRequest(prompt="q"))
    assert (result.text, result.attempts) == ("8", attempts)


def test_anthropic_without_credit_is_a_message():
    said = "Your credit balance is too low to access the API."
    reply = reply_json({"type": "error", "error": {"type": "invalid_request_error", "message": said}}, 400)
    with (
        serving([reply]) as server,
        client_of(server, "anthropic") as client,
        pytest.raises(UserError, match="credit"),
    ):
        client.ask(ChatRequest(prompt="q"))


def test_content_may_be_a_list_of_parts():
    content = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "8"}]
    reply = reply_json({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})
    with serving([reply]) as server, client_of(server) as client:
        assert client.ask(ChatRequest(prompt="q")).text == "8"


def test_all_tokens_spent_on_thinking_is_an_answer_cut_short():
    with serving([chat(None, finish="length")]) as server, client_of(server) as client:
        result = client.ask(ChatRequest(prompt="q"))
    assert (result.text, result.finish, result.error) == ("", "length", None)


CHAT_STREAM = [
    chunk(""),
    chunk("2,\u2028"),
    chunk(" 4"),
    chunk(finish="stop"),
    chunk(usage={"prompt_tokens": 3, "completion_tokens": 2}),
]
TEXT_STREAM = [
    {"choices": [{"text": "2,\u2028", "finish_reason": None}]},
    {"choices": [{"text": " 4", "finish_reason": None}]},
    {
        "choices": [{"text": "", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    },
]
ANTHROPIC_STREAM = [
    {"type": "message_start", "message": {"usage": {"input_tokens": 3, "output_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "ping"},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "2,\u2028"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " 4"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 2}},
    {"type": "message_stop"},
]
STREAMS = [
    ("chat", events(*CHAT_STREAM), "stop"),
    ("chat", events(*CHAT_STREAM, done=False), "stop"),
    ("completions", events(*TEXT_STREAM, done=False), "length"),
    ("anthropic", events(*ANTHROPIC_STREAM, names=True, done=False), "length"),
]


@pytest.mark.parametrize(("kind", "reply", "finish"), STREAMS)
def test_streams_arrive_piece_by_piece(kind, reply, finish):
    """U+2028 stands in the JSON as it is: it is no line end."""
    with serving([reply._replace(body=reply.body.replace(rb"\u2028", "\u2028".encode()))]) as server:
        with client_of(server, kind) as client:
            pieces = []
            result = client.stream(ChatRequest(prompt="q"), pieces.append)
        assert pieces == ["2,\u2028", " 4"]
        assert (result.text, result.finish, result.usage) == ("2,\u2028 4", finish, Usage(3, 2))
        assert server.asked[0].body["stream"] is True


@pytest.mark.parametrize(("kind", "reply", "finish"), STREAMS)
@pytest.mark.parametrize("closed_well", [True, False])
def test_a_stream_that_breaks_off_is_not_an_answer(kind, reply, finish, closed_well):
    """The text that had come is not taken for the whole, whether the connection broke or was closed politely."""
    end = reply.body.index(b" 4")
    end = reply.body.index(b"\n\n", end) + 2
    broken = (
        reply._replace(body=reply.body[:end]) if closed_well else reply._replace(cut=len(reply.body) - end)
    )
    with serving([broken]) as server, client_of(server, kind) as client:
        pieces = []
        result = client.stream(ChatRequest(prompt="q"), pieces.append)
        assert client.report().reasons == {"failed": 1}
    assert "".join(pieces) == result.text == "2,\u2028 4"
    assert result.error == "failed" and "truncated" in result.detail
    assert len(server.asked) == 1, "text that was shown cannot be taken back"


def test_a_stream_that_never_began_is_asked_again(tmp_path):
    replies = [
        error(503),
        events(done=False),
        events("{broken", done=False),
        events({"error": {"message": "x"}}),
        events(*CHAT_STREAM),
    ]
    with serving(replies) as server, client_of(server, cache=tmp_path / "answers.sqlite") as client:
        pieces = []
        result = client.stream(ChatRequest(prompt="q"), pieces.append)
        assert (result.text, result.attempts) == ("2,\u2028 4", 5)
        assert client.report().retries == {"HTTP 503": 1, "truncated": 1, "malformed": 1, "HTTP 500": 1}
        again = client.stream(ChatRequest(prompt="q"), pieces.append)
    assert again.cached and pieces[-1] == again.text == result.text


def test_a_server_that_cannot_count_in_streams_is_asked_without():
    replies = [error(422, "Unexpected fields: stream_options"), events(*CHAT_STREAM)]
    with serving(replies) as server, client_of(server) as client:
        for _ in range(2):
            client.stream(ChatRequest(prompt="q"), lambda piece: None)
    assert ["stream_options" in asked.body for asked in server.asked] == [True, False, False]


def test_a_streamed_refusal_and_a_stream_without_anything():
    refusal = {"choices": [{"delta": {"refusal": "No."}, "finish_reason": "stop"}]}
    with serving([events(refusal), events()]) as server, client_of(server) as client:
        assert client.stream(ChatRequest(prompt="q"), print).error == "refused"
        assert client.stream(ChatRequest(prompt="r"), print).error == "no answer"


def test_errors_of_a_stream_are_raised():
    with serving([error(401)]) as server, client_of(server) as client, pytest.raises(UserError, match="key"):
        client.stream(ChatRequest(prompt="q"), print)
    with (
        serving([]) as server,
        client_of(server, budget=SpendingLimits(max_requests=0)) as client,
        pytest.raises(RunError, match="max_requests"),
    ):
        client.stream(ChatRequest(prompt="q"), print)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_bytes_arrive(size):
    """A chunk may end within a character, between carriage return and line feed, or within a field's name."""
    text = (
        'data: {"a":\r\ndata: "\u00e9\u2028"}\r\n\r\n: comment\nevent: odd\rdata:x\r\rid: 7\n\ndata: torn\n'
    )
    data = text.encode()
    decoder = EventDecoder()
    found = [
        event for start in range(0, len(data), size) for event in decoder.feed(data[start : start + size])
    ]
    assert found == ['{"a":\n"\u00e9\u2028"}', "x"]
    assert json.loads(found[0]) == {"a": "\u00e9\u2028"}
