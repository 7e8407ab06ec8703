"""A model as judge: strict about its reply, honest about what it did not judge, never asked twice."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.api import Client, Endpoint, Limits, SpendingLimits
from longspan.core.errors import ArgumentError, ConfigError, DataError, RunError
from longspan.eval.judge import (
    CRITERIA,
    judge_file,
    judge_records,
    judge_request,
    parse_rating,
    read_template,
)
from longspan.eval.records import make_header, read_records
from tests.api.fake_server import chat, error, serving
from tests.api.made_clock import MadeClock

MODEL = {"path": "m", "fingerprint": "f", "rope": {}, "trained_length": 256}


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def client_of(server, **options) -> Client:
    endpoint = Endpoint(model="judge-7b", base_url=server.url)
    return Client(endpoint, clock=MadeClock(), limits=Limits(concurrency=2, max_attempts=2), **options)


def write_records(path, outputs, *, complete=True):
    header = make_header(
        "needle",
        "before",
        model_info=MODEL,
        tokenizer="t",
        seed=0,
        params={"scorer": {"name": "exact", "version": 1}},
    )
    lines = [header]
    for number, output in enumerate(outputs):
        unscored = "prompt and answer are too long" if output is None else None
        lines.append(
            {"kind": "sample", "id": f"{number}", "question": f"What is {number}?", "expected": f"{number}",
             "output": output or "", "score": None if unscored else 1.0, "unscored": unscored, "length": 64}
        )  # fmt: skip
    if complete:
        lines.append({"kind": "footer", "samples": len(outputs)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rate(asked):
    """The judge of these tests: rates by the number in the answer."""
    text = asked.body["messages"][0]["content"]
    return chat(re.search(r"<answer>\n(.*?)\n</answer>", text, re.S).group(1))


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 7", 7),
        ("rating:10", 10),
        ("7", 7),
        ("7/10", 7),
        ("**Rating: 1/10**", 1),
        ("Both name the city.\n\nRating: 3.\n", 3),
        ("Rating: 7.5", None),
        ("Rating: 0", None),
        ("Rating: 11", None),
        ("Rating: 100", None),
        ("Rating: -3", None),
        ("about 7", None),
        ("7 or 8", None),
        ("Rating: 7\nBut it could be better.", None),
        ("Rating: seven", None),
        ("", None),
        ("\n \n", None),
    ],
)
def test_only_a_clear_rating_is_one(reply, rating):
    """A number anywhere in the reply is not the rating: `3 of the 10 facts` would be a 3 or a 10."""
    assert parse_rating(reply) == rating


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("It is right.\n\nRating: [[10]]", 10),
        ("[[7]] for what it says, not [[10]].", 7),
        ("Rating: [[5", None),
        ("[[0]]", None),
        ("[[7.5]]", None),
        ("10", 10),
    ],
)
def test_the_published_criteria_are_answered_in_brackets(reply, rating):
    """langchain reads the first [[ ]]; a bare number is what the criteria themselves ask for."""
    assert parse_rating(reply, "kamradt_v1") == rating


def test_the_published_criteria_are_asked_word_for_word(tmp_path):
    """Other words would give other ratings; the mean on the published scale of 1 to 10 is told."""
    records = write_records(tmp_path / "needle-before.jsonl", ["1", "7"])

    def script(asked):
        first, last = asked.body["messages"]
        assert first == {"role": "system", "content": "You are a helpful assistant."}
        text = last["content"]
        assert (
            "accuracy: \n                Score 1: The answer is completely unrelated to the reference.\n"
            in text
        )
        assert "Only respond with a numberical score\n[Ground truth]\n" in text
        found = re.search(
            r"\[The Start of Assistant's Answer\]\n(.*)\n\[The End of Assistant's Answer\]$", text
        )
        return chat(f"Because.\nRating: [[{found.group(1)}]]")

    with serving(script) as server, client_of(server) as client:
        summary = judge_file(records, client, tmp_path / "judged.jsonl", template=CRITERIA["kamradt"])
    assert summary["mean_rating"] == 4.0 and summary["mean"] == pytest.approx(1 / 3)
    header = read_records(tmp_path / "judged.jsonl").header
    assert header["params"]["scorer"]["template"] == "kamradt_v1"


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_reply_is_a_rating_or_none(reply):
    assert parse_rating(reply) in {None, *range(1, 11)}


def test_the_request_holds_the_texts_as_they_are():
    """Dollar signs and braces in an answer are no fields."""
    sample = {"question": "How much?", "expected": ["$5", "{six}"], "output": "$question ${x} $"}
    text = judge_request(sample).messages[0]["content"]
    assert "<question>\nHow much?\n" in text and "<reference>\n$5\n{six}\n" in text
    assert "<answer>\n$question ${x} $\n" in text
    assert "(not recorded)" in judge_request({"expected": "a", "output": "b"}).messages[0]["content"]
    assert re.findall(r"\$\w+", read_template("answer_v1")) == ["$question", "$expected", "$output"]
    with pytest.raises(DataError, match="no 'expected' to judge"):
        judge_request({"output": "b"})


def test_ratings_become_scores_and_replies_are_kept(tmp_path):
    """10 is 1 and 1 is 0; what has no rating is unscored with the reason, and so is what had none before."""
    records = write_records(tmp_path / "needle-before.jsonl", ["10", "1", "Rating: 4", "good", None])
    with serving(rate) as server, client_of(server) as client:
        summary = judge_file(records, client, tmp_path / "judged.jsonl")
    judged = read_records(tmp_path / "judged.jsonl")
    by_question = {sample["question"]: sample for sample in judged.samples}
    found = [by_question[f"What is {number}?"] for number in range(5)]
    assert [sample["score"] for sample in found] == [1.0, 0.0, pytest.approx(1 / 3), None, None]
    assert [sample["unscored"] for sample in found] == [
        None, None, None, "judge: no rating in its reply", "prompt and answer are too long",
    ]  # fmt: skip
    assert found[2]["judge"] == {"rating": 4, "reply": "Rating: 4"}
    assert found[3]["judge"] == {"rating": None, "reply": "good"}
    assert all(sample["length"] == 64 for sample in found), "what was recorded stays"
    assert judged.complete and judged.header["params"]["scorer"]["model"] == "judge-7b"
    assert judged.header["rescored_from"] == read_records(records).header["fingerprint"]
    assert (summary["samples"], summary["scored"], summary["mean"]) == (5, 3, pytest.approx(4 / 9))
    assert len(server.asked) == 4


def test_a_refusal_and_a_cut_reply_are_reasons():
    samples = [{"id": str(n), "expected": "a", "output": str(n), "unscored": None} for n in range(2)]

    def script(asked):
        first = "<answer>\n0\n" in asked.body["messages"][0]["content"]
        return chat(None, finish="content_filter") if first else chat("Rating: 1", finish="length")

    with serving(script) as server, client_of(server) as client:
        reasons = {sample["id"]: sample["unscored"] for sample in judge_records(samples, client)}
    # "Rating: 1" may be the beginning of "Rating: 10".
    assert reasons == {"0": "judge: refused", "1": "judge: its reply was cut short"}


def test_a_stopped_job_goes_on_with_what_is_missing(tmp_path):
    """Neither a used-up budget nor a failing endpoint leaves unscored samples behind: they are missing."""
    records = write_records(tmp_path / "records.jsonl", ["10", "9", "8", "7"])
    out = tmp_path / "judged.jsonl"
    with serving(rate) as server:
        with (
            client_of(server, budget=SpendingLimits(max_requests=2)) as client,
            pytest.raises(RunError, match="2 of 4"),
        ):
            judge_file(records, client, out)
        assert len(read_records(out).samples) == 2 and not read_records(out).complete
    failing = [chat("5"), error(500)]
    with serving(failing) as server, client_of(server) as client, pytest.raises(RunError, match="1 of 4"):
        judge_file(records, client, out)
    with serving(rate) as server, client_of(server) as client:
        assert judge_file(records, client, out)["scored"] == 4
        assert len(server.asked) == 1
        assert judge_file(records, client, out)["scored"] == 4
        assert len(server.asked) == 1, "nothing is missing: nothing is asked"


def test_another_judge_does_not_write_into_the_same_file(tmp_path):
    records, out = write_records(tmp_path / "records.jsonl", ["10"]), tmp_path / "judged.jsonl"
    with serving(rate) as server, client_of(server) as client:
        judge_file(records, client, out)
        with pytest.raises(ArgumentError, match="over their source"):
            judge_file(records, client, records)
        other = Client(Endpoint(model="other", base_url=server.url))
        with pytest.raises(ConfigError, match=r"params\.scorer\.model"):
            judge_file(records, other, out)
        other.close()
