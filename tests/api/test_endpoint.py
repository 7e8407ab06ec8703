"""Addresses and keys: the right header to the right place, and no secret anywhere else."""

from __future__ import annotations

import copy
import logging
import traceback

import pytest

from longspan.api import ChatRequest, Client, Endpoint, Limits
from longspan.core.errors import ConfigError, UserError
from tests.api.fake_server import chat, error, serving
from tests.api.made_clock import MadeClock

SECRET = "sk-verysecret0123456789"


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "https://api.openai.com/v1/chat/completions"),
        ({"kind": "completions"}, "https://api.openai.com/v1/completions"),
        ({"kind": "anthropic"}, "https://api.anthropic.com/v1/messages"),
        ({"base_url": "http://node7:8000/v1/"}, "http://node7:8000/v1/chat/completions"),
        ({"base_url": "http://node7:8000/v1/chat/completions"}, "http://node7:8000/v1/chat/completions"),
        (
            {"base_url": "https://me.openai.azure.com/openai/deployments/gpt", "api_version": "2024-10-21"},
            "https://me.openai.azure.com/openai/deployments/gpt/chat/completions?api-version=2024-10-21",
        ),
    ],
)
def test_where_requests_go(settings, url):
    assert Endpoint(model="m", **settings).url == url


def test_requests_go_through_the_proxy_of_the_environment(monkeypatch):
    """Where a model is only reached through a proxy, a client that does not look for one says "no connection"."""
    with serving([chat("6")]) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("NO_PROXY", "localhost")
        endpoint = Endpoint(model="judge", base_url="http://judge.example.invalid/v1")
        with Client(endpoint, limits=Limits(), clock=MadeClock()) as client:
            ((_, result),) = client.complete([(0, ChatRequest(prompt="rate this"))])
    assert result.text == "6"
    # A proxy is asked for the whole address; a server would be asked for its path alone.
    assert [asked.path for asked in proxy.asked] == ["http://judge.example.invalid/v1/chat/completions"]


@pytest.mark.parametrize(
    ("settings", "variable", "header", "value"),
    [
        ({}, "OPENAI_API_KEY", "authorization", f"Bearer {SECRET}"),
        ({"kind": "completions"}, "OPENAI_API_KEY", "authorization", f"Bearer {SECRET}"),
        ({"kind": "anthropic"}, "ANTHROPIC_API_KEY", "x-api-key", SECRET),
        ({"key_variable": "MY_KEY"}, "MY_KEY", "authorization", f"Bearer {SECRET}"),
        (
            {"base_url": "https://x.test/openai/deployments/gpt"},
            "AZURE_OPENAI_API_KEY",
            "api-key",
            SECRET,
        ),
        ({"base_url": "https://me.openai.azure.com/openai/v1"}, "AZURE_OPENAI_API_KEY", "api-key", SECRET),
    ],
)
def test_the_key_of_each_kind(monkeypatch, settings, variable, header, value):
    """Each provider has its header and its variable; a missing key is said before anything is sent."""
    endpoint = Endpoint(model="m", **settings)
    with pytest.raises(ConfigError, match=f"{variable} is not set"):
        endpoint.read_key()
    monkeypatch.setenv(variable, SECRET)
    headers = endpoint.headers(endpoint.read_key())
    assert headers[header] == value
    assert sum(SECRET in text for text in headers.values()) == 1


def test_servers_of_ones_own_may_want_no_key():
    endpoint = Endpoint(model="m", base_url="http://localhost:8000/v1")
    assert set(endpoint.headers(endpoint.read_key())) == {"content-type"}


@pytest.mark.parametrize("value", ["sk-a b", "sk-\u201cquoted\u201d", "sk-one\nsk-two"])
def test_a_key_that_cannot_stand_in_a_header_is_not_shown(monkeypatch, value):
    """The HTTP library would quote an illegal header in its error."""
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(ConfigError, match="does not hold a key") as caught:
        Endpoint(model="m").read_key()
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@host/v1",
        f"https://{SECRET}@host/v1",
        f"https://host/v1?key={SECRET}",
        f"host/{SECRET}",
        f"ftp://{SECRET}/x",
        f"http://host:port{SECRET}/v1",
    ],
)
@pytest.mark.parametrize("make", [lambda url: Endpoint(model="m", base_url=url), None])
def test_secrets_in_an_address_are_refused_and_not_repeated(url, make):
    with pytest.raises(ConfigError) as caught:
        if make is not None:
            make(url)
        else:
            Endpoint.from_dict({"model": "m", "base_url": url})
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("kind", "variable"), [("chat", "OPENAI_API_KEY"), ("anthropic", "ANTHROPIC_API_KEY")]
)
def test_the_key_is_nowhere_but_in_the_header(monkeypatch, caplog, tmp_path, kind, variable):
    """Logs at the finest level, cache, report, results, settings, reprs, errors: none holds the key."""
    monkeypatch.setenv(variable, SECRET)
    caplog.set_level(logging.DEBUG)
    endpoint = Endpoint(model="m", kind=kind, base_url="http://127.0.0.1:1")
    replies = [error(500, f"broke with {SECRET}"), error(400, f"bad {SECRET}"), error(401, f"no {SECRET}")]
    with serving(replies) as server:
        endpoint = Endpoint(model="m", kind=kind, base_url=server.url)
        with Client(
            endpoint, cache=tmp_path / "answers.sqlite", clock=MadeClock(), limits=Limits(concurrency=1)
        ) as client:
            result = client.ask(ChatRequest(prompt="q"))
            with pytest.raises(UserError) as caught:
                client.ask(ChatRequest(prompt="another"))
            transport = vars(client)["_transport"]
            shown = [
                repr(client),
                str(result),
                str(client.report()),
                repr(vars(client)),
                repr(vars(transport)),
            ]
    assert any(SECRET in value for asked in server.asked for value in asked.headers.values())
    assert result.error == "rejected" and "***" in result.detail
    shown.append("".join(traceback.format_exception(caught.value)))
    shown.extend([caplog.text, endpoint.model_dump_json(), repr(endpoint)])
    assert "HTTP 500" in caplog.text, "guard: what is logged is looked at"
    shown.extend(path.read_bytes().decode("latin-1") for path in tmp_path.iterdir())
    assert len(shown) >= 9
    for text in shown:
        assert SECRET not in text
    with pytest.raises(TypeError, match="not pickled"):
        copy.copy(endpoint.read_key())


def test_newer_models_of_the_provider_have_another_field():
    assert Endpoint(model="m").limit_field == "max_completion_tokens"
    assert Endpoint(model="m", base_url="http://localhost/v1").limit_field == "max_tokens"
    assert Endpoint(model="m", kind="anthropic").limit_field == "max_tokens"


def test_further_fields_reach_the_server():
    with serving([chat("x")]) as server:
        endpoint = Endpoint(
            model="m", base_url=server.url, extra={"reasoning_effort": "low", "temperature": None}
        )
        with Client(endpoint, clock=MadeClock()) as client:
            client.ask(ChatRequest(prompt="q", extra={"top_k": 5}))
    assert server.asked[0].body["reasoning_effort"] == "low"
    assert server.asked[0].body["top_k"] == 5
    assert "temperature" not in server.asked[0].body, "some models refuse it"


def test_without_httpx_the_message_names_the_extra(monkeypatch):
    import sys

    from longspan.core.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingDependencyError, match=r"longspan\[api\]"):
        Client(Endpoint(model="m", base_url="http://localhost/v1"))
