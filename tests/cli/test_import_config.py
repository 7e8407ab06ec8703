"""`longspan import-config` prints or writes a recipe that says what became of every key."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

CONFIG = """\
base_model: model
sequence_len: 128
datasets: [{path: chats.jsonl, type: chat_template}]
learning_rate: 1e-4
frobnicate: "two\\nlines"
val_set_size: 0.1
flash_attention: true
"""


def test_the_recipe_that_is_printed_is_the_one_that_is_written(longspan, tmp_path, monkeypatch):
    """Notes are comments: a value of two lines must not become a setting."""
    monkeypatch.chdir(tmp_path)
    Path("axolotl.yaml").write_text(CONFIG)
    printed = longspan("import-config axolotl.yaml")
    shown = longspan("import-config axolotl.yaml --out recipe.yaml")
    assert printed.code == shown.code == 0
    assert Path("recipe.yaml").read_text() == printed.out
    recipe = yaml.safe_load(printed.out)
    assert recipe["stages"][0]["context_length"] == 128
    for part in (
        "frobnicate: two lines",
        "val_set_size: 0.1",
        "flash_attention",
        "Left out there",
        "give --processes",
    ):
        assert part in printed.out
    assert "NOT carried over" in shown.out and "frobnicate" in shown.out
    notes = json.loads(longspan("import-config axolotl.yaml --json").out)["notes"]
    assert {note["key"] for note in notes} >= {"base_model", "sequence_len", "frobnicate", "val_set_size"}


def test_a_mistake_is_one_message(longspan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("axolotl.yaml").write_text(CONFIG.replace("128", "many"))
    outcome = longspan("import-config axolotl.yaml --out made.yaml")
    assert outcome.code == 2 and "sequence_len is no number" in outcome.err and "Traceback" not in outcome.err
    assert not Path("made.yaml").exists()
