"""A model behind a server answers as one here does, or says why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longspan.api import Client, Endpoint, Limits, ServerConfig, SpendingLimits
from longspan.core.errors import ArgumentError, ConfigError, RunError, UserError
from longspan.data.tokenizer import load_tokenizer
from longspan.infer.config import AnswererConfig
from longspan.infer.generate import generate_greedy
from longspan.infer.opening import open_answerer
from longspan.infer.plain import teacher_forced
from longspan.infer.remote import RemoteAnswerer, open_remote
from longspan.infer.requests import Request
from longspan.models.hf import load_model
from tests.api.fake_server import chat, error, events, reply_json, serving
from tests.api.made_clock import MadeClock
from tests.infer.served import transformers_serving

NUMBERS = [Request(f"{number}, ", max_new_tokens=3) for number in range(5)]


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def answerer_of(server, kind="chat", *, client=(), **settings) -> RemoteAnswerer:
    endpoint = Endpoint(kind=kind, model="m", base_url=server.url, **settings)
    options = {"clock": MadeClock(), "limits": Limits(concurrency=2), **dict(client)}
    return RemoteAnswerer(Client(endpoint, **options))


def test_answers_belong_to_their_requests():
    """The index of each answer is that of its request, in whatever order they come."""
    with serving(lambda asked: chat("to " + asked.body["messages"][0]["content"], usage=(4, 2))) as server:
        answerer = answerer_of(server)
        answers = dict(answerer.generate(NUMBERS))
        answerer.close()
    assert {index: answer.text for index, answer in answers.items()} == {n: f"to {n}, " for n in range(5)}
    assert (answers[0].finish, answers[0].prompt_tokens, answers[0].completion_tokens) == ("stop", 4, 2)
    assert answers[0].cost is None
    assert server.asked[0].body["temperature"] == 0 and server.asked[0].body["max_tokens"] == 3


def test_a_server_that_is_not_there_ends_the_evaluation():
    """Every sample was recorded as unscored, after minutes, and the same command asked for none of them again."""
    with serving(lambda asked: chat("8")) as server:
        answerer = answerer_of(server)
    with pytest.raises(RunError, match=r"cannot be reached(.|\n)*--base-url"):
        next(answerer.generate(NUMBERS))
    answerer.close()


def test_further_fields_of_the_server_settings_are_sent(monkeypatch):
    """Reasoning models refuse a temperature: a null has to leave it out, and what is added has to arrive."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with serving(lambda asked: chat("8")) as server:
        settings = {"base_url": server.url, "extra": {"temperature": None, "reasoning_effort": "low"}}
        answerer = open_answerer(AnswererConfig.from_dict({"model": "openai:m", "server": settings}))
        assert [answer.text for _, answer in answerer.generate(NUMBERS[:1])] == ["8"]
        answerer.close()
    # Another effort is another evaluation: its records must not continue these.
    assert answerer.identity["extra"] == {"temperature": None, "reasoning_effort": "low"}
    assert "temperature" not in server.asked[0].body and server.asked[0].body["reasoning_effort"] == "low"


def test_a_chat_is_sent_to_a_server_that_chats_and_the_text_to_others():
    chatty = Request("rendered", messages=[{"role": "user", "content": "plain"}])
    with serving([chat("a")]) as server:
        answerer = answerer_of(server)
        list(answerer.generate([chatty]))
        answerer.close()
    assert server.asked[0].body["messages"] == [{"role": "user", "content": "plain"}]
    with serving([reply_json({"choices": [{"text": "a", "finish_reason": "stop"}]})]) as server:
        answerer = answerer_of(server, "completions")
        list(answerer.generate([chatty]))
        answerer.close()
    assert server.asked[0].body["prompt"] == "rendered"


def test_what_follows_a_stop_text_is_no_part_of_the_answer():
    """Some servers send the stop text along, and take no more than four of them."""
    stops = ("a", "b", "c", "d", "\n")
    with serving([chat("48213\nThe magic", finish="length")]) as server:
        answerer = answerer_of(server)
        (_, answer), *_ = answerer.generate([Request("q", stop=stops)])
        answerer.close()
    assert answer.text == "48213" and answer.finish == "stop"


def test_a_request_without_an_answer_says_why(caplog):
    """Reasons are few words, so that a thousand equal ones are counted as one."""

    def script(asked):
        number = int(asked.body["messages"][0]["content"].split(",")[0])
        return [
            error(400, f"maximum context length is 10, you asked for {number}"),
            reply_json({"choices": []}),
            chat("no", finish="content_filter"),
            chat("fine"),
            chat("fine"),
        ][number]

    with serving(script) as server:
        answerer = answerer_of(server)
        answers = dict(answerer.generate(NUMBERS))
        answerer.close()
    assert [answers[n].error for n in range(4)] == [
        "endpoint: too long",
        "endpoint: no answer",
        "endpoint: refused",
        None,
    ]
    assert all(answers[n].text == "" for n in range(3))
    assert "maximum context length is 10" in caplog.text


def test_a_request_longer_than_the_window_is_not_sent():
    with serving([chat("x")]) as server:
        answerer = answerer_of(server, max_length=8)
        requests = [
            Request("long", np.arange(6), max_new_tokens=3),
            Request("fits", np.arange(5), max_new_tokens=3),
        ]
        answers = dict(answerer.generate(requests))
        answerer.close()
    assert answerer.max_length == 8
    assert (answers[0].error, answers[1].text) == ("endpoint: too long", "x")
    assert len(server.asked) == 1


def test_a_used_up_budget_is_an_error_after_what_was_answered():
    """Requests that were not sent are missing, not unscored: the next run asks them."""
    with serving([chat("x")]) as server:
        answerer = answerer_of(server, client={"budget": SpendingLimits(max_requests=2)}.items())
        answers = []
        with pytest.raises(RunError, match=r"3 requests were not sent: max_requests"):
            answers.extend(answerer.generate(NUMBERS))
            pytest.fail("the error comes after the answers")
        answerer.close()
    assert len(server.asked) == 2


def test_a_stream_gives_the_text_as_it_comes():
    with serving(
        [
            events(
                {"choices": [{"delta": {"content": "48"}}]},
                {"choices": [{"delta": {"content": "213\n"}, "finish_reason": "stop"}]},
            )
        ]
    ) as server:
        answerer = answerer_of(server)
        pieces: list[str] = []
        answer = answerer.generate_stream(Request("q", stop=("\n",)), pieces.append)
        answerer.close()
    assert pieces == ["48", "213\n"] and answer.text == "48213"


def test_the_identity_tells_endpoints_apart(monkeypatch):
    with serving([chat("x")]) as server:
        answerer = open_remote("openai:org/m", ServerConfig(base_url=server.url, trained_length=4096))
        identity = answerer.identity
        answerer.close()
        other = open_remote("completions:org/m", ServerConfig(base_url=server.url))
        assert other.identity["fingerprint"] != identity["fingerprint"]
        other.close()
    assert {
        "path": "org/m",
        "trained_length": 4096,
        "backend": "chat",
        "address": server.url,
    }.items() <= identity.items()
    with pytest.raises(ArgumentError, match="completions, openai"):
        open_remote("grpc:m", ServerConfig())
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        open_remote("openai:m", ServerConfig())


@pytest.mark.parametrize(
    "reply",
    [
        reply_json({"choices": [{"text": "x", "finish_reason": "stop"}]}),
        reply_json(
            {"choices": [{"text": "x", "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": "stop"}]}
        ),
        error(422, "echo is not supported"),
    ],
)
def test_a_server_that_gives_no_log_probabilities_is_a_message(reply):
    request = Request("", np.array([1, 2]), answer_ids=np.array([3]))
    with serving([reply]) as server:
        answerer = answerer_of(server, "completions")
        with pytest.raises(ArgumentError, match="does not say how likely"):
            list(answerer.score([request]))
        answerer.close()
        chatting = answerer_of(server)
        with pytest.raises(ArgumentError, match="kind chat"):
            list(chatting.score([request]))
        chatting.close()


def test_scores_equal_those_of_the_same_model_here(twins):
    """A server that echoes the prompt with log-probabilities, as vLLM does: the same losses and likeliest tokens."""
    generator = np.random.default_rng(0)
    requests = [
        Request("", generator.integers(1, 97, prompt), answer_ids=generator.integers(1, 97, answer))
        for prompt, answer in ((1, 1), (9, 3), (40, 5))
    ]

    def script(asked):
        ids = torch.tensor([asked.body["prompt"]])
        with torch.no_grad():
            table = torch.log_softmax(twins.plain(ids).logits[0].float(), dim=-1)
        chosen = [None] + [float(table[place, ids[0, place + 1]]) for place in range(ids.shape[1] - 1)]
        best = [None] + [
            {f"token_id:{int(row.argmax())}": float(row.max()), "token_id:0": -99.0} for row in table[:-1]
        ]
        echoed = {"token_logprobs": [*chosen, -1.0], "top_logprobs": [*best, {"token_id:5": -1.0}]}
        return reply_json({"choices": [{"text": "...", "logprobs": echoed, "finish_reason": "length"}]})

    with serving(script) as server:
        answerer = answerer_of(server, "completions")
        answers = dict(answerer.score(requests))
        answerer.close()
    assert {"echo": True, "logprobs": 1, "max_tokens": 1}.items() <= server.asked[0].body.items()
    for index, request in enumerate(requests):
        nll, argmax_ids = teacher_forced(twins.ours, request.prompt_ids, request.answer_ids)
        np.testing.assert_allclose(answers[index].nll, nll, rtol=1e-5, atol=1e-5)
        assert answers[index].nll.dtype == np.float32
        np.testing.assert_array_equal(answers[index].token_ids, argmax_ids)


IDS, ANSWER = list(range(10, 40)), 3
VALUES = [None, *(-0.1 * place for place in range(1, 30))]


@pytest.mark.parametrize(("name", "named"), [("numbers", "token_id:{}"), ("texts", " w{}"), ("counts", None)])
@pytest.mark.parametrize("kind", ["as sent", "no new token", "own bos", "first left out", "others"])
def test_echoed_log_probabilities_are_read_where_they_stand(
    kind: str, name: str, named: str | None, caplog
) -> None:
    """A server that adds a BOS, or leaves out the first token, gave each token its neighbour's likelihood."""
    tokens, values = [*IDS, 7], [*VALUES, -9.0]
    if kind == "no new token":
        tokens, values = tokens[:-1], values[:-1]
    if kind == "own bos":
        tokens, values = [1, *tokens], [None, -5.0, *values[1:]]
    if kind == "first left out":
        tokens, values = tokens[1:], values[1:]
    if kind == "others":
        tokens, values = [token + 50 for token in tokens], [*values, -9.0, -9.0, -9.0]
        tokens += [1, 1, 1]
    table = {"token_logprobs": values, "top_logprobs": [{"token_id:5": -0.1}] * len(values)}
    if named is not None:
        table["tokens"] = [named.format(token) for token in tokens]

    class Words:
        def decode(self, ids) -> str:
            return f"w{next(iter(ids))}"

    request = Request("", np.array(IDS[:-ANSWER]), answer_ids=np.array(IDS[-ANSWER:]))
    with serving([reply_json({"choices": [{"text": "", "logprobs": table}]})]) as server:
        answerer = answerer_of(server, "completions")
        answerer._tokenizer = Words()
        if kind == "others" or (kind == "first left out" and name == "counts"):
            with pytest.raises(ArgumentError, match="not those it was sent"):
                list(answerer.score([request]))
        else:
            ((_, answer),) = answerer.score([request])
            np.testing.assert_allclose(answer.nll, [2.7, 2.8, 2.9], rtol=1e-6)
        answerer.close()


@pytest.mark.parametrize(
    ("text", "written", "wanted"),
    [
        ("The capital is Paris .", 3, "Paris ."),  # llama.cpp's, with the token that ends it
        ("The capital is The capital is Paris .", 5, "The capital is Paris ."),
        ("The capital is Paris .", 6, "The capital is Paris ."),  # a model that begins as it was begun
        ("Paris .", 3, "Paris ."),
    ],
)
def test_a_beginning_that_a_server_repeats_is_no_part_of_the_answer(
    text: str, written: int, wanted: str
) -> None:
    """llama.cpp sends the beginning of the answer along, but not when it streams: an exact match was then never one."""

    class Words:
        def encode(self, text: str) -> list[str]:
            return text.split()

    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The capital is "}]
    request = Request("", messages=messages, max_new_tokens=8)
    with serving([chat(text, usage=(9, written))]) as server:
        answerer = answerer_of(server)
        answerer._tokenizer = Words()
        ((_, answer),) = answerer.generate([request])
        answerer.close()
    assert answer.text == wanted


CHAT = {"messages": [{"role": "user", "content": "q"}]}


@pytest.mark.parametrize(
    ("theirs", "fields", "said"),
    [
        (1000, {}, False),
        (1200, {}, False),  # a template of the server's own
        (1300, {}, True),
        (970, {}, False),
        (900, {}, True),
        (1030, CHAT, False),
        (1100, CHAT, True),
    ],
)
def test_a_server_that_counts_otherwise_is_remarked_on(theirs: int, fields, said: bool, caplog) -> None:
    """With the wrong tokenizer a context of 128K is one of 100K, and no score shows it."""
    with serving([chat("8", usage=(theirs, 1))]) as server:
        answerer = answerer_of(server)
        list(
            answerer.generate(
                [Request("q", np.arange(1000), **fields), Request("r", np.arange(1000), **fields)]
            )
        )
        answerer.close()
    assert caplog.text.count("another tokenizer") == said


WORDS = ["<s>", "</s>", "<unk>", *(f"w{number}" for number in range(61))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random model in fp32 with a tokenizer of 61 words, one token a word, as servers open it."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    raw = RawTokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.Sequence([decoders.Replace("w", " w")])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}w1 {{ message['content'] }} w2 {% endfor %}"
    fast.save_pretrained(path)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def transformers_serve(folder) -> Iterator[str]:
    with transformers_serving(folder, log=folder.parent / "serve.log") as address:
        yield address


@pytest.mark.slow
def test_a_real_server_gives_the_answers_of_the_same_model_here(folder, transformers_serve, tmp_path):
    """Greedy and in fp32 on both sides: every text is the same, as chat, as completion, as stream, and recorded."""
    model, tokenizer = load_model(str(folder)).eval(), load_tokenizer(folder)
    generator = np.random.default_rng(1)
    prompts = [" ".join(f"w{word}" for word in generator.integers(0, 61, size)) for size in (1, 5, 17, 40)]
    requests = [Request(prompt, max_new_tokens=8) for prompt in prompts]
    for provider, render in (("completions", "{}"), ("openai", "w1 {} w2 ")):
        expected = {}
        for index, prompt in enumerate(prompts):
            ids = tokenizer.encode(render.format(prompt)).astype(np.int64)
            expected[index] = tokenizer.decode(generate_greedy(model, ids, max_new_tokens=8, push=(1).__eq__))
        for _ in range(2):
            answers = str(tmp_path / "answers.sqlite")
            how = ServerConfig(base_url=transformers_serve, cache=answers)
            answerer = open_remote(f"{provider}:{folder}", how)
            answers = dict(answerer.generate(requests))
            pieces: list[str] = []
            streamed = answerer.generate_stream(Request(prompts[2], max_new_tokens=7), pieces.append)
            answerer.close()
            assert {index: answer.text.split() for index, answer in answers.items()} == {
                index: text.split() for index, text in expected.items()
            }
            assert len({answer.text for answer in answers.values()}) > 1, "guard: they are not all alike"
            assert "".join(pieces) == streamed.text and streamed.error is None
            assert expected[2].split()[:7] == streamed.text.split()
        assert answers[2].prompt_tokens == len(tokenizer.encode(render.format(prompts[2])))


@pytest.mark.slow
def test_a_real_server_has_no_such_model(folder, transformers_serve):
    answerer = open_remote("openai:no-such-model", ServerConfig(base_url=transformers_serve))
    with pytest.raises(UserError, match="no-such-model"):
        list(answerer.generate([Request(f"w{index}") for index in range(20)]))
    answerer.close()
