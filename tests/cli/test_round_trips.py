"""What a command wrote makes the same again: `--settings` on its records or its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def samples(path: Path) -> list[dict]:
    """Return the samples of a records file, without how long they took."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in records
        if record["kind"] == "sample"
    ]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("passkey --lengths 512 --depths 0,1 --samples 1 --digits 3 --seed 4", "passkey"),
        ("needle --preset fu-2024 --lengths 256 --depths 0:1:2 --samples 1 --data texts --seed 2", "needle"),
        ("needle --lengths 256 --depths 0.5 --samples 1 --multi-key --chat-template qwen", "needle_multikey"),
        ("topics --kind lines --counts 4 --samples 1 --max-new-tokens 3", "lines"),
        ("ppl --data store --lengths 32,64 --stride 16 --num-documents 1", "ppl"),
        ("longqa --data q.jsonl --samples 1 --max-length 200", "longqa"),
        ("harness --tasks long-llm:longbench --subtasks qasper --data-root long --input-length 99", None),
    ],
)
def test_records_make_the_same_evaluation(longspan, model, line, name):
    """A preset, a default or a chat's usual settings that are not written down are others next time."""
    question = json.dumps({"context": "Ada wrote it.", "input": "Who wrote it?", "answers": ["Ada"]}) + "\n"
    Path("q.jsonl").write_text(question)
    Path("long/longbench").mkdir(parents=True)
    Path("long/longbench/qasper.jsonl").write_text(question)
    name = name or "harness-long-llm-longbench"
    outcome = longspan(f"eval {line} --model model --label m --out run")
    assert outcome.code == 0, outcome.err
    first = Path(f"run/records/{name}-m.jsonl")
    again = longspan(f"eval {line.split()[0]} --settings {first} --out again --note second")
    assert again.code == 0, again.err
    second = Path("again") / first.relative_to("run")
    assert samples(second) == samples(first)
    headers = [json.loads(path.read_text().splitlines()[0]) for path in (first, second)]
    assert headers[0]["fingerprint"] == headers[1]["fingerprint"]
    assert headers[1]["settings"] == {**headers[0]["settings"], "note": "second"}


def test_scores_by_another_rule_are_made_again(longspan, model):
    line = "eval passkey --model model --lengths 512 --depths 0 --samples 1 --out run"
    assert longspan(line).code == 0
    records = "run/records/passkey-model.jsonl"
    assert longspan(f"eval rescore {records} --scorer contains --out one.jsonl").code == 0
    outcome = longspan(f"eval rescore {records} --settings one.jsonl --out two.jsonl")
    assert outcome.code == 0, outcome.err
    assert samples(Path("one.jsonl")) == samples(Path("two.jsonl"))


def test_a_question_is_asked_again(longspan, model):
    asked = longspan("ask model --question Why? --max-new-tokens 2 --json")
    Path("asked.json").write_text(asked.out)
    again = longspan("ask --settings asked.json --json")
    assert again.code == 0, again.err
    first, second = json.loads(asked.out), json.loads(again.out)
    assert (second["answer"], second["settings"]) == (first["answer"], first["settings"])
