"""Running a task: what is recorded, what a kill costs, what counts and what does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.core.errors import ConfigError, DataError
from longspan.core.intervals import score_interval, wilson_interval
from longspan.data.tokenizer import Tokenizer
from longspan.eval import runner
from longspan.eval.records import read_records
from longspan.eval.runner import run_task
from longspan.eval.summaries import mean_by
from longspan.eval.task import Built, Mode, Planned
from longspan.infer.requests import NOT_FINITE, Answer, Request
from tests.eval.answerers import Knowing


class Copying:
    """A task of `count` prompts in groups of three: "copy n" is to be answered by n."""

    name = "copying"

    def __init__(self, count: int = 7, *, mode: Mode = "generate", scorer: str = "exact_match") -> None:
        self.count, self.mode, self.scorer = count, mode, scorer
        self.built: list[int] = []
        self.broken: set[int] = set()

    def params(self) -> dict[str, Any]:
        return {"count": self.count, "seed": 3}

    def plan(self) -> list[Planned]:
        return [
            Planned(
                (number,), 10 + number, group=f"group {number // 3}", fields={"length": 10, "number": number}
            )
            for number in range(self.count)
        ]

    def build(self, planned: Planned) -> Built:
        number = int(planned.key[0])
        if number in self.broken:
            raise DataError("no border here")
        self.built.append(number)
        ids = np.arange(10 + number)
        request = Request(f"copy {number}", ids, answer_ids=np.array([number + 4]), max_new_tokens=2)
        return Built(request, {"question": f"copy {number}"}, str(number))

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"by_length": mean_by(samples, "length")}


def answer_of(prompt: str) -> str:
    return prompt.removeprefix("copy ")


@pytest.fixture()
def knowing(tokenizer: Tokenizer) -> Knowing:
    return Knowing(tokenizer, knows=answer_of)


def run(task: Any, answerer: Knowing, out: Path, tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    return run_task(task, answerer, out=out, **{"tokenizer": tokenizer, "label": "before", **changes})


def lines_of(path: Path) -> list[bytes]:
    """Return the lines of a records file without its header, which holds the date."""
    return path.read_bytes().split(b"\n")[1:]


def test_perfect_answers_score_one(knowing: Knowing, records: Path, tokenizer: Tokenizer) -> None:
    """The whole way from prompt to summary must let a perfect model reach the maximum."""
    summary = run(Copying(), knowing, records, tokenizer, label="ntk", note="a remark")
    assert (summary["samples"], summary["scored"], summary["unscored"]) == (7, 7, {})
    assert summary["mean"] == 1.0
    assert summary["interval"] == wilson_interval(7, 7)
    assert summary["by_length"] == [
        {"length": 10, "samples": 7, "scored": 7, "mean": 1.0, "interval": wilson_interval(7, 7)}
    ]
    found = read_records(records)
    assert found.complete
    header = found.header
    assert (header["task"], header["label"], header["seed"], header["note"]) == (
        "copying",
        "ntk",
        3,
        "a remark",
    )
    assert header["params"] == {
        "count": 7,
        "seed": 3,
        "mode": "generate",
        "scorer": {"name": "exact_match", "version": 1},
    }
    first = next(sample for sample in found.samples if sample["number"] == 0)
    assert {**first, "id": "", "prompt_sha256": len(first["prompt_sha256"])} == {
        "kind": "sample",
        "id": "",
        "length": 10,
        "number": 0,
        "output": "0",
        "expected": "0",
        "score": 1.0,
        "prompt_sha256": 64,
        "prompt_tokens": 10,
        "completion_tokens": None,
        "seconds": 0.25,
        "finish": "stop",
        "question": "copy 0",
        "unscored": None,
    }
    assert len({sample["id"] for sample in found.samples}) == 7


def test_groups_are_asked_together_and_the_longest_first(
    knowing: Knowing, records: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group cut apart reads its prefix again; what does not fit into memory should fail at once."""
    monkeypatch.setattr(runner, "PART_TOKENS", 40)
    run(Copying(), knowing, records, tokenizer)
    assert knowing.calls == [1, 3, 3]  # the last group holds number 6 alone, with 16 tokens
    asked = [int(answer_of(request.prompt)) for request in knowing.seen]
    assert asked == [6, 3, 4, 5, 0, 1, 2]


def test_large_groups_are_cut(
    knowing: Knowing, records: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompts of a grid up to 1M tokens would fill the memory before the first is read."""
    monkeypatch.setattr(runner, "PART_TOKENS", 1)
    monkeypatch.setattr(runner, "GROUP_TOKENS", 25)
    run(Copying(), knowing, records, tokenizer)
    assert knowing.calls == [1, 1, 1, 1, 2, 1]
    assert read_records(records).complete


def test_small_groups_share_a_call(knowing: Knowing, records: Path, tokenizer: Tokenizer) -> None:
    """One call a group would leave batches and servers idle."""
    run(Copying(), knowing, records, tokenizer)
    assert knowing.calls == [7]


def test_run_that_was_cut_at_any_byte_goes_on(knowing: Knowing, records: Path, tokenizer: Tokenizer) -> None:
    """A kill can stop a write anywhere; nothing may be lost, doubled or asked again."""
    run(Copying(3), knowing, records, tokenizer)
    whole = records.read_bytes()
    expected = sorted(lines_of(records))
    borders = [index for index, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {0, *range(1, len(whole), 173), *borders, *(border + 1 for border in borders), len(whole) - 1}
    for cut in sorted(cuts):
        records.write_bytes(whole[:cut])
        kept = sum(b'"sample"' in line and line in whole.split(b"\n") for line in whole[:cut].split(b"\n"))
        knowing.seen.clear()
        run(Copying(3), knowing, records, tokenizer)
        assert sorted(lines_of(records)) == expected, cut
        assert len(knowing.seen) == 3 - kept, cut


def test_finished_run_composes_and_asks_nothing(
    knowing: Knowing, records: Path, tokenizer: Tokenizer
) -> None:
    """Asking twice is free and gives the same summary."""
    first = run(Copying(), knowing, records, tokenizer)
    whole = records.read_bytes()
    knowing.seen.clear()
    again = Copying()
    second = run(again, knowing, records, tokenizer)
    assert knowing.seen == [] and again.built == []
    assert records.read_bytes() == whole
    assert {**first, "samples_per_s": 0} == {**second, "samples_per_s": 0}


def test_answers_are_on_disk_before_the_next_is_asked(records: Path, tokenizer: Tokenizer) -> None:
    """Answers that wait in memory for the end of their batch are lost with it."""
    lines: list[int] = []

    def counting(prompt: str) -> str:
        lines.append(records.read_bytes().count(b'"sample"'))
        return answer_of(prompt)

    run(Copying(), Knowing(tokenizer, knows=counting), records, tokenizer)
    assert lines == list(range(7))


KILLED = """
import sys, time
from pathlib import Path
from longspan.data.tokenizer import load_tokenizer
from tests.eval.answerers import Knowing
from tests.eval.test_runner import Copying, answer_of, run

def slowly(prompt):
    with open(sys.argv[3], "a") as asked:
        asked.write(prompt + "\\n")
    time.sleep(float(sys.argv[4]))
    return answer_of(prompt)

tokenizer = load_tokenizer(sys.argv[1])
run(Copying(20), Knowing(tokenizer, knows=slowly), Path(sys.argv[2]), tokenizer)
"""


def test_killed_process_asks_for_nothing_it_has_recorded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """kill -9 in the middle, then the same command: every recorded answer stays, none is asked for twice."""
    records, asked = tmp_path / "records.jsonl", tmp_path / "asked"
    command = [sys.executable, "-c", KILLED, str(tokenizer.path.parent), str(records), str(asked)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "0.05"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if records.exists() and records.read_bytes().count(b'"sample"') >= 4:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    kept = {sample["number"] for sample in read_records(records).samples}
    assert 4 <= len(kept) < 20
    asked.unlink()
    subprocess.run([*command, "0"], env=environment, check=True, stderr=subprocess.DEVNULL)
    again = {int(answer_of(line)) for line in asked.read_text().splitlines()}
    assert again == set(range(20)) - kept
    assert read_records(records).complete


def test_other_settings_refuse_to_continue(knowing: Knowing, records: Path, tokenizer: Tokenizer) -> None:
    """A file of another grid, model or metric is left as it is."""
    run(Copying(), knowing, records, tokenizer)
    whole = records.read_bytes()
    with pytest.raises(ConfigError, match=r"params\.count"):
        run(Copying(8), knowing, records, tokenizer)
    with pytest.raises(ConfigError, match=r"params\.scorer\.name"):
        run(Copying(scorer="contains"), knowing, records, tokenizer)
    with pytest.raises(ConfigError, match="label"):
        run(Copying(), knowing, records, tokenizer, label="after")
    assert records.read_bytes() == whole


def test_sample_that_cannot_be_built_or_answered_is_unscored(records: Path, tokenizer: Tokenizer) -> None:
    """Missing is not zero: the mean is over the scored ones, the reason is recorded and counted."""
    task = Copying()
    task.broken = {2}
    answerer = Knowing(tokenizer, knows=answer_of, fails={3: "server gave 500"})
    summary = run(task, answerer, records, tokenizer)
    assert summary["mean"] == 1.0
    assert (summary["samples"], summary["scored"]) == (7, 5)
    assert summary["unscored"] == {"no border here": 1, "server gave 500": 1}
    assert summary["by_length"][0]["samples"] == 7 and summary["by_length"][0]["scored"] == 5
    unscored = {sample["unscored"]: sample for sample in read_records(records).samples if sample["unscored"]}
    for sample in unscored.values():
        assert sample["score"] is None and sample["output"] == ""
    # What was planned is recorded all the same, or a report could not place the sample.
    assert unscored["no border here"]["number"] == 2
    assert unscored["server gave 500"]["expected"] != ""


def test_unscored_samples_are_asked_again_when_that_is_wanted(records: Path, tokenizer: Tokenizer) -> None:
    """A server that was down for a minute must not cost the whole run; what is scored is left alone."""
    answerer = Knowing(tokenizer, knows=answer_of, fails={3: "timeout", 5: "timeout"})
    assert run(Copying(), answerer, records, tokenizer)["scored"] == 5
    failed = {sample["number"] for sample in read_records(records).samples if sample["unscored"]}
    before = len(answerer.seen)
    assert run(Copying(), answerer, records, tokenizer)["scored"] == 5
    assert len(answerer.seen) == before
    summary = run(Copying(), answerer, records, tokenizer, retry_unscored=True)
    assert summary["scored"] == summary["samples"] == 7
    assert {int(answer_of(request.prompt)) for request in answerer.seen[before:]} == failed
    found = read_records(records)
    assert found.complete and len(found.samples) == 7


def test_output_that_is_no_number_is_unscored(records: Path, tokenizer: Tokenizer) -> None:
    """A model that diverged has no accuracy of 0, it has none."""
    answerer = Knowing(tokenizer, nll=float("nan"))
    summary = run(Copying(mode="teacher_forced"), answerer, records, tokenizer)
    assert summary["mean"] is summary["interval"] is None
    assert summary["unscored"] == {NOT_FINITE: 7}
    assert all("answer_nll" not in sample for sample in read_records(records).samples)


def test_teacher_forced_samples_hold_their_loss(records: Path, tokenizer: Tokenizer) -> None:
    """The likelihood of the answer says more than right or wrong, and costs nothing."""
    run(Copying(mode="teacher_forced"), Knowing(tokenizer, nll=0.5), records, tokenizer)
    sample = read_records(records).samples[0]
    assert (sample["answer_nll"], sample["answer_tokens"]) == (0.5, 1)
    assert read_records(records).header["params"]["mode"] == "teacher_forced"


def test_what_an_answer_took_is_recorded(
    records: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report's table of costs adds these up; a server's price stands there only where it is known."""
    answers = [Answer("0", completion_tokens=3, cost=0.25), Answer("1", completion_tokens=2), Answer("2")]
    answerer = Knowing(tokenizer)
    monkeypatch.setattr(answerer, "generate", lambda requests: enumerate(answers))
    run(Copying(count=3), answerer, records, tokenizer)
    found = sorted(read_records(records).samples, key=lambda sample: sample["number"])
    assert [sample["completion_tokens"] for sample in found] == [3, 2, None]
    assert [sample.get("cost", "none") for sample in found] == [0.25, "none", "none"]


def test_too_long_contexts_are_refused_before_anything_runs(records: Path, tokenizer: Tokenizer) -> None:
    """Contexts cut by the model without a word gave published scores of what it had not read."""
    answerer = Knowing(tokenizer, knows=answer_of, max_length=14)
    with pytest.raises(ConfigError, match=r"15, 16 tokens\s+allowed: at most 14"):
        run(Copying(), answerer, records, tokenizer)
    assert not records.exists() and answerer.seen == []
    summary = run(Copying(), answerer, records, tokenizer, too_long="skip")
    # Numbers 0 to 3 have 10 to 13 tokens and an answer of 1.
    assert summary["scored"] == 4 and sum(summary["unscored"].values()) == 3
    assert all("longer than" in reason for reason in summary["unscored"])


def test_one_key_is_one_sample(knowing: Knowing, records: Path, tokenizer: Tokenizer) -> None:
    """The second of two samples with one key would be taken for recorded."""
    task = Copying()
    task.plan = lambda: [Planned((1,), 10), Planned((1,), 10)]  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="planned twice"):
        run(task, knowing, records, tokenizer)


def test_records_hold_no_number_that_json_lacks(
    knowing: Knowing, records: Path, tokenizer: Tokenizer
) -> None:
    """NaN in a line makes the file unreadable for others."""
    run(Copying(), knowing, records, tokenizer)
    for line in records.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_wilson_interval_is_the_published_one() -> None:
    """9 of 10 gives 0.596 to 0.982 (Wilson 1927); a plain normal interval would pass 1."""
    interval = wilson_interval(9, 10)
    assert interval == pytest.approx((0.596, 0.982), abs=1e-3)
    assert wilson_interval(0, 0) is None
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-3)


def test_graded_scores_have_an_interval_of_their_own() -> None:
    """Scores of 0.4 and 0.6 spread less than right and wrong; one score has no spread to go by."""
    assert score_interval([1.0, 0.0, 1.0]) == wilson_interval(2, 3)
    low, high = score_interval([0.4, 0.6] * 50) or (0, 0)
    assert (low, high) == pytest.approx((0.4803, 0.5197), abs=1e-3)
    assert score_interval([0.5]) == wilson_interval(0.5, 1)
    assert score_interval([]) is None


class Telling(Knowing):
    """Says between two answers how far it is."""

    def watch(self, on_share: Any) -> bool:
        self.on_share = on_share
        return True

    def generate(self, requests: Any) -> Any:
        for number, found in enumerate(super().generate(requests)):
            self.on_share((number + 0.5) / len(requests))
            yield found


@pytest.mark.parametrize("kind", [Knowing, Telling])
def test_the_bar_reaches_its_end_once(kind: Any, tokenizer: Tokenizer) -> None:
    """Told of work and of answers, it would count each twice; told of neither, it would stand still."""
    steps: list[int] = []

    class Bar:
        def advance(self, amount: int = 1) -> None:
            steps.append(amount)

        def note(self, text: str) -> None: ...

    model = kind(tokenizer)
    with runner.advancing(Bar(), model, 100) as answered:
        for number, _ in model.generate([Request(str(number)) for number in range(4)]):
            answered(25)
            assert sum(steps) == (25 * (number + 1) if kind is Knowing else int(25 * (number + 0.5)))
    assert sum(steps) == 100
