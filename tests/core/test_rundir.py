"""Run folders: taken up with the same settings, refused with others, complete only at the end."""

from __future__ import annotations

import pytest

from longspan.core.config import Config
from longspan.core.errors import ArgumentError, ConfigError, RunError
from longspan.core.files import read_json
from longspan.core.records import read_jsonl
from longspan.core.rundir import RunDir


class Stage(Config):
    lr: float = 1e-4
    data: str = "12e5"  # looks like a number in YAML


class Recipe(Config):
    name: str = "a"
    stages: tuple[Stage, ...] = (Stage(), Stage())


def test_created_and_taken_up_again(tmp_path):
    run = RunDir.create(tmp_path / "runs" / "a", Recipe(), seed=3)
    again = RunDir.create(tmp_path / "runs" / "a", Recipe(), seed=3)
    assert [event["event"] for event in read_jsonl(run.path / "events.jsonl")] == ["created", "resumed"]
    assert Recipe.from_yaml(again.path / "config.yaml") == Recipe()
    environment = read_json(run.path / "env.json")
    assert environment["seed"] == 3
    assert environment["versions"]["longspan"]


def test_other_settings_are_refused_and_named(tmp_path):
    """Going on with other settings would join two different runs into one."""
    RunDir.create(tmp_path, Recipe(), seed=0)
    other = Recipe(name="b", stages=(Stage(), Stage(lr=3e-4)))
    with pytest.raises(ConfigError) as caught:
        RunDir.create(tmp_path, other, seed=0)
    assert "name was 'a', is 'b'" in str(caught.value)
    assert "stages.1.lr was 0.0001, is 0.0003" in str(caught.value)
    assert "stages.0" not in str(caught.value)
    assert Recipe.from_yaml(tmp_path / "config.yaml") == Recipe()  # still the old ones


def test_no_run_begins_inside_something_else(tmp_path):
    """A run written into a token store or a model folder mixed the two for good."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "longspan.json").write_text("{}")
    with pytest.raises(ArgumentError, match="store, plan or model"):
        RunDir.create(tmp_path / "store", Recipe(), seed=3)
    assert [each.name for each in (tmp_path / "store").iterdir()] == ["longspan.json"]


def test_another_number_of_stages_is_a_difference(tmp_path):
    RunDir.create(tmp_path, Recipe(), seed=0)
    with pytest.raises(ConfigError, match="stages was"):
        RunDir.create(tmp_path, Recipe(stages=(Stage(),)), seed=0)


def test_phases_add_up_over_takes_and_failures(tmp_path):
    run = RunDir.create(tmp_path, Recipe(), seed=0)
    with run.phase("train"):
        pass
    with pytest.raises(ZeroDivisionError), run.phase("train"):
        raise ZeroDivisionError
    run.event("phase", phase="train", seconds=2.5)
    run.event("phase", phase="eval", seconds=1.0)
    phases = run.phase_seconds()
    assert phases["train"] == pytest.approx(2.5, abs=0.1)
    assert phases["eval"] == 1.0
    assert len(list(read_jsonl(tmp_path / "events.jsonl"))) == 5


def test_complete_is_said_last(tmp_path):
    run = RunDir.create(tmp_path, Recipe(), seed=0)
    assert not run.is_complete
    run.mark_complete()
    assert RunDir(tmp_path).is_complete


def test_leftovers_of_a_killed_run_go(tmp_path):
    RunDir.create(tmp_path, Recipe(), seed=0)
    (tmp_path / ".config.yaml.0123abcd.tmp").write_text("half")
    RunDir.create(tmp_path, Recipe(), seed=0)
    assert not list(tmp_path.glob(".*"))


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(RunError, match="choose another place"):
        RunDir.create(tmp_path / "a", Recipe(), seed=0)
