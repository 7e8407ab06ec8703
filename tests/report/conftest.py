"""Run folders for the report tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longspan.report import figures
from longspan.report.html import render
from longspan.report.load import load_runs
from tests.report.stress_run import build_stress
from tests.report.synthetic_run import build_evaluated, build_run, header, write_records


def page_of(*runs: Path) -> str:
    """Return the page without figures and tables, which take most of the time."""
    return render(load_runs(runs))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run folder; tests must not write into it."""
    return build_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of evaluations of every kind, without training; tests must not write into it."""
    return build_evaluated(tmp_path_factory.mktemp("runs") / "evaluated")


@pytest.fixture(scope="session")
def stress_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of 20 tasks, 5 models of long names and 12 lengths; tests must not write into it."""
    return build_stress(tmp_path_factory.mktemp("runs") / "stress")


@pytest.fixture
def png_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write each figure once: that all kinds of files are written is a fact of its own test."""
    monkeypatch.setattr(figures, "_KINDS", ("png",))


@pytest.fixture
def needle_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run folder with the given needle sample lines."""

    def build(lines: list[dict[str, Any]], *, label: str = "after", **header_fields: Any) -> Path:
        path = tmp_path / "run"
        write_records(path / f"records/needle-{label}.jsonl", header("needle", label, **header_fields), lines)
        return path

    return build
