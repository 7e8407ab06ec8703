"""A task of one's own, one file and one entry: command, list, records, report."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from longspan.cli.eval import app
from longspan.eval import registry
from longspan.eval.records import read_records
from tests.report.conftest import page_of

FILE = Path(__file__).parents[2] / "examples" / "own_task.py"


@pytest.fixture
def own(monkeypatch):
    """The example's entry, registered for this test."""
    specification = importlib.util.spec_from_file_location("own_task", FILE)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "own_task", module)
    specification.loader.exec_module(module)
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    registry.register(module.ENTRY)
    return module.ENTRY


def test_one_file_and_one_entry_are_a_task(own, longspan, model, tmp_path):
    """A new grid task needed a command, a list, a section, figures and a CSV of its own, in six files."""
    assert own.title in longspan("eval list").out
    listed = json.loads(longspan("eval list --json").out)
    assert listed["tasks"]["kv_retrieval"]["axes"] == {"columns": "length", "rows": "depth"}
    assert listed["scorers"]["contains"]["higher_is_better"] is True
    line = "eval kv_retrieval --model model --lengths 192,256 --depths 0,1 --samples 2 --label after --out run --json"
    outcome = longspan(line)
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert summary["scored"] == 8 and len(summary["cells"]) == 4
    records = read_records(tmp_path / "run/records/kv_retrieval-after.jsonl")
    assert records.header["title"] == own.title and records.header["axes"] == {
        "columns": "length",
        "rows": "depth",
    }
    assert all(0 <= record["length"] - record["achieved_length"] < 60 for record in records.samples)
    asked = {record["prompt_sha256"] for record in records.samples}
    assert len(asked) == 8

    registry._REGISTERED.pop(own.name)  # the records say it all
    page = page_of(Path("run"))
    assert (
        'id="kv_retrieval"' in page and own.title in page and "keys and values accuracy at 256 tokens" in page
    )
    assert longspan("report run --out report.html").code == 0
    assert {"kv_retrieval_heatmaps.png", "kv_retrieval_by_length.png"} <= {
        p.name for p in Path("figures").iterdir()
    }
    rows = list(csv.DictReader(Path("tables/kv_retrieval.csv").read_text().splitlines()))
    assert [(row["length"], row["depth"], row["scored"]) for row in rows] == [
        ("192", "0.0", "2"),
        ("256", "0.0", "2"),
        ("192", "1.0", "2"),
        ("256", "1.0", "2"),
    ]
