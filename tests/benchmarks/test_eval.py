"""The benchmark of evaluation: every part on tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_part_runs_on_tiny_sizes(tmp_path: Path) -> None:
    """A task or signature that changed under the benchmark, noticed only when somebody measures again."""
    command = [sys.executable, str(BENCHMARKS / "eval.py"), "--dry-run", "--out", str(tmp_path / "out.json")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    grid, multi_key = results["grid"][0], results["multi_key"][0]
    # Two lengths by three depths over one haystack; three questions on one context.
    assert (grid["cells"], multi_key["cells"]) == (6, 3)
    for row in (grid, multi_key):
        assert row["read"] < row["tokens"]
        assert 0.95 < row["read"] / row["bound"] < 1.05
        assert row["agreeing"] == row["cells"]
    assert [row["prompts"] for row in results["published"]] == [440, 400]
    assert (
        set(results["ruler"]["cold"]) == set(results["ruler"]["warm"]) and len(results["ruler"]["cold"]) == 13
    )
    assert "| easycontext | 440 |" in done.stdout
