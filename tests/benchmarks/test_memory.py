"""The benchmark of memory against length runs, and sees what it is there to show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_cache_on_the_host_leaves_the_device_as_it_is():
    """A case that measures another method than its name says would make the table a tale."""
    short, long = (
        json.loads(bench("--method", "+ its cache on the host", "--tokens", str(n))) for n in (4096, 6144)
    )
    # 4 layers, keys and values and their gradients, 2 heads of 8 in fp32.
    assert long["host"] - short["host"] == 2048 * 4 * 2 * 2 * 2 * 8 * 4
    assert long["device"] - short["device"] <= 48 * 2048


@pytest.mark.slow
def test_the_tables():
    """Every method runs, computes the same loss and shrinks what the one before it holds."""
    device = bench().split("host, MiB")[0]
    rows = [line.split("|") for line in device.splitlines() if line.startswith("| ")]
    slopes = {cells[1].strip(): int(cells[-2].replace(",", "")) for cells in rows[1:]}
    assert len(slopes) == 7
    assert slopes["plain"] > slopes["chunked loss"] > slopes["+ checkpointing"] > slopes["+ offload"]
    assert slopes["+ its cache on the host"] <= 48 < slopes["+ chunk-recurrent"]
