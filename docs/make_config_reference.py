"""Writes docs/config-reference.md from the fields of all settings: `python docs/make_config_reference.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer.main

from longspan.cli.from_settings import FromSettings
from longspan.cli.main import app
from longspan.core.config import Config, Length, TokenBudget
from longspan.quickstart import QuickstartConfig
from longspan.train.config import TrainConfig

PAGE = Path(__file__).with_name("config-reference.md")
HEAD = """\
# Settings

Every setting of recipes and commands, made from the code by `python docs/make_config_reference.py`. A recipe is
[TrainConfig](#trainconfig). A command has the settings of the classes that name it: as options (`num_needles` is
`--num-needles`), or in a file for `--settings`, where options outrank it:

```
longspan eval needle --settings needle.yaml --samples 20 --out run
longspan eval needle --settings run/records/needle-model.jsonl --model other --out other    # as another run was made
```

Unknown settings are refused with the nearest that there is. Records of an evaluation, and `settings.yaml` in other
folders that commands write, hold what a command ran with.
"""


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, FromSettings]]:
    """Yield (words, command) of each command whose options are made of settings."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        elif isinstance(made := getattr(command.callback, "__wrapped__", None), FromSettings):
            yield " ".join((*path, name)), made


def configs_in(annotation: Any) -> list[type[Config]]:
    """Return the settings that an annotation holds, `dict[str, StreamConfig]` say."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [found for each in get_args(annotation) for found in configs_in(each)]


def shown_type(annotation: Any, metadata: list[Any]) -> str:
    """Return the type of a setting as people say it."""
    inner = annotation.__metadata__ if hasattr(annotation, "__metadata__") else metadata
    for name, kind in (("length", Length), ("token budget", TokenBudget)):
        if kind.__metadata__[0] in inner:
            return name
    if hasattr(annotation, "__metadata__"):
        return shown_type(get_args(annotation)[0], list(inner))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    parts = [each for each in get_args(annotation) if each not in (type(None), Ellipsis)]
    origin = get_origin(annotation)
    if origin in (tuple, list):
        return f"list of {shown_type(parts[0], [])}"
    if origin is dict:
        return f"{shown_type(parts[1], [])} by name"
    if parts:
        return " or ".join(dict.fromkeys(shown_type(each, metadata) for each in parts))
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "yes or no", "Any": "anything"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name)


def table(config: type[Config]) -> list[str]:
    """Return the rows of a class: setting, type, default, meaning."""
    rows = ["| setting | type | default | |", "|---|---|---|---|"]
    for name, info in config.model_fields.items():
        default = "required" if info.is_required() else info.get_default(call_default_factory=True)
        if isinstance(default, Config):
            default = ""
        elif default == "required":
            default = "*required*"
        elif isinstance(default, tuple):
            default = f"`{', '.join(map(str, default))}`" if default else "none"
        elif default in (None, "", {}):
            default = "none"
        else:
            default = f"`{str(default).lower() if isinstance(default, bool) else default}`".replace("\n", "\\n")
        about = info.description or next((each.__doc__ for each in configs_in(info.annotation)), None) or ""
        words = " ".join(re.split(r"\n\s*\n", about)[0].split())
        cells = (f"`{name}`", shown_type(info.annotation, info.metadata), default, words)
        rows.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    return rows


def page() -> str:
    """Return the whole page."""
    used: dict[type[Config], list[str]] = {TrainConfig: ["a recipe"], QuickstartConfig: ["`quickstart`"]}
    for words, command in commands(typer.main.get_command(app)):
        for part in command.parts.values():
            used.setdefault(part.load(), []).append(f"`{words}`")
    waiting = list(used)
    for config in waiting:  # grows while it is walked
        for info in config.model_fields.values():
            for inner in configs_in(info.annotation):
                if inner not in used:
                    waiting.append(inner)
                used.setdefault(inner, [])
                link = f"[{config.__name__}](#{config.__name__.lower()})"
                if link not in used[inner]:
                    used[inner].append(link)
    lines = [HEAD]
    for config in dict.fromkeys(waiting):
        about = re.split(r"\n\s*\n", (config.__doc__ or "").strip())[0]
        lines += [f"## {config.__name__}", "", " ".join(about.split()), "", f"Of {', '.join(used[config])}.", ""]
        lines += [*table(config), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
