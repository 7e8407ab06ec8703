"""An agent's traces from fetching to the report, with a model that learns to name a call."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.agents import run_chain


def test_chain_runs(tmp_path: Path) -> None:
    """A command of the chain that no longer takes what the one before it wrote."""
    found = run_chain(tmp_path, steps=(1, 1), samples=1)
    assert 0.1 < found["learnt"]["share"] < 0.9
    assert [found["right"][label]["samples"] for label in ("before", "after")] == [2, 2]
    page = (tmp_path / "report.html").read_text()
    assert "before" in page and "after" in page


@pytest.mark.slow
def test_calls_are_named_after_a_short_training(tmp_path: Path) -> None:
    """Masks, prefixes and the task's prompts that do not belong together teach a model nothing."""
    found = run_chain(tmp_path, samples=100)
    before, after = found["right"]["before"], found["right"]["after"]
    assert before["high"] < after["low"]
