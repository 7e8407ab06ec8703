"""The page of other trainers says what the tables say that `import-config` translates by."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "make_trainer_keys.py"


def made():
    specification = importlib.util.spec_from_file_location("make_trainer_keys", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_is_made_from_the_tables():
    """After a change of a table: python docs/make_trainer_keys.py"""
    module = made()
    text = module.page()
    assert text == module.PAGE.read_text(encoding="utf-8")
    for part in (
        "## axolotl",
        "| `sequence_len` | `stages.0.context_length` | `512` |",
        "`cutoff_len`",
        "## torchtune",
    ):
        assert part in text


def test_questions_and_answers_become_conversations(tmp_path, monkeypatch):
    """The code on the page is copied as it stands."""
    (code,) = re.findall(r"```python\n(.*?)```", made().HEAD, re.S)
    monkeypatch.chdir(tmp_path)
    Path("alpaca.json").write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}]))
    exec(compile(code, "page", "exec"), {})
    (line,) = Path("alpaca-messages.jsonl").read_text().splitlines()
    assert [turn["content"] for turn in json.loads(line)["messages"]] == ["Add.\n1 2", "3"]
