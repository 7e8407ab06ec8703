"""The registry of evaluation tasks: every entry leads to a task, names stand once, packages can add theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.core.config import Config
from longspan.core.errors import ArgumentError
from longspan.core.places import load_place
from longspan.data.tokenizer import Tokenizer
from longspan.eval import registry
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.registry import Axes, TaskEntry, entries, entry_of, register
from longspan.eval.scorers import SCORERS, Scorer, register_scorer, scorer_named

SMALL = {"lengths": (4096,), "samples": 1}
CONFIGS = {"needle_distractors": {"num_distractors": 1}, "lines": {"kind": "lines"}}
CONFIGS["needle_multi"] = {"num_needles": 2, "mode": "generate"}


@pytest.fixture
def own(monkeypatch):
    """A registry that forgets what the test adds."""
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


@pytest.mark.parametrize(
    "name",
    [n for n, entry in entries().items() if entry.task and (not entry.data or "Default" in entry.data)],
)
def test_every_task_is_made_in_one_way(tokenizer, name):
    """An entry whose places, name, scorers or axes are not those of the task would break its command or its report."""
    entry = entries()[name]
    config_class = load_place(entry.config)
    values = {key: value for key, value in SMALL.items() if key in config_class.model_fields}
    config = config_class.from_dict(values | CONFIGS.get(name, {}))
    task = load_place(entry.task).from_config(config, TaskDataConfig(), PromptForm(tokenizer))
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


def table(text: str, head: str) -> list[list[str]]:
    """Return the cells of the table of a page that has this head."""
    rows = text.partition(f"{head}\n")[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_page_lists_every_task_and_scorer():
    """A task or a rule that the docs do not name is found by nobody; one that is gone is looked for in vain."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    ours = [
        [
            f"`{entry.name}`",
            f"`{entry.command or entry.name}`",
            entry.title,
            " x ".join(f"`{axis}`" for axis in (entry.axes.rows, entry.axes.columns) if axis)
            if entry.axes
            else "",
        ]
        for entry in registry._BUILT_IN
    ]
    assert table(page, "| Records | `longspan eval` | What is asked | Axes |") == ours
    assert table(page, "| Scorer | |") == [[f"`{name}`", scorer.says] for name, scorer in SCORERS.items()]


def test_scorers_are_added_once():
    """A second rule of one name would give other scores under it."""
    rule = Scorer("errors", 1, lambda expected, output, fields: 0.0, "counts", higher_is_better=False)
    try:
        register_scorer(rule)
        register_scorer(rule)
        assert scorer_named("errors") is rule
        with pytest.raises(ArgumentError, match="of this name"):
            register_scorer(Scorer("errors", 2, rule.rule))
    finally:
        del SCORERS["errors"]


def test_no_setting_of_a_task_is_hidden_by_one_of_the_prompt(tokenizer: Tokenizer) -> None:
    """A header is both together: of two of one name the first was lost, and runs that differ in it were one."""
    said = PromptForm(tokenizer, chat_server=True, template_args={"deep": True}, max_new_tokens=8).params()
    for entry in registry.built_in().values():
        if entry.config:
            hidden = said.keys() & load_place(entry.config).model_fields.keys()
            # Of needles both stand under other names.
            known = {"answer_prefix", "max_new_tokens"} if entry.config.endswith(":NeedleConfig") else set()
            assert hidden <= known, entry.name
