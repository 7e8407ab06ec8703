"""The benchmark of the data engine runs: every part on tiny text, without the tools it is compared with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="pins processes to cores, which only Linux does"
)
def test_parts_run_on_tiny_text(tmp_path):
    """A command or signature that changed under the benchmark, noticed only when somebody measures again."""
    parts = ["plan", "best_fit", "memory"]
    done = bench("--dry-run", "--only", ",".join(parts), "--work", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["machine", "corpus", *parts]
    ours = results["plan"]["longspan"]
    assert ours["ids_equal"]
    assert ours["output"]["documents"] == results["corpus"]["sources"]["stdlib"]["documents"]
    assert results["best_fit"]["plan_fill"] > 0.9
    assert "| longspan | " in done.stdout and "### Best fit" in done.stdout


def test_unknown_part_is_named():
    """A misspelt part that runs nothing and looks like success."""
    done = bench("--only", "plan,repak")
    assert done.returncode == 2
    assert "no such part: repak" in done.stderr
