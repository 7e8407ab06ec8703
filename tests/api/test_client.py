"""Many requests through one client: nothing lost, nothing asked twice, what fails says why."""

from __future__ import annotations

import threading
import time

import pytest

from longspan.api import ChatRequest, Client, Endpoint, Limits, Price, SpendingLimits
from longspan.core.errors import ArgumentError, ConfigError, RunError, UserError
from tests.api.fake_server import Reply, chat, error, reply_json, serving
from tests.api.made_clock import MadeClock
from tests.patience import PATIENCE_SECONDS

TEN = [(number, ChatRequest(prompt=f"question {number}")) for number in range(10)]


def echo(asked):
    return chat("answer to " + asked.body["messages"][-1]["content"])


def client_of(server, clock=None, **settings):
    endpoint = Endpoint(model="m", base_url=server.url, timeout=settings.pop("timeout", 20))
    settings.setdefault("limits", Limits(concurrency=4))
    return Client(endpoint, clock=clock or MadeClock(), **settings)


def test_every_request_has_its_own_answer():
    """Answers come in any order; the id says whose they are."""
    with serving(echo) as server, client_of(server) as client:
        results = dict(client.complete(TEN))
        report = client.report()
    assert {name: result.text for name, result in results.items()} == {
        number: f"answer to question {number}" for number in range(10)
    }
    assert all(result.finish == "stop" and result.attempts == 1 for result in results.values())
    assert (report.answered, report.attempts, report.prompt_tokens, report.completion_tokens) == (
        10,
        10,
        50,
        20,
    )
    assert server.most_under_way <= 4


def test_requests_are_read_as_answers_are_taken():
    """Memory must not grow with the job: no more than twice `concurrency` is read ahead."""
    read = []

    def requests():
        for number in range(1000):
            read.append(number)
            yield number, ChatRequest(prompt=f"question {number}")

    with serving(echo) as server, client_of(server) as client:
        results = client.complete(requests())
        for taken in range(1, 30):
            next(results)
            assert len(read) <= taken + 8
        results.close()
    assert len(server.asked) <= 29 + 8


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (error(500), "HTTP 500"),
        (error(503), "HTTP 503"),
        (error(529, "overloaded"), "HTTP 529"),
        (error(408), "HTTP 408"),
        (error(409), "HTTP 409"),
        (error(429), "HTTP 429"),
        (Reply(200, b'{"choices": [{"mess'), "malformed"),
        (Reply(200, b"<html>busy</html>"), "malformed"),
        (Reply(200, b"[" * 200_000), "malformed"),
        (Reply(200, b'{"choices": {"message": 1}}'), "malformed"),
        (Reply(200, b'{"choices": [{"message": "text"}]}'), "malformed"),
        (Reply(200, b'{"object": "odd"}'), "malformed"),
        (Reply(200, b'"odd"'), "malformed"),
        (Reply(200, b"\xff\xfe"), "malformed"),
        (chat("whole")._replace(cut=10), "truncated"),
        (Reply(hang_up=True), "truncated"),
        (reply_json({"error": {"message": "busy", "code": 503}}), "HTTP 503"),
        (reply_json({"error": "busy"}), "HTTP 500"),
    ],
)
def test_what_passes_is_asked_again(reply, cause):
    clock = MadeClock()
    with serving([reply, reply, chat("at last")]) as server, client_of(server, clock) as client:
        result = client.ask(ChatRequest(prompt="q"))
        report = client.report()
    assert (result.text, result.attempts, result.error) == ("at last", 3, None)
    assert report.retries == {cause: 2}
    assert len(clock.slept) == 2
    assert clock.slept[0] <= 1 and clock.slept[1] <= 2  # full jitter, doubling


def test_a_slow_answer_is_a_timeout_and_asked_again():
    held = threading.Event()
    try:
        with (
            serving([chat("late")._replace(wait=held), chat("soon")]) as server,
            client_of(server, timeout=1.0) as client,
        ):
            assert client.ask(ChatRequest(prompt="q")).text == "soon"
            assert client.report().retries == {"timeout": 1}
            held.set()
    finally:
        held.set()


def test_no_server_is_a_result_that_says_so():
    with serving([chat("x")]) as server:
        pass  # closed: nobody listens at this address any more
    limits = Limits(concurrency=1, max_attempts=3)
    with client_of(server, limits=limits) as client:
        result = client.ask(ChatRequest(prompt="q"))
        assert client.report().retries == {"connection": 2}
    assert result.error == "failed"
    assert "3 attempts" in result.detail and "connect" in result.detail


def test_back_off_is_limited():
    clock = MadeClock()
    limits = Limits(concurrency=1, max_attempts=12, backoff_limit=5)
    with serving([error(500)]) as server, client_of(server, clock, limits=limits) as client:
        assert client.ask(ChatRequest(prompt="q")).error == "failed"
    assert len(clock.slept) == 11 and max(clock.slept) <= 5
    assert len(set(clock.slept)) > 5, "full jitter: no two waits alike"


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7.0), ("0.5", 0.5), ("Thu, 01 Jan 1970 00:17:00 GMT", 20.0)]
)
def test_retry_after_holds_for_all(value, seconds):
    """The seconds, or the date, that one request is told are waited for by every request."""
    clock = MadeClock()
    with (
        serving([error(429, retry_after=value), chat("now")]) as server,
        client_of(server, clock, limits=Limits(concurrency=1)) as client,
    ):
        results = dict(client.complete(TEN[:3]))
        report = client.report()
    assert all(result.text == "now" for result in results.values())
    assert sum(clock.slept) == pytest.approx(seconds)
    assert report.seconds_limited == pytest.approx(seconds)
    assert report.seconds_backoff == 0


def test_a_pause_of_hours_ends_the_job():
    """A daily limit is not slept through unnoticed."""
    with (
        serving([error(429, retry_after="90000")]) as server,
        client_of(server) as client,
        pytest.raises(RunError, match="wait 90,000 s"),
    ):
        list(client.complete(TEN))


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error(401, "Incorrect API key provided: sk-abc***xyz"), "refuses the key"),
        (error(403), "refuses the key"),
        (error(400, "Incorrect API key provided", "invalid_api_key"), "refuses the key"),
        (error(404, "The model `m` does not exist", "model_not_found"), "no model 'm'"),
        (error(404, "nothing here"), "does not answer as an endpoint of kind chat"),
        (error(400, "no such", "model_not_found"), "no model 'm'"),
        (error(429, "pay", "insufficient_quota"), "no credit"),
        (error(402, "pay"), "no credit"),
        (Reply(302, b"", [("location", "/elsewhere")]), "does not answer"),
    ],
)
def test_what_cannot_pass_is_one_message_at_once(reply, said):
    """A bad key must not be tried ten thousand times."""
    clock = MadeClock()
    with serving([reply]) as server, client_of(server, clock, limits=Limits(concurrency=2)) as client:
        with pytest.raises(UserError, match=said) as caught:
            list(client.complete(TEN))
        assert "sk-abc" not in str(caught.value)
        with pytest.raises(UserError, match=said):
            list(client.complete(TEN))
    assert len(server.asked) <= 2
    assert clock.slept == []


def test_what_is_under_way_is_recorded_before_the_error(tmp_path):
    """The answer that was paid for while another request met a bad key must not be lost."""
    held, arrived = threading.Event(), threading.Event()

    def script(asked):
        if asked.body["messages"][0]["content"] == "question 0":
            arrived.set()
            return chat("paid for")._replace(wait=held)
        arrived.wait(PATIENCE_SECONDS)
        threading.Timer(0.02, held.set).start()
        return error(401)

    cache = tmp_path / "answers.sqlite"
    with serving(script) as server:
        results = {}
        with (
            client_of(server, limits=Limits(concurrency=2), cache=cache) as client,
            pytest.raises(ConfigError, match="refuses the key"),
        ):
            for name, result in client.complete(TEN):
                results[name] = result
        assert {name: result.text for name, result in results.items()} == {0: "paid for"}
        asked = len(server.asked)
        with client_of(server, cache=cache) as client:
            assert client.ask(TEN[0][1]).text == "paid for"
        assert len(server.asked) == asked


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (reply_json({"choices": []}), "no answer"),
        (reply_json({"choices": None}), "no answer"),
        (chat(None), "no answer"),
        (chat("half", finish="content_filter"), "refused"),
        (
            reply_json({"choices": [{"message": {"refusal": "I will not.", "content": None}}]}),
            "refused",
        ),
        (error(400, "filtered by content management policy", "content_filter"), "refused"),
        (
            error(400, "This model's maximum context length is 4096 tokens", "context_length_exceeded"),
            "too long",
        ),
        (error(400, "prompt is too long: 250000 tokens > 200000 maximum"), "too long"),
        (error(413, "request_too_large"), "too long"),
        (error(422, "`inputs` tokens + `max_new_tokens` must be <= 4096"), "too long"),
        (
            reply_json({"error": {"type": "invalid_request_error", "message": "maximum context length"}}),
            "too long",
        ),
        (error(400, "temperature has to be positive"), "rejected"),
    ],
)
def test_what_concerns_one_request_is_a_result(reply, reason):
    """Refusals, empty choices, filters and full windows are counted; the job goes on."""

    def script(asked):
        return reply if asked.body["messages"][0]["content"] == "question 3" else echo(asked)

    with serving(script) as server, client_of(server) as client:
        results = dict(client.complete(TEN))
        report = client.report()
    assert results[3].error == reason and results[3].text == "" and results[3].attempts == 1
    assert reason == "no answer" or results[3].detail
    assert report.reasons == {reason: 1} and report.answered == 9
    assert sum(result.error is None for result in results.values()) == 9


def test_nothing_but_rejections_end_the_job():
    """A parameter that the server does not know would else be refused once for each of the requests."""
    many = [(number, ChatRequest(prompt=str(number))) for number in range(100)]
    with (
        serving([error(422, "unknown field top_k")]) as server,
        client_of(server) as client,
        pytest.raises(UserError, match="top_k"),
    ):
        list(client.complete(many))
    assert len(server.asked) < 20


def test_a_server_that_answers_nothing_ends_the_job():
    many = [(number, ChatRequest(prompt=str(number))) for number in range(100)]
    limits = Limits(concurrency=4, max_attempts=2)
    with (
        serving([error(500, "dead")]) as server,
        client_of(server, limits=limits) as client,
        pytest.raises(RunError, match="has not answered the last 10"),
    ):
        list(client.complete(many))
    assert len(server.asked) < 40


def test_the_same_request_is_asked_once():
    """Equal requests share one answer and one price; draws told apart by `sample` do not."""
    same = ChatRequest(prompt="q", temperature=1.0)
    requests = [("a", same), ("b", same), ("c", same._replace(sample=1))]
    with serving(echo) as server, client_of(server) as client:
        results = dict(client.complete(requests))
        report = client.report()
    assert len(server.asked) == 2
    assert sorted(result.cached for result in results.values()) == [False, False, True]
    # Without prices nothing costs 0: what it cost is not known.
    assert {result.cost for result in results.values()} == {None}
    assert report.completion_tokens == 4


def test_an_abandoned_iterator_leaves_nothing_running(tmp_path):
    """`break` in the caller's loop: what is sent is recorded, what waits is called off."""
    limits = Limits(concurrency=2)
    with serving(echo) as server, client_of(server, limits=limits, cache=tmp_path / "c.sqlite") as client:
        for _ in client.complete(TEN):
            break
        asked = len(server.asked)
        assert len(dict(client.complete(TEN))) == 10
        assert len(server.asked) == 10, "what was asked before the break is not asked again"
        assert asked <= 4


def test_a_request_longer_than_the_window_is_not_sent():
    endpoint = Endpoint(model="m", base_url="http://127.0.0.1:9", max_length=100)
    with Client(endpoint) as client:
        result = client.ask(ChatRequest(prompt="q", prompt_tokens=90, max_tokens=20))
    assert (result.error, result.attempts) == ("too long", 0)
    assert "90 prompt + 20 answer tokens" in result.detail and "100" in result.detail


def test_a_request_dearer_than_the_whole_bucket_is_refused():
    """It would wait for ever."""
    endpoint = Endpoint(model="m", base_url="http://127.0.0.1:9")
    with Client(endpoint, limits=Limits(tokens_per_minute=1000)) as client:
        result = client.ask(ChatRequest(prompt="q", prompt_tokens=900, max_tokens=200))
    assert (result.error, result.attempts) == ("rejected", 0)
    assert "1,100 tokens" in result.detail and "1,000" in result.detail


def test_max_requests_stops_cleanly():
    """What is under way comes back, recorded answers are free, and the report says why it ended."""
    with serving(echo) as server, client_of(server, budget=SpendingLimits(max_requests=3)) as client:
        results = dict(client.complete(TEN))
        assert client.report().stopped == "max_requests"
        with pytest.raises(RunError, match="max_requests"):
            client.ask(ChatRequest(prompt="another"))
    assert len(results) == len(server.asked) == 3


def test_max_cost_is_never_exceeded():
    """5 prompt and 2 answer tokens at 1 and 10 a million cost 25e-6; four are paid by 1e-4, a fifth is not begun."""
    price = Price(input=1, output=10)
    requests = [
        (number, ChatRequest(prompt=f"{number}", prompt_tokens=5, max_tokens=2)) for number in range(10)
    ]
    budget = SpendingLimits(max_cost=1e-4 + 1e-9, price=price)
    with serving(echo) as server, client_of(server, budget=budget) as client:
        results = dict(client.complete(requests))
        report = client.report()
    assert len(results) == len(server.asked) == 4
    assert report.stopped == "max_cost" and report.cost == pytest.approx(1e-4)
    assert all(result.cost == pytest.approx(25e-6) for result in results.values())


def test_a_short_answer_makes_room_for_another_request():
    """Reserved is the longest answer: with one under way the next waits, and is begun when that one was short."""
    price = Price(input=0, output=1e6)  # 1 a token; answers have 2, and up to 8 are reserved
    requests = [(number, ChatRequest(prompt=f"{number}", max_tokens=8)) for number in range(10)]
    with (
        serving(echo) as server,
        client_of(server, budget=SpendingLimits(max_cost=11, price=price)) as client,
    ):
        results = dict(client.complete(requests))
    # After one: 2 + 8 <= 11. After two: 4 + 8 > 11.
    assert len(results) == len(server.asked) == 2
    assert server.most_under_way == 1


def test_an_answer_without_usage_is_not_free():
    price = Price(input=1e6, output=1e6)
    with (
        serving([chat("four and twenty", usage=None)]) as server,
        client_of(server, budget=SpendingLimits(price=price)) as client,
    ):
        result = client.ask(ChatRequest(prompt="abcdef"))
        report = client.report()
    assert result.usage.estimated and result.usage.completion_tokens == 5
    assert result.cost == report.cost == 6 + 5
    assert report.estimated == 1 and "1 answers estimated" in report.describe()


def test_a_request_that_the_protocol_cannot_ask_is_a_message():
    with serving(echo) as server, client_of(server) as client:
        with pytest.raises(ArgumentError, match="either messages or a prompt"):
            client.ask(ChatRequest())
        with pytest.raises(ArgumentError, match="token ids"):
            client.ask(ChatRequest(prompt=[1, 2]))
    assert server.asked == []


def test_an_error_in_the_callers_requests_comes_through():
    """The requests are the caller's generator: its exception is the caller's, and what was sent is awaited."""

    def requests():
        yield from TEN[:3]
        raise ZeroDivisionError

    with serving(echo) as server, client_of(server) as client:
        with pytest.raises(ZeroDivisionError):
            list(client.complete(requests()))
        assert client.ask(TEN[5][1]).text == "answer to question 5"


def test_answers_are_given_while_requests_are_still_made():
    """Requests may be slow to make: an answer that is there is not kept back until the window is full."""
    names, made = [], []

    def requests():
        while not names and len(made) < 2000:
            made.append(len(made))
            yield made[-1], ChatRequest(prompt=f"question {made[-1]}")
            time.sleep(0.01)  # at most 20 s in all

    with serving(echo) as server, client_of(server, limits=Limits(concurrency=1000)) as client:
        for name, _ in client.complete(requests()):
            names.append(name)
    assert 0 < len(made) < 2000, "the window of 2,000 was never full"
    assert sorted(names) == made
