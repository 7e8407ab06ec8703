"""The registry of evaluation tasks: every entry leads to a task, names stand once, packages can add theirs."""

from __future__ import annotations

import pytest

from longspan.core.config import Config
from longspan.core.errors import ArgumentError
from longspan.eval import registry
from longspan.eval.held_out import TaskData
from longspan.eval.prompts import PromptForm
from longspan.eval.registry import Axes, TaskEntry, entries, entry_of, loaded, register
from longspan.eval.scorers import SCORERS

SMALL = {"lengths": (4096,), "samples": 1}
CONFIGS = {"needle_distractors": {"num_distractors": 1}, "lines": {"kind": "lines"}}
CONFIGS["needle_multi"] = {"num_needles": 2, "mode": "generate"}


@pytest.fixture
def own(monkeypatch):
    """A registry that forgets what the test adds."""
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


@pytest.mark.parametrize("name", [n for n, entry in entries().items() if entry.task and n != "longqa"])
def test_every_task_is_made_in_one_way(tokenizer, name):
    """An entry whose places, name, scorers or axes are not those of the task would break its command or its report."""
    entry = entries()[name]
    config_class = loaded(entry.config)
    values = {key: value for key, value in SMALL.items() if key in config_class.model_fields}
    config = config_class.from_dict(values | CONFIGS.get(name, {}))
    task = loaded(entry.task).from_config(config, TaskData(), PromptForm(tokenizer))
    assert issubclass(config_class, Config)
    assert task.name == name
    assert task.scorer in (*entry.scorers, "by_metric")
    assert set(entry.scorers) <= SCORERS.keys()
    planned = task.plan()[0]
    assert {axis for axis in entry.axes if axis} <= planned.fields.keys()


def test_registering(own):
    """A second task of one name would take over the first one's records."""
    mine = TaskEntry("mine", "Something is asked.", axes=Axes(rows="num_needles"))
    register(mine)
    register(mine)
    assert entry_of("mine") is mine and entry_of("nobody's") is None
    assert mine.described()["heading"] == "Mine"
    with pytest.raises(ArgumentError, match="of this name"):
        register(TaskEntry("needle", "Another one."))
    with pytest.raises(ArgumentError, match="at no place"):
        register(TaskEntry("other", "One.", task="other.Task"))
    with pytest.raises(ArgumentError, match="fields of every record"):
        register(TaskEntry("other", "One.", axes=Axes(rows="kind")))


def test_installed_packages_add_tasks(own, monkeypatch):
    """A task of an installed package that is known only after an import by hand has no command."""

    class Point:
        name = "theirs"

        def __init__(self, found):
            self.load = lambda: found

    def installed(found):
        registry._register_installed.cache_clear()
        monkeypatch.setattr(registry, "entry_points", lambda group: [Point(found)])
        return entries()

    assert "theirs" in installed(TaskEntry("theirs", "Theirs is asked."))
    with pytest.raises(ArgumentError, match="is not a task"):
        installed("theirs")
    monkeypatch.undo()
    registry._register_installed.cache_clear()
