"""What the keys of another trainer mean: one table a tool, read from `tools/`."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple

from longspan.core.config import parse_yaml

__all__ = ["KINDS", "TOOLS", "WHOLE", "KeyTable", "Said", "flattened", "load_tables", "read_tool"]

TOOLS = ("axolotl", "llama-factory", "trl", "ms-swift", "torchtune")
KINDS = ("without effect", "not carried over", "refused")
"""What may be said of keys that are not translated."""
WHOLE = ("rope_scaling", "deepspeed", "lr_options")
"""Meanings whose value is a mapping that is read as one."""


class Said(NamedTuple):
    """What a table says of keys that are not translated."""

    keys: tuple[str, ...]
    """Dotted, `[]` for any item of a list; * stands for any text."""
    kind: str
    words: str
    off: tuple[Any, ...]
    """Values with which there is nothing to carry over, beside none, false and nothing."""
    unless: Mapping[str, str]
    """By key or value: what is not carried over after all."""


class KeyTable(NamedTuple):
    """One tool."""

    name: str
    page: str
    """Where the tool says what its keys are."""
    commands: tuple[str, ...]
    """What stands before its options on a command line."""
    tasks: Mapping[str, str]
    """What commands that are not fine-tuning train."""
    defaults: Mapping[str, Any]
    """By meaning: what the tool does where the file says nothing."""
    facts: Mapping[str, Any]
    """What the tool does whatever the file says."""
    translated: Mapping[str, str]
    """Keys to meanings, which `meanings.MEANINGS` names."""
    values: Mapping[str, Mapping[str, Any]]
    """By meaning: the tool's words to ours."""
    said: tuple[Said, ...]
    differs: tuple[str, ...]
    """Where the same word is another thing, as sentences."""

    def meaning(self, key: str) -> str | None:
        """Return what a dotted key means, itself or as a part of a mapping that is translated."""
        if key in self.translated:
            return self.translated[key]
        # What is said of a part outranks what its mapping means.
        above = next((each for each in _above(key) if each in self.translated), None)
        return None if above is None or self._named(key) is not None else self.translated[above]

    def about(self, key: str) -> Said | None:
        """Return what is said of a key that is not translated, or of what it is a part of; None: the key is unknown."""
        found = self._named(key)
        if found is not None:
            return found
        return next((said for each in _above(key) if (said := self._named(each)) is not None), None)

    def knows(self, key: str) -> bool:
        """Whether the table says anything of a key."""
        return self.meaning(key) is not None or self.about(key) is not None

    def _named(self, key: str) -> Said | None:
        for said in self.said:
            if key in said.keys:
                return said
        patterns = ((said, each) for said in self.said for each in said.keys if "*" in each)
        return next((said for said, each in patterns if fnmatchcase(key, each.replace("[]", "[[][]]"))), None)


def flattened(values: Mapping[str, Any], table: KeyTable) -> list[tuple[str, int | None, Any]]:
    """Return every key of a file as (dotted key with `[]` for items, number of the item, value).

    Mappings, and lists of them, are taken apart, but for those that are read as one.
    """
    found: list[tuple[str, int | None, Any]] = []

    def walk(key: str, item: int | None, value: Any) -> None:
        whole = table.translated.get(key) in WHOLE
        if isinstance(value, Mapping) and value and not whole:
            for name, inner in value.items():
                walk(f"{key}.{name}", item, inner)
        elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            for number, inner in enumerate(value):
                walk(f"{key}[]", number if item is None else item, inner)
        else:
            found.append((key, item, value))

    for name, value in values.items():
        walk(str(name), None, value)
    return found


def _above(key: str) -> list[str]:
    """Return the keys that a dotted key is a part of, nearest first: `a.b[].c` in `a.b[]`, `a.b`, `a`."""
    parts: list[str] = []
    while True:
        if key.endswith("[]"):
            key = key[:-2]
        elif "." in key:
            key = key.rpartition(".")[0]
        else:
            return parts
        parts.append(key)


@lru_cache(maxsize=1)
def load_tables() -> dict[str, KeyTable]:
    """Return the tables by the names that `--from` takes."""
    return {name: _table(name) for name in TOOLS}


def _table(name: str) -> KeyTable:
    values = read_tool(name)
    below = [read_tool(each) for each in values.get("includes", [])]
    everything = [*below, values]
    merged: dict[str, dict[str, Any]] = {}
    for each in everything:
        for meaning, words in each.get("values", {}).items():
            merged[meaning] = {**merged.get(meaning, {}), **words}
    return KeyTable(
        name=values["name"],
        page=values["page"],
        commands=tuple(values["commands"]),
        tasks=values.get("tasks", {}),
        defaults=values["defaults"],
        facts=values["facts"],
        translated={key: meaning for each in everything for key, meaning in each["translated"].items()},
        values=merged,
        # The tool's own words come first: what it says of a key outranks what its trainer does.
        said=tuple(said for each in (values, *below) for said in _said(each)),
        differs=tuple(values["differs"]),
    )


def _said(values: Mapping[str, Any]) -> list[Said]:
    return [
        Said(
            tuple(each["keys"]),
            kind,
            each.get("why") or each["do"],
            tuple(each.get("off", ())),
            each.get("unless", {}),
        )
        for kind in KINDS
        for each in values.get(kind, [])
    ]


def read_tool(name: str) -> dict[str, Any]:
    """Return a table as it stands in its file; `includes` are others that it takes on."""
    text = (importlib.resources.files(__package__) / "tools" / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_yaml(text, where=f"{name}.yaml")
