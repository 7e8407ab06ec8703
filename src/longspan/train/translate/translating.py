"""A config of another trainer as a recipe, with a note for every key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.config import apply_overrides
from longspan.core.errors import ArgumentError, ConfigError
from longspan.train.config import TrainConfig
from longspan.train.translate.data import put_data
from longspan.train.translate.draft import RecipeDraft
from longspan.train.translate.meanings import Meant, Note
from longspan.train.translate.settings import (
    put_machine,
    put_model,
    put_optimizer,
    put_parallel,
    put_tracking,
)
from longspan.train.translate.sources import read_source, value_at
from longspan.train.translate.stage import put_stage
from longspan.train.translate.tables import KeyTable, flattened, load_tables

__all__ = ["Translation", "translate"]


class Translation(NamedTuple):
    """A recipe made of another trainer's config."""

    tool: str
    """The tool's name."""
    recipe: dict[str, Any]
    """Settings that `TrainConfig` takes, those that are said."""
    notes: list[Note]
    """One for each key of the file, and for what the tool does where the file says nothing."""
    remarks: list[str]
    """What is another thing here, and what is to be looked at."""
    before: list[str]
    """Commands to run before training, in their order."""


def translate(
    path: str | Path, *, tool: str | None = None, processes: int | None = None, overrides: Sequence[str] = ()
) -> Translation:
    """Translate a config file.

    Args:
        path: YAML or JSON of a tool, or a shell script with its command line.
        tool: axolotl, llama-factory, trl, ms-swift or torchtune. None: the one that knows most of the keys.
        processes: GPUs that it ran on, which make the batch. None: what the file says, else as few as it needs.
        overrides: `a.b=c`, applied to the recipe.

    Raises:
        ArgumentError: there is no such tool.
        ConfigError: a file that is none, of no tool or of several, or that asks for what longspan does not do; a
            recipe without a model.
    """
    path = Path(path)
    tables = load_tables()
    if tool is not None and tool not in tables:
        raise ArgumentError("there is no table for such a tool", found=tool, allowed=", ".join(tables))
    if processes is not None and processes < 1:
        raise ArgumentError("so many processes do not train", found=processes, allowed="1 or more")
    commands = [command for table in tables.values() for command in table.commands]
    source = read_source(path, commands)
    table = _table(path, source.values, source.command, tool)
    meant = Meant(source.values, table, where=str(path))
    draft = RecipeDraft(meant, path.parent, processes or source.processes)
    draft.remarks += source.notes
    task = table.tasks.get(source.command or "", table.facts.get("task"))
    for put in (put_model, put_optimizer, put_parallel, put_machine, put_tracking):
        put(draft)
    put_stage(draft, put_data(draft, task or "sft"))
    recipe = apply_overrides(draft.settings(), overrides)
    missing = [setting for setting in draft.missing if value_at(recipe, setting) in (None, {})]
    if missing:
        said = ", ".join(f"{draft.missing[setting]} ({setting})" for setting in missing)
        fix = " ".join(f"--set {setting}=..." for setting in missing)
        raise ConfigError(f"{path} does not say {said}", fix=f"give {fix}")
    TrainConfig.from_dict(recipe, where=f"the recipe made of {path}")
    return Translation(table.name, recipe, meant.notes(), draft.remarks, draft.before)


def _table(path: Path, values: dict[str, Any], command: str | None, tool: str | None) -> KeyTable:
    """Return the table of the tool that a file is of: asked for, by its command, or by its keys."""
    tables = load_tables()
    if tool is not None:
        return tables[tool]
    if command is not None:
        return next(table for table in tables.values() if command in table.commands)
    if "stages" in values and isinstance(values["stages"], list):
        raise ConfigError(f"{path} is a recipe of longspan already", fix=f"longspan train {path}")
    known = {
        name: sum(table.knows(key) for key, _, _ in flattened(values, table))
        for name, table in tables.items()
    }
    most = max(known.values())
    best = [name for name, count in known.items() if count == most]
    if most == 0:
        raise ConfigError(
            f"{path} is a config of no tool that longspan knows",
            found=f"keys {', '.join(map(str, values))}"[:200],
            allowed=", ".join(table.name for table in tables.values()),
        )
    if len(best) > 1:
        raise ConfigError(
            f"{path} may be a config of {' or '.join(tables[name].name for name in best)}",
            fix=f"say which: --from {best[0]}",
        )
    return tables[best[0]]
