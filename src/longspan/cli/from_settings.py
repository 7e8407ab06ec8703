"""Commands whose options are the fields of settings: name, type, limits, default and help are said once.

    @from_settings(settings=Part("longspan.eval.passkey:PasskeyConfig", old={"--digits": "answer_digits"}))
    def passkey(settings: PasskeyConfig, out: Out, used: Used, as_json: Json = False) -> None:
        ...

The argument `settings` is that Config, made of what was given: defaults < `Part.under` (a preset) < `--settings FILE`
< options. Its module is imported when the command is called or its help is shown, no sooner. `num_needles` becomes
`--num-needles`; a bool `--x/--no-x`; a tuple an option with commas, one of texts an option that is given many
times, and so are numbers by name, as `NAME=NUMBER`; any other dict and a Config in a field YAML, `a=1,b=2` or the name
of a YAML file. Arguments that are no `Part` stay as typer has them, and may stand in the file too. `used`, where a
command has it, is what to write into the output: all settings in effect, in the form of a `--settings` file.

To convert a command: give it a `Part`, delete the options that the fields replace, move what their help said into the
docstrings of the fields, name old options that were called otherwise in `old`, and write `used` into the output.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from longspan.cli.field_options import (
    OptionField,
    Part,
    fields_of,
    info_at,
    is_repeated,
    option_of,
    parameter,
    plain_kind,
    value_of,
)
from longspan.core.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from longspan.core.config import Config

Used = dict[str, Any]
"""The settings that a command ran with, as a `--settings` file has them."""
NOT_SETTINGS = ("out", "as_json", "dry_run", "print_sbatch")
"""Arguments that say where results go and what is shown of them."""
FILE = "settings.yaml"
"""Name in a folder that a command wrote."""


def from_settings(**parts: Part) -> Callable[[Callable[..., None]], FromSettings]:
    """Give a command the options of the fields of `parts`, in place of the arguments of these names."""
    return partial(FromSettings, parts=parts)


class FromSettings:
    """A command as typer takes it: something to call, whose signature is worked out when it is asked for."""

    def __init__(self, command: Callable[..., None], parts: Mapping[str, Part]) -> None:
        self.command, self.parts = command, parts
        self.__name__, self.__doc__ = command.__name__, command.__doc__
        self.__annotations__: dict[str, Any] = {}

    @cached_property
    def own(self) -> dict[str, inspect.Parameter]:
        """The arguments that typer reads as they are."""
        own = {
            name: each
            for name, each in inspect.signature(self.command).parameters.items()
            if name not in self.parts and name != "used"
        }
        # Of these alone: a part's type may be known to type checkers only.
        written = SimpleNamespace(__annotations__={name: each.annotation for name, each in own.items()})
        names = vars(import_module(self.command.__module__))
        kinds = get_type_hints(written, names, include_extras=True)
        return {name: each.replace(annotation=kinds[name]) for name, each in own.items()}

    @cached_property
    def fields(self) -> dict[str, list[OptionField]]:
        """The fields of each part that become options; one that two parts have is an option of the first."""
        return {name: list(fields_of(part, part.load())) for name, part in self.parts.items()}

    @property
    def __signature__(self) -> inspect.Signature:
        taken: dict[str, inspect.Parameter] = {}
        words = {
            field.path.rpartition(".")[2]: field.option for fields in self.fields.values() for field in fields
        }
        for name in inspect.signature(self.command).parameters:
            if name in self.own:
                taken[name] = self.own[name].replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for field in self.fields.get(name, ()):
                taken.setdefault(field.name, option_of(field, words, self.parts[name].argument == field.path))
        # What must be given comes first.
        required = {field.name for fields in self.fields.values() for field in fields if field.required}
        options = sorted(
            taken.values(), key=lambda each: each.name not in required and each.default is not each.empty
        )
        options.insert(len(options) - ("as_json" in self.own), parameter("settings_file", _SETTINGS))
        for name, part in self.parts.items():
            paths = {field.path: field for field in self.fields[name]}
            for old, meant in part.old.items():
                options.append(_old_option(old, meant, paths))
        return inspect.Signature(options)

    def __call__(self, **given: Any) -> None:
        file = given.pop("settings_file")
        values = self.read(file) if file else {}
        own = {name: given.pop(name) for name in self.own}
        shown: dict[str, str] = {}
        for name, part in self.parts.items():
            for field in self.fields[name]:
                if (value := given.get(field.name)) is not None:
                    _assign(values, field.path, value_of(field.option, field.info, value))
                    shown[field.path] = field.option
            for old in part.old:
                if (value := given.get(_name(old))) is not None:
                    path = self._take_old(name, old, value, values)
                    _refuse_both(shown.get(path), old)
                    shown[path] = old
        made = {
            name: self._make(part, values | {key: own[key] for key in own if key not in values}, shown, file)
            for name, part in self.parts.items()
        }
        if "used" in inspect.signature(self.command).parameters:
            own["used"] = self._used(made, own)
        self.command(**made, **own)

    def _take_old(self, part: str, old: str, value: Any, values: dict[str, Any]) -> str:
        """Put the value of an old option where it belongs, say how it is written now; return the field."""
        meant = self.parts[part].old[old]
        path, value = (meant, value) if isinstance(meant, str) else meant
        if isinstance(meant, str) and not isinstance(value, bool):
            value = value_of(old, info_at(self.parts[part].load(), path), value)
        _assign(values, path, value)
        field = next(each for each in self.fields[part] if f"{path}.".startswith(f"{each.path}."))
        now = field.option
        if path != field.path:
            inside = path.removeprefix(f"{field.path}.").split(".")
            now += f" '{''.join(f'{{{key}: ' for key in inside)}{value}{'}' * len(inside)}'"
        elif not isinstance(meant, str):
            now += f" {value}"
        typer.echo(f"{old} is an old name: write {now}", err=True)
        return path

    def _make(
        self, part: Part, values: dict[str, Any], shown: Mapping[str, str], file: Path | None
    ) -> Config:
        """Return the Config of a part. Raises ConfigError naming the option."""
        config = part.load()
        keys = self._keys(part)
        inside = {name: value for name, value in values.items() if name in keys}
        if part.under is not None:
            inside = _merged(part.under(values), inside)
        missing = {
            each.path: each.option for fields in self.fields.values() for each in fields if each.required
        }
        where = "the command line" if file is None else f"the command line with {file}"
        return config.from_dict(inside, where=where, names={**missing, **shown})

    def _keys(self, part: Part) -> set[str]:
        """Return the fields of a part that a file sets: those without an option only where no other part has them."""
        others = {
            name
            for other in self.parts.values()
            if other is not part
            for name in set(other.load().model_fields) - set(other.without)
        }
        return {name for name in part.load().model_fields if name not in part.without or name not in others}

    def read(self, file: Path) -> dict[str, Any]:
        """Return the settings in a file, by field; it may name them as options are, too.

        Raises:
            ConfigError: it cannot be read, or holds what is no setting.
        """
        names = {name for part in self.parts.values() for name in part.load().model_fields}
        names |= set(self.own) - set(NOT_SETTINGS)
        options = {
            each.name: each.path
            for fields in self.fields.values()
            for each in fields
            if each.name not in names
        }
        values = _read(file)
        for name in list(values):
            if name in options:
                _assign(values, options[name], values.pop(name))
            elif name not in names:
                known = sorted({*names, *options})
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
                raise ConfigError(f"{file}: there is no such setting as {name!r}; {hint}")
        return values

    def _used(self, made: Mapping[str, Config], own: Mapping[str, Any]) -> Used:
        used: Used = {}
        for name, config in made.items():
            keys = self._keys(self.parts[name])
            used |= {key: value for key, value in config.to_dict().items() if key in keys and key not in used}
        plain = {name: value for name, value in own.items() if name not in NOT_SETTINGS and value is not None}
        return used | json.loads(json.dumps(plain, default=str))


def _refuse_both(one: str | None, other: str) -> None:
    """Raise ArgumentError where two options set the same."""
    if one is not None:
        raise ArgumentError(f"{one} and {other} set the same", fix="leave out one of them")


def write_used(used: Used, folder: Path) -> None:
    """Write what a command ran with into the folder that it wrote."""
    from longspan.core.config import write_yaml

    write_yaml(folder / FILE, used)


def _remember_file(context: typer.Context, file: Path | None) -> Path | None:
    """Let a settings file say the arguments that are typer's own."""
    if file is None or context.resilient_parsing:
        return file
    command = getattr(context.command.callback, "__wrapped__", None)
    assert isinstance(command, FromSettings)
    context.default_map = {name: value for name, value in command.read(file).items() if name in command.own}
    return file


_SETTINGS = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        metavar="<file>",
        is_eager=True,
        callback=_remember_file,
        help="YAML file of settings, named as these options are (with _ for -); options outrank it. A file or folder "
        "that this command wrote holds those it ran with.",
    ),
]


def _read(path: Path) -> dict[str, Any]:
    """Read settings from YAML, or from what a command wrote: its folder, its records or its JSON.

    Raises:
        ConfigError: the file holds none.
    """
    from longspan.core.config import read_yaml

    if path.is_dir():
        path = path / FILE
    if path.suffix not in (".json", ".jsonl"):
        return read_yaml(path)
    try:
        with path.open(encoding="utf-8") as file:
            settings = json.loads(file.read() if path.suffix == ".json" else file.readline())["settings"]
    except (OSError, UnicodeDecodeError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} does not say which settings it was made with", found=str(error)) from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} was not made by a command, and holds none of its settings")
    return settings


def _old_option(
    old: str, meant: str | tuple[str, Any], fields: Mapping[str, OptionField]
) -> inspect.Parameter:
    flag = not isinstance(meant, str)
    if isinstance(meant, str) and meant in fields:
        info = fields[meant].info
        flag = plain_kind(info.annotation) is bool
        if is_repeated(info):
            return parameter(_name(old), Annotated[list[str] | None, typer.Option(old, hidden=True)])
    kind = bool if flag else str
    return parameter(_name(old), Annotated[kind | None, typer.Option(old, hidden=True)])


def _name(old: str) -> str:
    """Return what typer calls an old option."""
    return "old_" + old.partition("/")[0].removeprefix("--").replace("-", "_")


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, the values of `above` in place of those of `below`, mappings inside likewise."""
    result = dict(below)
    for name, value in above.items():
        under = result.get(name)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        result[name] = _merged(under, value) if both else value  # type: ignore[arg-type]
    return result


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for name in above:
        below = values.get(name)
        values[name] = values = dict(below) if isinstance(below, Mapping) else {}
    values[last] = value
