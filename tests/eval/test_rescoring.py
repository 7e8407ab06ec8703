from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.passkey import Passkey, PasskeyConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.records import read_records
from longspan.eval.rescoring import rescore
from longspan.eval.runner import run_task
from tests.eval.answerers import Knowing
from tests.patience import PATIENCE_SECONDS

SENTENCE = "Forty eight thousand"


@pytest.fixture()
def recorded(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Records of six samples: the fourth has no answer, the others a sentence around the first number."""
    task = Passkey(PasskeyConfig(lengths=(600,), depths=(0.0, 1.0), samples=3), PromptForm(tokenizer))
    truths = {task.build(planned).request.prompt: task.build(planned).expected for planned in task.plan()}
    answerer = Knowing(tokenizer, knows=lambda prompt: f"It is {truths[prompt]}.", fails={4: "no answer"})
    run_task(task, answerer, tokenizer=tokenizer, label="before", out=tmp_path / "passkey-before.jsonl")
    return tmp_path / "passkey-before.jsonl"


def test_other_scorer_same_texts(recorded: Path, tmp_path: Path) -> None:
    """Scores change, texts and reasons stay, and a header of its own keeps the two apart."""
    out = tmp_path / "again.jsonl"
    summary = rescore(recorded, "exact_match", out)
    old, new = read_records(recorded), read_records(out)
    assert (summary["mean"], summary["scored"], summary["unscored"]) == (0.0, 5, {"no answer": 1})
    assert [sample["score"] for sample in old.samples] == [1.0, 1.0, 1.0, None, 1.0, 1.0]
    assert new.complete and new.header["params"]["scorer"] == {"name": "exact_match", "version": 1}
    assert new.header["fingerprint"] != old.header["fingerprint"] == new.header["rescored_from"]
    assert not {sample["id"] for sample in old.samples} & {sample["id"] for sample in new.samples}
    for before, after in zip(old.samples, new.samples):
        changed = {key for key in before if before[key] != after[key]}
        assert changed <= {"id", "score"}
    unscored = [sample for sample in new.samples if sample["score"] is None]
    assert [sample["unscored"] for sample in unscored] == ["no answer"]


def test_thoughts_in_older_records_are_no_answer(recorded: Path, tmp_path: Path) -> None:
    """Guards against the number of a thought found by another scorer, in records from before these were apart."""
    lines = recorded.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[1:-1]:
        row["output"] = f"<think>I saw {row['expected']}.</think>\n\nI do not know."
    recorded.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = rescore(recorded, "contains", tmp_path / "again.jsonl")
    sample = read_records(tmp_path / "again.jsonl").samples[0]
    assert summary["mean"] == 0.0
    assert (sample["output"], sample["thoughts"]) == ("I do not know.", f"I saw {sample['expected']}.")


def test_same_rule_gives_the_same_scores(recorded: Path, tmp_path: Path) -> None:
    rescore(recorded, "first_number", tmp_path / "again.jsonl")
    scores = [
        [sample["score"] for sample in read_records(path).samples]
        for path in (recorded, tmp_path / "again.jsonl")
    ]
    assert scores[0] == scores[1]


def test_again_writes_nothing_twice(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.jsonl"
    first = rescore(recorded, "rouge_1", out)
    content = out.read_bytes()
    assert rescore(recorded, "rouge_1", out) == first
    assert out.read_bytes() == content
    with pytest.raises(ConfigError, match="other settings"):
        rescore(recorded, "rouge_l", out)


def test_growing_records_stay_open(recorded: Path, tmp_path: Path) -> None:
    """Records of a killed run have no footer; scoring them again must not say that they are whole."""
    lines = recorded.read_text().splitlines(keepends=True)
    recorded.write_text("".join(lines[:3]))
    rescore(recorded, "contains", tmp_path / "again.jsonl")
    again = read_records(tmp_path / "again.jsonl")
    assert len(again.samples) == 2 and not again.complete


def test_mistakes_leave_no_file(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.jsonl"
    with pytest.raises(ArgumentError, match="no such scorer"):
        rescore(recorded, "rouge", out)
    with pytest.raises(ArgumentError, match="all_classes"):
        rescore(recorded, "classification", out)
    with pytest.raises(ArgumentError, match="over their source"):
        rescore(recorded, "rouge_1", recorded)
    header = json.loads(recorded.read_text().splitlines()[0])
    other = {"kind": "sample", "id": "1", "buckets": [], "unscored": None}
    (tmp_path / "ppl.jsonl").write_text(f"{json.dumps(header)}\n{json.dumps(other)}\n")
    with pytest.raises(DataError, match="no texts to score"):
        rescore(tmp_path / "ppl.jsonl", "rouge_1", out)
    assert not out.exists()


def test_needs_no_torch(recorded: Path, tmp_path: Path) -> None:
    """Records are often scored on a machine that could not run the model."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from longspan.eval.rescoring import rescore\n"
        f"print(rescore({str(recorded)!r}, 'contains', {str(tmp_path / 'again.jsonl')!r})['mean'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.stdout.strip() == "1.0", done.stderr
