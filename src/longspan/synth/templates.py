"""Prompts as files: versioned, with declared fields, filled in one pass.

A text that is put in may hold braces, dollars or the name of a field; it is never looked at again.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Self

import pydantic

from longspan.core.config import Config
from longspan.core.errors import ConfigError

_FIELD = re.compile(r"\{\{([a-z_]+)\}\}")


class PromptTemplate(Config):
    """One prompt; `{{field}}` stands where a value goes."""

    name: str
    version: pydantic.PositiveInt
    """Raised with every change of the words: records say which version asked."""
    fields: tuple[str, ...]
    """Every field that the text uses."""
    text: str

    @pydantic.model_validator(mode="after")
    def _declares_what_it_uses(self) -> Self:
        used = set(_FIELD.findall(self.text))
        if used != set(self.fields):
            raise ConfigError(
                f"the prompt {self.name} does not use the fields that it declares",
                found=f"uses {sorted(used)}",
                allowed=f"{sorted(self.fields)}, as `fields` says",
            )
        return self

    @property
    def label(self) -> str:
        """Name and version, as records have it."""
        return f"{self.name} v{self.version}"

    def render(self, **values: object) -> str:
        """Return the text with every field filled in. Raises KeyError for a field without a value."""
        return _FIELD.sub(lambda match: str(values[match.group(1)]), self.text)


def load_prompt(name: str) -> PromptTemplate:
    """Return a prompt by the name of a shipped file (`one_detail_v1`) or the path of a YAML file.

    Raises:
        ConfigError: there is no such prompt, or it does not declare its fields.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return PromptTemplate.from_yaml(name)
    return PromptTemplate.from_yaml(shipped("prompts", name))


def shipped(folder: str, name: str) -> Path:
    """Return a file of the package. Raises ConfigError naming those that there are."""
    root = Path(str(resources.files("longspan.synth") / folder))
    path = root / f"{name}.yaml"
    if not re.fullmatch(r"[a-z0-9_]+", name) or not path.is_file():
        raise ConfigError(
            f"there is no {name!r} among the {folder}",
            allowed=shipped_names(folder),
            fix="or give the path of a YAML file of your own",
        )
    return path


def shipped_names(folder: str) -> list[str]:
    """Return the names of the package's files in `folder`, in alphabetical order."""
    root = Path(str(resources.files("longspan.synth") / folder))
    return sorted(path.stem for path in root.glob("*.yaml"))
