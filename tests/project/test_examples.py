"""The examples and the notebook run from top to bottom, and stay short."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pytest

import longspan

EXAMPLES = Path(longspan.__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "whole_way.ipynb"
STEPS = ("whole_way", "compare_rope", "look_at_plans")


def test_examples_of_the_steps_run_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An example that no longer runs is the first thing that a newcomer meets."""
    whole, rope, plans = (runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"] for name in STEPS)
    whole(tmp_path)
    rope(str(tmp_path / "run" / "stages" / "short"), tmp_path / "rope")
    plans(str(tmp_path / "store"), tmp_path / "plans")
    said = capsys.readouterr().out
    assert f"{tmp_path / 'report.html'}" in said and "larger-base: perplexity" in said
    assert "best_fit   8k" in said
    for name in STEPS:
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 40


def code_cells(notebook: Path) -> list[dict]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_without_outputs() -> None:
    """Outputs of somebody's machine would stand in every diff, and look like figures that are promised."""
    for cell in code_cells(NOTEBOOK):
        assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that rely on one another in another order fail for everybody but their author."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, cell in enumerate(code_cells(NOTEBOOK)):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert os.path.getsize("whole-way/report.html") > 10_000
    assert names["perplexity"].keys() == names["found"].keys() == {"before", "theta-only", "after"}
    # What the page shows is what the trainings did: the larger base alone does not do as well.
    assert names["perplexity"]["after"][512] < names["perplexity"]["theta-only"][512]
