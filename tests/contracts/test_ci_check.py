"""The check of what the quickstart left notices what it is there to notice."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "check_quickstart.py"
PAGE = "<html><svg></svg><a href='https://example.org'>a link is not a load</a>" + " " * 30_000 + "</html>"


@pytest.fixture(scope="module")
def check():
    specification = importlib.util.spec_from_file_location("check_quickstart", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path, check):
    """A run folder with which nothing is wrong."""
    results = {
        "seed": 0,
        "needle": {label: {"mean": 0.5, "scored": 4} for label in check.LABELS},
        "ppl": {label: {"by_length": {"128": 9.5}} for label in check.LABELS},
        "seconds": {"total": 3.0},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "report.html").write_text(PAGE)
    for name in ("COMPLETE", "config.yaml", "env.json"):
        (tmp_path / name).write_text("")
    return tmp_path


def test_whole_run_passes(check, run):
    assert list(check.problems(run)) == []


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda results: results.pop("ppl"), "has no 'ppl'"),
        (lambda results: results["needle"].pop("after"), "no needle result of 'after'"),
        (lambda results: results["needle"]["before"].update(scored=0), "of 0 samples"),
        (lambda results: results["needle"]["before"].update(mean=None), "mean None"),
        (lambda results: results["ppl"]["pi"].update(by_length={"128": None}), "perplexity pi"),
        (lambda results: results["seconds"].update(total=float("nan")), "seconds.total is nan"),
    ],
)
def test_missing_and_senseless_numbers(check, run, change, part):
    results = json.loads((run / "results.json").read_text())
    change(results)
    (run / "results.json").write_text(json.dumps(results))
    assert any(part in problem for problem in check.problems(run))


@pytest.mark.parametrize(
    "load",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<img alt='' src='//cdn.example/x.png'>",
        '<link rel="stylesheet" href="http://cdn.example/x.css">',
        "<style>body { background: url(https://cdn.example/x.png) }</style>",
        '<style>@import "https://cdn.example/x.css";</style>',
        "<script>fetch('https://cdn.example/data.json')</script>",
    ],
)
def test_page_that_needs_the_network(check, run, load):
    (run / "report.html").write_text(PAGE + load)
    assert any("loads from the network" in problem for problem in check.problems(run))


def test_embedded_image_is_no_load(check, run):
    (run / "report.html").write_text(PAGE + '<img src="data:image/png;base64,AAAA">')
    assert list(check.problems(run)) == []


def test_empty_page_and_missing_files(check, run):
    (run / "report.html").write_text("<html></html>")
    (run / "COMPLETE").unlink()
    found = " ".join(check.problems(run))
    assert "COMPLETE is missing" in found
    assert "report.html has 13 bytes" in found
    assert "shows no figure" in found
