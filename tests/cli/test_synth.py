"""`longspan synth` from the command line: what it prints, what it costs, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.api.fake_server import error, serving
from tests.synth.writer import Writer, document

SMALL = "--min-tokens 100 --max-tokens 5000 --chat-template mistral --tokenizer tokenizer --length 4k"
DETAIL = "--question-set one_detail_book --model openai:m"


@pytest.fixture
def books(corpus, tmp_path, monkeypatch) -> Path:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tokenizer").symlink_to(corpus / "tokenizer")
    lines = [json.dumps({"text": document(number)}) for number in range(1, 4)]
    (tmp_path / "books.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_set_is_made_and_its_counts_are_shown(longspan, books):
    with serving(Writer("fenced")) as server:
        line = f"synth qa books.jsonl {DETAIL} --base-url {server.url} {SMALL} --out synth/d"
        outcome = longspan(line)
        assert outcome.code == 0, outcome.err
        for shown in (
            "documents",
            "known without the document",
            "fence",
            "evidence by depth",
            "3 samples in",
        ):
            assert shown in outcome.out
        before = len(server.asked)
        again = longspan(line + " --json")
        assert again.code == 0 and len(server.asked) == before
    assert json.loads(again.out)["samples"] == {"written": 3}
    assert (books / "synth" / "used.sqlite").exists()
    assert (
        "used by another set"
        in longspan(f"synth qa books.jsonl --offline-templates {SMALL} --out synth/offline").err
    )


def test_the_estimate_sends_nothing_and_needs_no_key(longspan, books):
    """Its requests are those that the job then makes."""
    (books / "prices.yaml").write_text("m: {input: 10, output: 30}\n")
    with serving(Writer()) as server:
        line = f"synth qa books.jsonl {DETAIL} --prices prices.yaml {SMALL} --out d"
        told = longspan(line + " --dry-run --requests-per-minute 6")
        assert told.code == 0 and "nothing was sent" in told.out
        estimate = json.loads(longspan(line + " --dry-run --json").out)
        assert not (books / "d").exists() and not (books / "used.sqlite").exists()
        outcome = longspan(f"{line} --base-url {server.url} --no-leak-check --max-cost 100")
        assert outcome.code == 0, outcome.err
    asking, checks = estimate["asking"], estimate["leak_check"]
    assert asking["requests"] == len(server.asked) and checks["requests"] == 4 * asking["requests"]
    assert asking["cost"] == pytest.approx(
        (10 * asking["prompt_tokens"] + 30 * asking["completion_tokens"]) / 1e6
    )
    assert "cost" in outcome.out


def test_a_budget_ends_with_a_message_and_what_it_did(longspan, books):
    with serving(Writer()) as server:
        line = f"synth qa books.jsonl {DETAIL} --base-url {server.url} {SMALL} --out d"
        outcome = longspan(line + " --max-requests 2")
        assert outcome.code == 1
        assert "max_requests is reached" in outcome.err and "run the same command again" in outcome.err
        assert longspan(line).code == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--model openai:m", "which questions is not said"),
        ("--question-set one_detail_books --model openai:m", "one_detail_book,"),
        ("--question-set one_detail_book", "which model is asked is not said"),
        ("--question-set one_detail_book --model gpt-4o", "openai:NAME"),
        ("--question-set one_detail_book --model openai:m", "OPENAI_API_KEY is not set"),
        (
            "--question-set one_detail_book --model openai:m --max-cost 3 --base-url http://localhost:1/v1",
            "prices",
        ),
        ("--question-set one_detail_book --offline-templates", "asks no model"),
        ("--offline-templates --model openai:m", "--model has no effect"),
        ("--question-set paper_questions --model openai:m --questions 3", "has a fixed list"),
        ("--question-set one_detail_book --model openai:m --extra '{a: '", "--extra"),
        (
            "--question-set one_detail_book --model openai:m --base-url localhost:8000",
            "base_url is not an address",
        ),
    ],
)
def test_mistakes_are_one_message(longspan, books, line, said):
    outcome = longspan(f"synth qa books.jsonl {SMALL} --out d {line}")
    assert outcome.code == 2 and said in outcome.err, outcome.err
    assert not (books / "d" / "config.yaml").exists()


def test_a_key_that_is_refused_is_named_and_not_shown(longspan, books, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret-key")
    with serving([error(401, "Incorrect API key provided: sk-very-secret-key")]) as server:
        outcome = longspan(
            f"synth qa books.jsonl {DETAIL} --base-url {server.url} --key-variable MY_KEY {SMALL} --out d"
        )
    assert outcome.code == 2 and "MY_KEY" in outcome.err and "secret" not in outcome.err + outcome.out
    assert not any(b"very-secret" in path.read_bytes() for path in books.rglob("d/*") if path.is_file())


def test_all_replies_of_no_use_end_in_counts(longspan, books):
    """A model that only chats: nothing crashes, and the end says why there are no samples."""
    with serving(
        lambda asked: Writer()(asked)._replace(body=b'{"choices":[{"message":{"content":"Hm."}}]}')
    ) as server:
        outcome = longspan(f"synth qa books.jsonl {DETAIL} --base-url {server.url} {SMALL} --out d")
    assert outcome.code == 1
    assert "0 samples came out of it" in outcome.err and "reply: no JSON" in outcome.err


def test_the_list_of_sets(longspan):
    outcome = longspan("synth list")
    assert outcome.code == 0
    for shown in ("one_detail_book", "64,000", "2000", "biography v1"):
        assert shown in outcome.out
    names = [each["name"] for each in json.loads(longspan("synth list --json").out)]
    assert names == sorted(names) and len(names) == 9


def test_what_a_job_wrote_makes_it_again(longspan, books):
    """Old names of options fill the same settings, and the folder says all of them."""
    line = f"synth qa books.jsonl --offline-templates {SMALL} --questions 2 --used a.sqlite --out d"
    assert longspan(line).code == 0
    outcome = longspan("synth qa --settings d --used b.sqlite --out e")
    assert outcome.code == 0, outcome.err
    assert (books / "d/train.jsonl").read_bytes() == (books / "e/train.jsonl").read_bytes()
    told = longspan(f"synth qa books.jsonl {DETAIL} {SMALL} --concurrency 2 --window 9k --out f --dry-run")
    assert told.code == 0 and "write --server '{limits: {concurrency: 2}}'" in told.err
    assert "write --server '{max_length: 9k}'" in told.err
