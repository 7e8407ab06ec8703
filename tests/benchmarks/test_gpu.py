"""The GPU benchmark runs without a GPU: every section on tiny sizes, and what happens when one of them dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_all_sections_run_on_cpu(tmp_path: Path) -> None:
    """The one run on a GPU must not be spent on a signature that changed. Errors are rows, numbers agree."""
    out, table = tmp_path / "gpu.json", tmp_path / "gpu.md"
    done = bench("--dry-run", "--out", str(out), "--markdown", str(table))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    sections = list(dict.fromkeys(row["section"] for row in rows))
    assert sections == ["machine", "correctness", "zigzag", "attention", "loss", "tiled_mlp", "checkpointing"]
    failed = [row for row in rows if "error" in row]
    # FlexAttention has no backward pass on CPU: a failure that is always there.
    assert {row.get("kernel") for row in failed} == {"flex"}, failed
    assert all("backward" in row["error"] for row in failed)
    assert all(row["passed"] for row in rows if row["section"] == "correctness")
    compared = [row for row in rows if "difference" in row]
    assert len(compared) >= 20 and all(row["difference"] <= 1e-5 for row in compared)
    assert [row["ranks"] for row in rows if "total_of_ideal" in row] == [2, 3, 4] * 2
    assert table.read_text().strip() == done.stdout.strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


def test_the_ladder_runs_on_cpu(tmp_path: Path) -> None:
    """Nine minutes of a GPU are there once: every section and column of the ladder is tried before."""
    out = tmp_path / "ladder.json"
    done = bench("--ladder", "--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    sections = list(dict.fromkeys(row["section"] for row in rows))
    assert sections == ["machine", "correctness", "versions", "train", "decode", "needles"]
    # FlashAttention-3 and -4 are for other machines.
    assert {row.get("flash") for row in rows if "error" in row} <= {"fa3", "fa4"}, rows
    trained = [row for row in rows if row["section"] == "train"]
    assert len(trained) == 4 and all(row["tokens_per_second"] > 0 for row in trained)
    (grid,) = [row for row in rows if row["section"] == "needles"]
    assert grid["answers"] == 20 and grid["tokens_read"] < 20 * 100


def test_a_section_that_dies_or_hangs_leaves_the_others() -> None:
    """A broken CUDA context or an endless kernel must cost its own rows only."""
    code = """
        import os, sys, threading
        import gpu
        def dies(scale, deadline):
            yield deadline.row({"case": "first"}, lambda: {"total_ms": 1.0})
            os._exit(3)
        def hangs(scale, deadline):
            yield {"section": "attention", "case": "second", "total_ms": float("nan")}
            threading.Event().wait()
        def late(scale, deadline):
            yield deadline.row({"case": "third"}, lambda: 1 / 0)
        gpu.GRACE_SECONDS = 2.0
        gpu.SECTIONS.update(zigzag=(dies, 5.0), attention=(hangs, 0.0), loss=(late, -9.0))
        sys.argv = ["gpu.py", "--dry-run", "--only", "zigzag,attention,loss,tiled_mlp"]
        gpu.main()
        """
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for cell in (
        "| first | 1 |",
        "the process ended with exit code 3",
        "| second | nan |",
        "stopped after 2 s",
        "| third | not run: the time of the section was up |",
        "| 64 | whole row |",
    ):
        assert cell in done.stdout, (cell, done.stdout)


def test_what_cannot_run_is_said() -> None:
    """A run without a GPU that prints an empty table, or a misspelt section that runs nothing."""
    done = bench("--only", "loss")
    assert done.returncode == 1
    assert "torch sees no CUDA device here; --dry-run" in done.stderr
    done = bench("--only", "loss,atention")
    assert done.returncode == 2
    assert "no such section: atention" in done.stderr


@pytest.mark.parametrize("lengths", [[1024], [1, 127, 128, 300, 212, 256], [100] * 10 + [24]])
def test_flex_blocks_are_those_of_the_mask(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block left out is a wrong peer; a partial one called full, a leak; a full one called partial, a slow peer."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_attention import FLEX_BLOCK, flex_blocks

    document = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(document))
    visible = (place[:, None] >= place[None]) & (document[:, None] == document[None])
    blocks = torch.from_numpy(visible).view(8, FLEX_BLOCK, 8, FLEX_BLOCK).float().mean((1, 3)).numpy()
    partial, full = flex_blocks(document)
    assert (partial == ((blocks > 0) & (blocks < 1))).all()
    assert (full == (blocks == 1)).all()
