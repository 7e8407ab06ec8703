"""A job killed at any time goes on: nothing recorded is asked again, nothing is lost or written twice."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.api.fake_server import Asked, FakeServer, Reply, chat, error, serving
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("asking_process.py")


def start(tmp_path: Path, server: FakeServer, **settings) -> subprocess.Popen:
    values = {
        "url": server.url,
        "out": str(tmp_path / "out.jsonl"),
        "cache": str(tmp_path / "answers.sqlite"),
        "report": str(tmp_path / "report.json"),
        "padding": 0,
        "timeout": PATIENCE_SECONDS,
        **settings,
    }
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(values))
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def kill_when(process: subprocess.Popen, happened) -> None:
    """SIGKILL as soon as `happened()`; the process must be at work then."""
    while not happened():
        assert process.poll() is None, "the process ended before it was killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE_SECONDS)


def recorded(tmp_path: Path) -> int:
    with sqlite3.connect(tmp_path / "answers.sqlite") as database:
        count = database.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
    database.close()
    return count


def number_of(asked: Asked) -> int:
    return int(asked.body["messages"][0]["content"].split()[1])


def written(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_kill_twice_and_go_on(tmp_path):
    """Only what was on its way when the process died may be asked again: at most `concurrency` requests a kill."""
    count, concurrency = 60, 4
    settings = {"count": count, "limits": {"concurrency": concurrency}}
    with serving(lambda asked: chat(f"answer {number_of(asked)}", usage=(20, 10))) as server:
        for at in (15, 40):
            before = len(server.asked)
            process = start(tmp_path, server, **settings)
            kill_when(process, lambda at=at: len(server.asked) >= at)
            assert len(server.asked) > before
            left = count - recorded(tmp_path)
            lived = len(server.asked)
        process = start(tmp_path, server, **settings)
        assert process.wait(PATIENCE_SECONDS) == 0
        assert len(server.asked) - lived == left, "recorded answers are not asked for again, others once"
        asked = Counter(number_of(one) for one in server.asked)
    assert sorted(asked) == list(range(count))
    assert sum(asked.values()) - count <= 2 * concurrency
    records = written(tmp_path)
    assert sorted(record["id"] for record in records) == list(range(count))
    assert all(record["text"] == f"answer {record['id']}" for record in records)


def most_in_a_minute(times: list[float], amount: int = 1) -> int:
    """The largest number in any half-open 60 seconds of sorted times, by two pointers."""
    most = first = 0
    for last, time_of_last in enumerate(times):
        while times[first] <= time_of_last - 60:
            first += 1
        most = max(most, last - first + 1)
    return most * amount


class Unreliable:
    """Fails at random, at most four times for one question, and counts what it answered whole."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.attempts: Counter[int] = Counter()
        self.answered: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()

    def __call__(self, asked: Asked) -> Reply:
        number = number_of(asked)
        self.attempts[number] += 1
        draw = random.Random(f"{self.seed} {number} {self.attempts[number]}").random()
        if self.attempts[number] % 5:
            for share, kind, reply in (
                (0.06, "429", error(429)),
                (0.07, "429 with Retry-After", error(429, retry_after="0.2")),
                (0.12, "500", error(500)),
                (0.17, "malformed", Reply(200, b'{"choices": [{"mess')),
                (0.20, "truncated", chat("cut off")._replace(cut=5)),
                (0.21, "hung up", Reply(hang_up=True)),
            ):
                if draw < share:
                    self.kinds[kind] += 1
                    return reply
            if draw < 0.212:
                self.kinds["timeout"] += 1
                time.sleep(7)
            elif draw < 0.23:
                self.kinds["slow"] += 1
                time.sleep(0.3)
        self.answered[number] += 1
        return chat(f"answer {number}", usage=(20, 10))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_requests_to_an_unreliable_server(tmp_path, capsys):
    """All samples exactly once, the limits kept, at least 90 % of them used, memory flat, two kills."""
    count, concurrency, rpm, tpm = 10_000, 32, 3_600, 150_000
    settings = {
        "count": count,
        "padding": 4_000,
        "timeout": 5.0,
        "limits": {
            "concurrency": concurrency,
            "requests_per_minute": rpm,
            "tokens_per_minute": tpm,
            "backoff_seconds": 0.05,
        },
    }
    script = Unreliable(7)
    active, lives = 0.0, []
    with serving(script) as server:
        for at in (4_000, 8_000, None):
            before = len(server.asked)
            process = start(tmp_path, server, **settings)
            if at is None:
                assert process.wait(PATIENCE_SECONDS) == 0
            else:
                kill_when(process, lambda at=at: len(server.asked) >= at)
            times = [one.time for one in server.asked[before:]]
            lives.append((len(times), times[-1] - times[0]))
            active += times[-1] - times[0]
        times = sorted(one.time for one in server.asked)
    ids = [record["id"] for record in written(tmp_path)]
    assert sorted(ids) == list(range(count))
    assert all(record["text"] == f"answer {record['id']}" for record in written(tmp_path))
    stats = json.loads((tmp_path / "report.json").read_text())
    memory = [value / 2**20 for value in stats["memory"]]
    busiest = most_in_a_minute(times)
    used = len(times) / (active * rpm / 60)
    repeated = sum(script.answered.values()) - count
    with capsys.disabled():
        print(
            f"\n{count:,} requests, {len(times):,} attempts ({dict(script.kinds)}), lives {lives};"
            f" busiest minute {busiest:,} of {rpm:,} requests, {30 * busiest:,} of {tpm:,} tokens;"
            f" {100 * used:.1f} % of the rate used; {repeated} answered twice;"
            f" memory {memory[0]:.1f} -> {memory[-1]:.1f} MiB over {len(memory) * 500:,} answers"
        )
    timeouts = script.kinds["timeout"]
    assert busiest <= rpm and 30 * busiest <= tpm
    assert used >= 0.9
    assert repeated <= 2 * concurrency + timeouts
    assert len(memory) >= 3 and memory[-1] - memory[0] <= 8
