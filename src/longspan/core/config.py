"""Configuration: strict pydantic models, read from YAML, changed by `a.b=c`, identified by a fingerprint.

    class Optimizer(Config):
        lr: float = 1e-4
        '''Peak learning rate.'''

    recipe = Recipe.from_dict(apply_overrides(read_yaml("recipe.yaml"), ["optimizer.lr=3e-4"]))

A key that does not exist is an error that names the key and the nearest one that does.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

import pydantic
import yaml

from longspan.core.errors import ArgumentError, ConfigError, UserError
from longspan.core.files import atomic_write
from longspan.core.units import parse_length, parse_tokens


class _StrictSafeLoader(yaml.SafeLoader):
    """SafeLoader with three differences.

    1e-4 is a number (YAML 1.1 wants 1.0e-4), 2026-01-31 is text, and a key written twice is an error.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Looked at while composing: later, `<<: *base` copies the keys of `base` into the same list.
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1 and key != "<<"})
        if twice:
            line = node.start_mark.line + 1
            raise ConfigError(f"the key {twice[0]!r} stands twice in the mapping that begins at line {line}")
        return node


class _SafeDumper(yaml.SafeDumper):
    """SafeDumper whose strings come back: "12e5" in quotes, the rarer line breaks of Unicode escaped."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(character in data for character in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_EXPONENT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
_StrictSafeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictSafeLoader.add_implicit_resolver(*_EXPONENT)
_SafeDumper.add_implicit_resolver(*_EXPONENT)
_SafeDumper.add_representer(str, _SafeDumper.represent_str)


class Config(pydantic.BaseModel):
    """Base of all settings: immutable, keyword-only, unknown keys refused, numbers finite unless a field says so."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    ADDED_LATER: ClassVar[frozenset[str]] = frozenset()
    """Settings that leave the fingerprint alone while they have their default: plans saved without them stay valid."""

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], *, where: str = "settings", names: Mapping[str, str] | None = None
    ) -> Self:
        """Validate a plain dict. Raises ConfigError naming the dotted key, the value and the nearest key.

        `names`: what the user calls keys, `{"num_needles": "--num-needles"}`, where that is not their dotted name.
        """
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            lines = _explain(cls, error, names or {})
            raise ConfigError(f"{where} is not valid:\n  " + "\n  ".join(lines)) from None
        except UserError as error:  # raised by a check of our own inside a model
            raise ConfigError(f"{where} is not valid:\n  {error}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file and validate it. Raises ConfigError naming file and key."""
        return cls.from_dict(read_yaml(path), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for YAML or JSON."""
        return self.model_dump(mode="json")

    def to_yaml(self, path: str | Path) -> None:
        """Write every setting, defaults included, atomically."""
        write_yaml(path, self.to_dict())

    def fingerprint(self) -> str:
        """Return 16 hex characters that change exactly when a setting changes."""
        later = {
            name for name in self.ADDED_LATER if getattr(self, name) == type(self).model_fields[name].default
        }
        values = {name: value for name, value in self.to_dict().items() if name not in later}
        text = json.dumps(values, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def write_yaml(path: str | Path, values: dict[str, Any]) -> None:
    """Write a YAML mapping that reads back as it is, atomically."""
    with atomic_write(path, "w") as file:
        file.write(yaml_text(values))


def yaml_text(values: dict[str, Any]) -> str:
    """Return a mapping as YAML that reads back as it is."""
    return str(yaml.dump(values, Dumper=_SafeDumper, sort_keys=False, allow_unicode=True))


def changed_fields(config: Config, names: Iterable[str]) -> list[str]:
    """Return those of the fields that differ from their defaults.

    By value: the settings of a run are written with all defaults, and read again.
    """
    fields = type(config).model_fields
    return [
        name for name in names if getattr(config, name) != fields[name].get_default(call_default_factory=True)
    ]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises ConfigError naming file and line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read", found=str(error)) from None
    return parse_yaml(text, where=str(path))


def parse_yaml(text: str, *, where: str) -> dict[str, Any]:
    """Parse a YAML mapping. Raises ConfigError naming `where` and the line."""
    try:
        values = yaml.load(text, Loader=_StrictSafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark is not None else where
        raise ConfigError(f"{place} is not valid YAML", found=getattr(error, "problem", str(error))) from None
    except (ConfigError, ValueError) as error:  # ValueError: a tag such as !!int before a word
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where} does not hold settings",
            found=f"{type(values).__name__} {str(values)[:60]!r}" if values is not None else "nothing",
            allowed="key: value lines",
        )
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `values` with each `a.b.0.c=value` applied; values are read as YAML.

    `{"stages": [{"lr": 1}]}` with `stages.0.lr=2` becomes `{"stages": [{"lr": 2}]}`.
    """
    result = copy.deepcopy(values)
    for override in overrides:
        dotted, separator, text = override.partition("=")
        dotted = dotted.strip()
        if not separator or not all(dotted.split(".")):
            raise ConfigError(
                "an override is written key=value", found=repr(override), allowed="such as optimizer.lr=1e-4"
            )
        try:
            value = yaml.load(text, Loader=_StrictSafeLoader)
        except (yaml.YAMLError, ConfigError, ValueError) as error:
            found = getattr(error, "problem", error)
            raise ConfigError(
                f"the value of {dotted} is not valid YAML", found=f"{text!r}: {found}"
            ) from None
        _assign(result, dotted.split("."), value, dotted)
    return result


def _assign(node: Any, keys: list[str], value: Any, dotted: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise ConfigError(
                    f"{dotted}: there is no item {key!r} in {'.'.join(keys[:depth])}",
                    allowed=f"0 to {len(node) - 1}" if node else "nothing: the list is empty",
                )
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            # YAML reads the key of `4096: 0.5` as a number; `by_length.4096=1` means that very key.
            name = next((existing for existing in node if str(existing) == key), key)
            if last:
                node[name] = value
            else:
                if node.get(name) is None:
                    node[name] = {}
                node = node[name]
        else:
            raise ConfigError(
                f"{dotted}: {'.'.join(keys[:depth])} is a single value, it has no {key!r}", found=node
            )


def _explain(
    model: type[pydantic.BaseModel], error: pydantic.ValidationError, names: Mapping[str, str]
) -> list[str]:
    lines = []
    # A check of several settings together names them in its words; those with a _ are no words of English.
    words = {name: said for name, said in names.items() if "_" in name}
    items = error.errors(include_url=False)
    for item in items:
        # A list is too short without its wrong entries: they are what is wrong.
        place = item["loc"]
        if item["type"] == "too_short" and any(
            other["loc"][: len(place)] == place != other["loc"] for other in items
        ):
            continue
        dotted = _named(".".join(str(part) for part in item["loc"]), names)
        if item["type"] == "extra_forbidden":
            known = _field_names(model, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
            lines.append(f"{dotted}: there is no such setting; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{dotted}: this setting is required")
        else:
            message = item["msg"].removeprefix("Value error, ").replace("\n", "\n  ")
            message = re.sub(r"\w+", lambda word: words.get(word[0], word[0]), message)
            # A check of several settings together has the whole mapping as its input: too long to be of use.
            said = isinstance(item["input"], dict) or "found: " in message
            found = "" if said else f"; found: {item['input']!r}"
            lines.append((f"{dotted}: " if dotted else "") + message + found[:400])
    return lines


def _named(dotted: str, names: Mapping[str, str]) -> str:
    """Return what the user calls a key: `--server: limits.concurrency` for `server.limits.concurrency`."""
    above = max((name for name in names if f"{dotted}.".startswith(f"{name}.")), key=len, default=None)
    if above is None:
        return dotted
    below = dotted[len(above) + 1 :]
    return f"{names[above]}: {below}" if below else names[above]


def _field_names(model: type[pydantic.BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the names of the settings that exist at `location` below `model`."""
    annotations: list[Any] = [model]
    for part in location:
        annotations = [inner for annotation in annotations for inner in _step(annotation, part)]
    models = [alternative for annotation in annotations for alternative in _alternatives(annotation)]
    return sorted({name for found in models if _is_model(found) for name in found.model_fields})


def _step(annotation: Any, part: int | str) -> list[Any]:
    """Return what stands under `part` of an annotation: 0 of `list[A]`, "web" of `dict[str, A]`, "lr" of A.

    In a union, pydantic also names the member it tried (A, or its tag): such a part picks that member.
    """
    below: list[Any] = []
    alternatives = _alternatives(annotation)
    for member in alternatives:
        if _is_model(member):
            if part in member.model_fields:
                below.append(member.model_fields[str(part)].annotation)
            elif len(alternatives) > 1 and (part == member.__name__ or part in _literals(member)):
                return [member]
        elif issubclass(get_origin(member) or type(None), Mapping):
            below.extend(get_args(member)[1:])
        elif isinstance(part, int):
            below.extend(argument for argument in get_args(member) if argument is not Ellipsis)
    return below


def _alternatives(annotation: Any) -> list[Any]:
    """Return the members of a union, Optional and Annotated taken apart; anything else alone."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for argument in get_args(annotation) for inner in _alternatives(argument)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


def _literals(model: type[pydantic.BaseModel]) -> set[Any]:
    """Return the values of the Literal fields of a model: the tags of a discriminated union."""
    fields = model.model_fields.values()
    return {
        value
        for field in fields
        if get_origin(field.annotation) is Literal
        for value in get_args(field.annotation)
    }


def _parsed(parse: Callable[[str | int], int]) -> pydantic.BeforeValidator:
    def convert(value: Any) -> Any:
        if not isinstance(value, (str, int)):
            return value
        try:
            return parse(value)
        except ArgumentError as error:
            raise ValueError(str(error)) from None

    return pydantic.BeforeValidator(convert)


class Commas:
    """Marks a field of texts whose option is split at commas: `names: Annotated[tuple[str, ...], Commas]`."""


Length = Annotated[int, _parsed(parse_length)]
"""A length in tokens as a setting: `4096` or `128k`."""


TokenBudget = Annotated[int, _parsed(parse_tokens)]
"""A number of tokens as a setting: `100m`, `5B`."""
