"""The command, killed at any time and given again: no recorded answer is asked for twice, the same files come out."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from longspan.core.records import read_jsonl
from longspan.synth import load_set
from tests.api.fake_server import Asked, FakeServer, Reply, error, serving
from tests.patience import PATIENCE_SECONDS
from tests.synth.conftest import SMALL, write_documents
from tests.synth.writer import Writer, document, is_known, question


def command(tmp_path: Path, student, server: FakeServer, out: str, *more: str) -> list[str]:
    spec = {**load_set("one_detail_book").to_dict(), **SMALL, "name": "small"}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(spec))
    return [
        *(sys.executable, "-m", "longspan", "synth", "qa", str(tmp_path / "books.jsonl")),
        *("--set", str(tmp_path / "small.yaml"), "--model", "openai:m", "--base-url", server.url),
        *("--tokenizer", str(student.tokenizer.path.parent), "--chat-template", "qwen", "--length", "2k"),
        *("--out", str(tmp_path / out), *more),
    ]


def start(words: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(words: list[str]) -> None:
    process = start(words)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said.decode()


def kill_when(process: subprocess.Popen, happened) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def bodies(server: FakeServer) -> list[str]:
    return [json.dumps(asked.body, sort_keys=True) for asked in server.asked]


def test_killed_twice_it_goes_on(student, tmp_path):
    """Once while it asks for questions, once in the leak check."""
    concurrency = 3
    write_documents(tmp_path / "books.jsonl", [document(number) for number in range(1, 7)])
    with serving(Writer()) as server:
        finish(command(tmp_path, student, server, "whole", "--used", str(tmp_path / "other.sqlite")))
        total = len(server.asked)
        assert len(set(bodies(server))) == total
    with serving(Writer()) as server:
        words = command(tmp_path, student, server, "out", "--concurrency", str(concurrency))
        for at in (8, total // 2):
            kill_when(start(words), lambda at=at: len(server.asked) >= at)
        finish(words)
        asked = Counter(bodies(server))
    assert len(asked) == total
    assert sum(asked.values()) - total <= 2 * concurrency
    for name in ("train.jsonl", "questions.jsonl", "rejected.jsonl", "depth.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / "out").glob(".*.tmp")), "what was half written is gone"


class Unreliable:
    """Fails at random, at most four times for one prompt."""

    def __init__(self, writer: Writer) -> None:
        self.writer, self.attempts = writer, Counter[str]()
        self.faults: Counter[str] = Counter()

    def __call__(self, asked: Asked) -> Reply:
        prompt = asked.body["messages"][0]["content"]
        self.attempts[prompt] += 1
        draw = random.Random(f"{prompt} {self.attempts[prompt]}").random()
        if self.attempts[prompt] % 5:
            for share, kind, reply in (
                (0.05, "429", error(429, retry_after="0.05")),
                (0.10, "500", error(500)),
                (0.13, "malformed", Reply(200, b'{"choices": [{"mess')),
                (0.14, "hung up", Reply(hang_up=True)),
            ):
                if draw < share:
                    self.faults[kind] += 1
                    return reply
            if draw < 0.15:
                time.sleep(0.2)
        return self.writer(asked)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_requests_with_faults_and_two_kills(student, tmp_path, capsys):
    """Every question that passes stands in the output exactly once, and memory does not grow with the job."""
    concurrency = 16
    # Three or four sections of some eight sentences a document, and a leak check for each question.
    write_documents(tmp_path / "books.jsonl", [document(number, 24) for number in range(1, 681)])
    script = Unreliable(Writer())
    began = time.monotonic()
    with serving(script) as server:
        words = command(tmp_path, student, server, "out", "--concurrency", str(concurrency), "--json")
        for at in (2_000, 7_000):
            kill_when(start(words), lambda at=at: len(server.asked) >= at)
        process = start(words)
        peak: list[int] = []
        import psutil

        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak.append(watched.memory_info().rss)
            except psutil.Error:
                break
            time.sleep(0.25)
        said, wrong = process.communicate()
        assert process.returncode == 0, wrong.decode()
        answered = Counter(script.writer.kinds)
        prompts = Counter(script.attempts)
    summary = json.loads(said)
    seconds = time.monotonic() - began
    asked_for = [
        turn["content"].rpartition("\n\n")[2] if place == 0 else turn["content"]
        for sample in read_jsonl(tmp_path / "out" / "train.jsonl")
        for place, turn in enumerate(sample["conversations"][::2])
    ]
    expected = {question(day) for day in script.writer.days if not is_known(day)}
    memory = [value / 2**20 for value in peak]
    with capsys.disabled():
        print(
            f"\n{len(prompts):,} prompts, {sum(prompts.values()):,} requests, {dict(script.faults)}, {answered} in "
            f"{seconds:.0f} s; {len(asked_for):,} questions in {summary['samples']['written']} samples; memory at "
            f"each tenth of the last life {[round(memory[len(memory) * part // 10]) for part in range(10)]} MiB"
        )
    assert len(prompts) >= 10_000
    assert sorted(asked_for) == sorted(expected), "exactly once"
    assert sum(answered.values()) - len(prompts) <= 2 * concurrency
    assert max(memory) - memory[len(memory) // 3] <= 50
