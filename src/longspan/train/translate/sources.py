"""A config of another trainer as it stands in a file: YAML, JSON, or the command line in a shell script."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.config import parse_yaml
from longspan.core.errors import ConfigError

__all__ = ["Source", "part_of", "read_source", "value_at"]

_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.S)
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_PROCESSES = ("nproc_per_node", "num_processes")
_NODES = ("nnodes", "num_machines")


class Source(NamedTuple):
    """What a file says."""

    values: dict[str, Any]
    command: str | None
    """The command whose options they are; None: a config file."""
    processes: int | None
    """Processes that the command line starts; None: it does not say."""
    notes: list[str]


def read_source(path: Path, commands: Iterable[str]) -> Source:
    """Read a file. `commands` are those whose options are settings.

    Raises:
        ConfigError: it does not exist, is neither, or holds no settings.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read", found=str(error)) from None
    if path.suffix == ".json":
        return Source(_json(text, path), None, None, [])
    command = None if path.suffix in (".yaml", ".yml") else _command_line(text, commands)
    if command is not None:
        return _shell(text, command, path)
    if path.suffix in (".sh", ".bash") or text.startswith("#!"):
        raise ConfigError(f"{path} runs no command whose options longspan knows", allowed=", ".join(commands))
    values = parse_yaml(text, where=str(path))
    try:
        return Source({str(key): _resolved(value, values) for key, value in values.items()}, None, None, [])
    except RecursionError:
        raise ConfigError(f"{path}: a value holds itself, by an anchor of YAML") from None


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON", found=str(error)) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold settings", found=type(values).__name__, allowed="an object")
    return values


def _resolved(value: Any, values: Mapping[str, Any], depth: int = 0) -> Any:
    """Return a value with `${a.b}` replaced by what the file says there."""
    if isinstance(value, dict):
        return {str(key): _resolved(each, values, depth) for key, each in value.items()}
    if isinstance(value, list):
        return [_resolved(each, values, depth) for each in value]
    if not isinstance(value, str) or depth > 8:
        return value
    alone = _REFERENCE.fullmatch(value)
    if alone and (found := value_at(values, alone[1])) is not None:
        return _resolved(found, values, depth + 1)

    def text(match: re.Match[str]) -> str:
        found = value_at(values, match[1])
        return match[0] if found is None else str(found)

    known = _REFERENCE.sub(text, value)
    return known if known == value else _resolved(known, values, depth + 1)


def value_at(values: Any, dotted: str) -> Any:
    """Return what stands at `a.b.0.c` of mappings and lists; None: nothing."""
    for part in dotted.split("."):
        if isinstance(values, list) and part.isdecimal():
            values = values[int(part)] if int(part) < len(values) else None
        else:
            values = values.get(part) if isinstance(values, Mapping) else None
    return values


def part_of(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the mapping that stands at a name; empty: another value, or nothing."""
    part = values.get(name)
    return part if isinstance(part, dict) else {}


def _command_line(text: str, commands: Iterable[str]) -> tuple[str, str] | None:
    """Return the line of a script that runs one of the commands, and which."""
    joined = re.sub(r"\\[ \t]*\r?\n", " ", text)
    for line in joined.splitlines():
        if line.lstrip().startswith("#"):
            continue
        # The longest first: swift/cli/sft.py is not the sft.py of another tool.
        for command in sorted(commands, key=len, reverse=True):
            if re.search(rf"(?:^|[\s/]){re.escape(command)}(?=\s|$)", line):
                return line, command
    return None


def _shell(text: str, found: tuple[str, str], path: Path) -> Source:
    line, command = found
    try:
        variables = _variables(text)
        words = _words(_computed(line, variables))
    except ValueError as error:
        raise ConfigError(f"{path}: the command line of {command} cannot be read", found=str(error)) from None
    words = [_substituted(word, variables) for word in words]
    begin, end = _place(words, command.split())
    for word in words[:begin]:
        if match := _ASSIGNMENT.fullmatch(word):
            variables[match[1]] = match[2]
    launcher = _options(words[:begin], path)
    values: dict[str, Any] = {}
    options = _options(words[end:], path)
    for file in options.pop("", []):
        # `swift sft config.yaml --key value`: options outrank the file.
        inner = path.parent / file if (path.parent / file).is_file() else Path(file)
        values |= read_source(inner, ()).values
    values |= options
    if not values:
        raise ConfigError(f"{path}: the command line of {command} has no options", found=line.strip()[:200])
    left = sorted({match[0] for word in words for match in _VARIABLE.finditer(word)})
    notes = [f"set elsewhere, and taken as written: {', '.join(left)}"] if left else []
    return Source(values, command, _processes(launcher, variables), notes)


def _computed(line: str, variables: Mapping[str, str]) -> str:
    """Return a line with `$(expr 16 / 8)` and `$((16 / 8))` worked out, where they are of whole numbers."""

    def value(match: re.Match[str]) -> str:
        parts = re.findall(r"\d+|[-+*/]", _substituted(match[1] or match[2], variables))
        total = int(parts[0]) if parts and parts[0].isdigit() else None
        for operator, number in zip(parts[1::2], parts[2::2]):
            if total is None or not number.isdigit() or (operator == "/" and int(number) == 0):
                return match[0]
            steps = {"+": total + int(number), "-": total - int(number), "*": total * int(number)}
            total = (
                steps[operator] if operator in steps else total // int(number) if operator == "/" else None
            )
        return match[0] if total is None else str(total)

    return re.sub(r"\$\(expr\s+([^()]*)\)|\$\(\(([^()]*)\)\)", value, line)


def _words(line: str) -> list[str]:
    """Return the words of a line without its comment; a # inside a word is no comment."""
    words = shlex.split(re.sub(r"(^|\s)#[^'\"]*$", "", line))
    end = next((number for number, word in enumerate(words) if word.startswith("#")), len(words))
    return words[:end]


def _variables(text: str) -> dict[str, str]:
    """Return the variables that lines of a script set, one by itself on a line."""
    variables: dict[str, str] = {}
    for line in text.splitlines():
        words = (
            _words(line)
            if re.match(r"\s*(export\s+)?\w+=", line) and not line.rstrip().endswith("\\")
            else []
        )
        words = [word.rstrip(";") for word in words if word != "export"]
        if words and all(map(_ASSIGNMENT.fullmatch, words)):
            for word in words:
                name, _, value = word.partition("=")
                variables[name] = _substituted(value, variables)
    return variables


def _substituted(word: str, variables: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[0]), word)


def _place(words: list[str], command: list[str]) -> tuple[int, int]:
    """Return where a command begins and ends; its first word may stand behind a path."""
    for begin in range(len(words) - len(command) + 1):
        first, *rest = words[begin : begin + len(command)]
        if (first == command[0] or first.endswith(f"/{command[0]}")) and rest == command[1:]:
            return begin, begin + len(command)
    return 0, 0


def _options(words: list[str], path: Path) -> dict[str, Any]:
    """Return `--key value ...` as settings; what stands before the first option is under ""."""
    options: dict[str, Any] = {}
    name, given = "", list[str]()

    def put() -> None:
        if name or given:
            values = [_scalar(each) for each in given] if name else given
            options[name] = values if not name or len(values) > 1 else values[0] if values else True

    for word in words:
        if word in ("&&", "||", ";", "|", ">", ">>", "2>&1", "&"):
            break
        if word.startswith("--") and len(word) > 2:
            put()
            key, equals, value = word[2:].partition("=")
            name, given = key.replace("-", "_"), [value] if equals else []
            if name in options:
                raise ConfigError(f"{path}: the option --{key} stands twice")
        else:
            given.append(word)
    put()
    return options


def _scalar(word: str) -> Any:
    """Return an option's value: JSON, a number, or text."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if word.lower() in ("none", "null"):
        return None
    try:
        return json.loads(word)
    except ValueError:
        return word


def _processes(launcher: Mapping[str, Any], variables: Mapping[str, str]) -> int | None:
    """Return the processes that the launcher or its environment starts."""

    def number(names: Iterable[str]) -> int | None:
        for name in names:
            value = launcher.get(name, variables.get(name.upper()))
            if value is not None and re.fullmatch(r"\d+", str(value).strip()):
                return int(value)
        return None

    each = number(_PROCESSES)
    return None if each is None else each * (number(_NODES) or 1)
