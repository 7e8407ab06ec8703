"""The benchmark of context parallelism runs: every part, small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "parallel.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_counted_bytes_equal_the_closed_forms():
    """A schedule that says more (or less) than the plan: the benchmark stops."""
    lines = bench("bytes", "--world", "2").splitlines()
    assert sum(line.endswith("| yes |") for line in lines) == 21
    assert any(line.startswith("| usp, zigzag | packed, window 20 |") for line in lines)


def test_simulation_covers_the_grid_and_writes_the_plots(tmp_path):
    """A cell that is missing, or a plot that is not drawn, noticed only when somebody measures again."""
    out = bench("scale", "--out", str(tmp_path))
    grids = [
        line for line in out.splitlines() if line.startswith("| 16M | impossible") and line.count("|") == 10
    ]
    assert len(grids) == 3 and all("usp 8x128" in line for line in grids)
    assert "impossible: device memory" in out
    for model in ("llama-3-8b", "llama-3-70b"):
        assert (tmp_path / f"parallel-{model}.png").stat().st_size > 50_000


def test_published_attention_is_set_beside_the_simulation():
    """An empty table, or choices that no assumption changes because none was made."""
    lines = bench("published").splitlines()
    assert any(line.startswith("| ring | 90% | ") for line in lines)
    choices = {line.split("|", 2)[1].strip(): line.split("|", 2)[2] for line in lines if line.count("|") == 9}
    assert {"as it is", "LINK_EFFICIENCY 0.9"} <= choices.keys()
    assert choices["as it is"] != choices["LINK_EFFICIENCY 0.9"]


def test_balance_of_a_synthetic_row():
    """Layouts are measured on borders alone; `balanced` keeps its promise on a packed row."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from parallel_balance import prolong_rows, spread
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    rows = prolong_rows(1, 2**17, seed=0)
    assert rows.rows[0][-1] == 2**17
    found = spread(rows, "balanced", 4)
    assert found.balance.total_ratio <= 1.05
    assert found.worst == found.balance.total_ratio
