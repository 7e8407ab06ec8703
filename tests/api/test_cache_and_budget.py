"""Recorded answers and prices."""

from __future__ import annotations

import sqlite3
import threading

import pytest

from longspan.api import (
    ChatRequest,
    Client,
    Endpoint,
    Limits,
    Price,
    SpendingLimits,
    Usage,
    estimate,
    price_of,
)
from longspan.api.cache import AnswerCache, request_key
from longspan.api.messages import LogProbs, ParsedAnswer
from longspan.api.openai_protocol import ChatProtocol
from longspan.core.errors import ConfigError, DataError, RunError
from tests.api.fake_server import chat, error, reply_json, serving
from tests.api.made_clock import MadeClock


def key_of(request: ChatRequest, **settings) -> str:
    endpoint = Endpoint(**{"model": "m", "base_url": "http://a/v1", **settings})
    body = ChatProtocol().body(endpoint, request)
    return request_key((endpoint.address, ""), "chat", body, request.sample)


PLAIN = ChatRequest(prompt="q")


@pytest.mark.parametrize(
    "other",
    [
        PLAIN._replace(prompt="r"),
        PLAIN._replace(max_tokens=1),
        PLAIN._replace(temperature=1.0),
        PLAIN._replace(temperature=None),
        PLAIN._replace(top_p=0.5),
        PLAIN._replace(stop=("x",)),
        PLAIN._replace(seed=1),
        PLAIN._replace(sample=1),
        PLAIN._replace(extra={"top_k": 1}),
        PLAIN._replace(prompt=None, messages=({"role": "system", "content": "q"},)),
    ],
)
def test_what_determines_an_answer_is_in_the_key(other):
    """A key too small would hand out the answer to another question."""
    assert key_of(other) != key_of(PLAIN)


def test_what_does_not_determine_an_answer_is_not():
    """Another timeout or a known token count must not have all paid for again."""
    assert key_of(PLAIN, timeout=1.0) == key_of(PLAIN)
    assert key_of(PLAIN, base_url="http://b:9/v1") != key_of(PLAIN), "two servers may call two models `model`"
    assert key_of(PLAIN._replace(prompt_tokens=3)) == key_of(PLAIN)
    assert key_of(PLAIN._replace(prompt=None, messages=({"role": "user", "content": "q"},))) == key_of(PLAIN)
    assert key_of(PLAIN, model="n") != key_of(PLAIN)
    assert key_of(PLAIN, extra={"a": 1}) != key_of(PLAIN)


def test_another_model_behind_the_address_is_asked_itself(tmp_path, caplog):
    """Answers of the model before were given out as those of the one that a restarted server holds."""
    path = tmp_path / "answers.sqlite"
    said = [{"id": "m", "root": "/models/a", "created": 1}, {"id": "other"}]
    with serving([chat("a"), chat("b")]) as server:
        endpoint = Endpoint(model="m", base_url=server.url)

        def ask() -> tuple[str, bool]:
            with Client(endpoint, cache=path, clock=MadeClock()) as client:
                result = client.ask(PLAIN)
                return result.text, result.cached

        server.models = said
        assert ask() == ("a", False)
        server.models = [{**said[0], "created": 2}]
        assert ask() == ("a", True) and not caplog.records, "the time of the list says nothing"
        server.models = None
        assert ask() == ("a", True), "a server that says nothing is taken for what it was"
        server.models = [{**said[0], "root": "/models/b"}]
        assert ask() == ("b", False)
        assert "is not what it was" in caplog.text


def test_a_recorded_answer_comes_back_whole(tmp_path):
    reading = ParsedAnswer(
        "text \u2028 \ud800", "length", Usage(3, 4), None, "detail", LogProbs((None, -0.5), ("", "a"))
    )
    cache = AnswerCache(tmp_path / "deep" / "answers.sqlite")
    cache.put("k", "m", reading)
    assert cache.get("k") == reading
    assert cache.get("other") is None
    cache.close()
    again = AnswerCache(tmp_path / "deep" / "answers.sqlite")
    assert again.get("k") == reading and len(again) == 1
    again.close()


def test_two_processes_and_threads_share_a_file(tmp_path):
    first, second = (AnswerCache(tmp_path / "answers.sqlite") for _ in range(2))

    def fill(cache: AnswerCache, part: int) -> None:
        for number in range(50):
            cache.put(f"{part} {number}", "m", ParsedAnswer(str(number), "stop"))

    threads = [threading.Thread(target=fill, args=pair) for pair in ((first, 0), (second, 1), (first, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(first) == len(second) == 150
    first.close()
    second.close()


def test_other_files_are_not_taken_for_answers(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("these are my notes, " * 100)
    with pytest.raises(DataError, match="not a file of answers"):
        AnswerCache(text)
    assert text.read_text().startswith("these are my notes"), "it is left as it is"
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()
    with pytest.raises(DataError, match="not a file of answers"):
        AnswerCache(other)


def test_a_damaged_record_is_a_message(tmp_path):
    cache = AnswerCache(tmp_path / "answers.sqlite")
    cache.put("k", "m", ParsedAnswer("text", "stop"))
    with sqlite3.connect(cache.path) as database:
        database.execute("UPDATE answers SET answer = '{\"text\"'")
    database.close()
    with pytest.raises(DataError, match="damaged"):
        cache.get("k")
    cache.close()


def test_a_disk_that_refuses_ends_the_job(tmp_path):
    """Going on would pay for answers that nothing records."""
    with serving([chat("x")]) as server:
        endpoint = Endpoint(model="m", base_url=server.url)
        limits = Limits(concurrency=1)
        with Client(endpoint, cache=tmp_path / "answers.sqlite", clock=MadeClock(), limits=limits) as client:
            assert client.ask(ChatRequest(prompt="a")).text == "x"
            with sqlite3.connect(tmp_path / "answers.sqlite") as database:
                database.execute("DROP TABLE answers")
            database.close()
            with pytest.raises((RunError, DataError), match="file of answers"):
                client.ask(ChatRequest(prompt="b"))


def test_failures_are_not_recorded(tmp_path):
    """What failed today may be answered tomorrow; a refusal is an answer."""
    refusal = reply_json({"choices": [{"message": {"refusal": "No."}}]})
    too_long = error(400, "maximum context length is 10")
    for reply, recorded in ((reply_json({"choices": []}), 0), (too_long, 0), (refusal, 1), (chat(""), 2)):
        with serving([reply]) as server:
            endpoint = Endpoint(model="m", base_url=server.url)
            with Client(endpoint, cache=tmp_path / "answers.sqlite", clock=MadeClock()) as client:
                client.ask(ChatRequest(prompt=f"for {recorded}"))
        cache = AnswerCache(tmp_path / "answers.sqlite")
        assert len(cache) == recorded
        cache.close()


def test_recorded_answers_cost_nothing(tmp_path):
    price = Price(input=1e6, output=1e6)
    with serving([chat("x", usage=(5, 2))]) as server:
        endpoint = Endpoint(model="m", base_url=server.url)
        budget = SpendingLimits(price=price, max_cost=300)
        for place in range(2):
            with Client(
                endpoint, cache=tmp_path / "answers.sqlite", clock=MadeClock(), budget=budget
            ) as client:
                result = client.ask(ChatRequest(prompt="q", max_tokens=9))
                report = client.report()
            assert (result.cost, report.cost, result.cached) == ((7, 7, False), (0, 0, True))[place]
            assert result.usage == Usage(5, 2)
    assert len(server.asked) == 1


def test_an_estimate_before_anything_is_sent():
    """By hand: 2 x 1000 + 2 x 100 tokens at 2 and 10 a million."""
    price = Price(input=2, output=10)
    limits = Limits(requests_per_minute=4, tokens_per_minute=1100)
    found = estimate([(1000, 100)] * 2, price=price, limits=limits)
    assert (found.requests, found.prompt_tokens, found.completion_tokens) == (2, 2000, 200)
    assert found.cost == pytest.approx(0.004 + 0.002)
    assert found.minutes == pytest.approx(2.0)
    assert estimate([]) == (0, 0, 0, None, None)


def test_prices_are_read_by_model(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text("small: {input: 0.5, output: 1.5}\nlarge/v2: {input: 2.5, output: 10}\n")
    assert price_of("large/v2", path).cost(1_000_000, 100_000) == pytest.approx(3.5)
    with pytest.raises(ConfigError, match=r"no prices of 'huge'[\s\S]*large/v2, small"):
        price_of("huge", path)
    path.write_text("small: {input: -1, output: 1.5}\n")
    with pytest.raises(ConfigError, match=r"small[\s\S]*input"):
        price_of("small", path)
    path.write_text("small: 3\n")
    with pytest.raises(ConfigError, match=r"small[\s\S]*required"):
        price_of("small", path)


def test_a_budget_without_prices_is_refused():
    with pytest.raises(ConfigError, match="no prices"):
        SpendingLimits(max_cost=1)
    for wrong in (float("nan"), float("inf"), -1):
        with pytest.raises(ConfigError):
            SpendingLimits.from_dict({"max_cost": wrong, "price": {"input": 1, "output": 1}})
