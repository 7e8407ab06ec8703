"""Commands whose options are the fields of settings: name, type, limits, default and help are said once.

    @from_settings(settings=Part("longspan.eval.passkey:PasskeyConfig", old={"--digits": "answer_digits"}))
    def passkey(settings: PasskeyConfig, out: Out, used: Used, as_json: Json = False) -> None:
        ...

The argument `settings` is that Config, made of what was given: defaults < `Part.under` (a preset) < `--settings FILE`
< options. Its module is imported when the command is called or its help is shown, no sooner. `num_needles` becomes
`--num-needles`; a bool `--x/--no-x`; a tuple an option with commas, one of texts an option that is given many
times, and so are numbers by name, as `NAME=NUMBER`; any other dict and a Config in a field YAML, `a=1,b=2` or the name
of a YAML file. Arguments that are no `Part` stay as typer has them, and may stand in the file too. `used`, where a
command has it, is what to write into the output:
all settings in effect, in the form of a `--settings` file.

To convert a command: give it a `Part`, delete the options that the fields replace, move what their help said into the
docstrings of the fields, name old options that were called otherwise in `old`, and write `used` into the output.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from longspan.core.config import Config

Used = dict[str, Any]
"""The settings that a command ran with, as a `--settings` file has them."""
NOT_SETTINGS = ("out", "as_json", "dry_run", "print_sbatch")
"""Arguments that say where results go and what is shown of them."""
FILE = "settings.yaml"
"""Name in a folder that a command wrote."""


class Part(NamedTuple):
    """A Config that options are made of."""

    config: str
    """Where it is: `module:Class`."""
    without: Sequence[str] = ()
    """Fields that no option is made of; a file may have them."""
    nested: Sequence[str] = ()
    """Fields that are a Config whose fields become options of this command."""
    lifted: Sequence[str] = ()
    """Fields of a Config inside, dotted, that have an option of their own."""
    names: Mapping[str, str] = {}
    """Options by field, `{"keys": "--key"}`, where they are not called as the field is."""
    help: Mapping[str, str] = {}
    """Help by field, where this command means more by it than the field says."""
    old: Mapping[str, str | tuple[str, Any]] = {}
    """Options of earlier releases: the field that they set (`limits.concurrency` of a Config inside), and what a flag
    sets it to where that is not true."""
    argument: str | None = None
    """The field that is an argument, not an option."""
    under: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None
    """Returns values that stand in for defaults, of all that was given."""

    def load(self) -> type[Config]:
        """Import the class."""
        module, _, name = self.config.partition(":")
        return getattr(import_module(module), name)


class _Field(NamedTuple):
    """A field that becomes an option."""

    path: str
    """Dotted, from the part's Config."""
    option: str
    info: FieldInfo
    required: bool
    help: str

    @property
    def name(self) -> str:
        """What typer calls it."""
        return self.option.removeprefix("--").replace("-", "_").lower()


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
        names = vars(
            import_module(self.command.__module__)
        )  # a part's type may be known to type checkers alone
        return {
            name: each.replace(annotation=eval(each.annotation, names))
            for name, each in inspect.signature(self.command).parameters.items()
            if name not in self.parts and name != "used"
        }

    @cached_property
    def fields(self) -> dict[str, list[_Field]]:
        """The fields of each part that become options; one that two parts have is an option of the first."""
        return {name: list(_fields(part, part.load())) for name, part in self.parts.items()}

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
                taken.setdefault(field.name, _option(field, words, self.parts[name].argument == field.path))
        # What must be given comes first.
        required = {field.name for fields in self.fields.values() for field in fields if field.required}
        options = sorted(
            taken.values(), key=lambda each: each.name not in required and each.default is not each.empty
        )
        options.insert(len(options) - ("as_json" in self.own), _parameter("settings_file", _SETTINGS))
        for name, part in self.parts.items():
            paths = {field.path: field for field in self.fields[name]}
            for old, meant in part.old.items():
                options.append(_old_option(old, meant, paths))
        return inspect.Signature(options)

    def __call__(self, **given: Any) -> None:
        file = given.pop("settings_file")
        values = _read(file) if file else {}
        own = {name: given.pop(name) for name in self.own}
        shown: dict[str, str] = {}
        for name, part in self.parts.items():
            for field in self.fields[name]:
                if (value := given.get(field.name)) is not None:
                    _assign(values, field.path, _value(field.option, field.info, value))
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
            value = _value(old, _info_at(self.parts[part].load(), path), value)
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
        inside = {name: value for name, value in values.items() if name in self._keys(part)}
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

    def known(self) -> list[str]:
        """Return the settings that a file may hold."""
        names = {name for part in self.parts.values() for name in part.load().model_fields}
        return sorted(names | set(self.own) - set(NOT_SETTINGS))

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
        from longspan.core.errors import ArgumentError

        raise ArgumentError(f"{one} and {other} set the same", fix="leave out one of them")


def write_used(used: Used, folder: Path) -> None:
    """Write what a command ran with into the folder that it wrote."""
    from longspan.core.config import write_yaml

    write_yaml(folder / FILE, used)


def _remember_file(context: typer.Context, file: Path | None) -> Path | None:
    """Let a settings file say the arguments that are typer's own; refuse what is no setting."""
    if file is None or context.resilient_parsing:
        return file
    import difflib

    from longspan.core.errors import ConfigError

    command = getattr(context.command.callback, "__wrapped__", None)
    assert isinstance(command, FromSettings)
    values, known = _read(file), command.known()
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
            raise ConfigError(f"{file}: there is no such setting as {name!r}; {hint}")
    context.default_map = {name: value for name, value in values.items() if name in command.own}
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
    """Read settings from YAML, or from what a command wrote: its folder or its records.

    Raises:
        ConfigError: the file holds none.
    """
    from longspan.core.config import read_yaml
    from longspan.core.errors import ConfigError

    if path.is_dir():
        path = path / FILE
    if path.suffix != ".jsonl":
        return read_yaml(path)
    try:
        with path.open(encoding="utf-8") as file:
            settings = json.loads(file.readline())["settings"]
    except (OSError, UnicodeDecodeError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} does not say which settings it was made with", found=str(error)) from None
    return dict(settings)


def _fields(part: Part, config: type[Config], prefix: str = "", optional: bool = False) -> Iterator[_Field]:
    """Yield the fields of a Config that become options, those of nested ones in their place."""
    for name, info in config.model_fields.items():
        path = f"{prefix}{name}"
        if path in part.without:
            continue
        if path in part.nested:
            inner = next(each for each in _alternatives(info.annotation) if _is_config(each))
            yield from _fields(part, inner, f"{path}.", optional or not info.is_required())
        else:
            usual = name.upper() if path == part.argument else f"--{name.replace('_', '-')}"
            option = part.names.get(path, usual)
            words = part.help.get(path, info.description or "")
            yield _Field(path, option, info, info.is_required() and not optional, words)
    for path in () if prefix else part.lifted:
        option = part.names.get(path, f"--{path.rpartition('.')[2].replace('_', '-')}")
        info = _info_at(config, path)
        yield _Field(path, option, info, False, info.description or "")


def _info_at(config: type[Config], path: str) -> FieldInfo:
    *above, last = path.split(".")
    for name in above:
        info = config.model_fields[name]
        config = next(each for each in _alternatives(info.annotation) if _is_config(each))
    return config.model_fields[last]


def _alternatives(annotation: Any) -> list[Any]:
    """Return the members of a union without None, Annotated taken apart."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for each in get_args(annotation) for inner in _alternatives(each)]
    return [] if annotation is type(None) else [annotation]


def _is_config(annotation: Any) -> bool:
    from longspan.core.config import Config

    return isinstance(annotation, type) and issubclass(annotation, Config)


def _is_mapping(annotation: Any) -> bool:
    origin = get_origin(annotation) or annotation
    return _is_config(annotation) or (isinstance(origin, type) and issubclass(origin, Mapping))


def _items(annotation: Any) -> Any:
    """Return the type of the values of a tuple or list; None for anything else."""
    for each in _alternatives(annotation):
        if get_origin(each) in (tuple, list):
            return get_args(each)[0]
    return None


def _plain(annotation: Any) -> type:
    """Return the simple type that a value is."""
    kinds = _alternatives(annotation)
    return next((kind for kind in (bool, int, float) if kind in kinds), str)


def _value(option: str, info: FieldInfo, given: Any) -> Any:
    """Return what was given to an option as a Config takes it. Raises ConfigError or ArgumentError naming it."""
    from longspan.core.errors import ArgumentError, ConfigError
    from longspan.core.units import parse_count

    if _items(info.annotation) is not None:
        return given if _is_repeated(info) else [part.strip() for part in given.split(",")]
    if _are_numbers(info):
        numbers: dict[str, Any] = {}
        for text in given:
            if Path(text).is_file() or text.lstrip().startswith("{"):
                numbers |= _value_of_mapping(option, text)
                continue
            # The last "=" separates: a name is free text.
            name, _, number = text.rpartition("=")
            if not name:
                raise ArgumentError(
                    f"{option} is written NAME=NUMBER", found=repr(text), allowed="such as books=0.5"
                )
            numbers[name] = number
        return numbers
    if any(map(_is_mapping, _alternatives(info.annotation))):
        return _value_of_mapping(option, given)
    if _plain(info.annotation) is int and not _reads_text(info) and not re.fullmatch(r"-?\d+", str(given)):
        try:
            return parse_count(given)
        except ArgumentError as error:
            raise ConfigError(f"{option}: {error}") from None
    return given


def _is_repeated(info: FieldInfo) -> bool:
    """Whether an option is given once for each of its values: texts, which may hold commas, and numbers by name."""
    from longspan.core.config import Commas

    texts = str in _alternatives(_items(info.annotation)) and Commas not in info.metadata
    return texts or _are_numbers(info)


def _value_of_mapping(option: str, given: str) -> Any:
    """Read a file, YAML, or `a=1,b.c=2`."""
    from longspan.core.config import apply_overrides, parse_yaml, read_yaml

    if Path(given).is_file():
        return read_yaml(given)
    if given.startswith(("http://", "https://")):
        return given
    if re.match(r"[\w.]+=", given):
        return apply_overrides({}, given.split(","))
    return parse_yaml(given, where=option)


def _are_numbers(info: FieldInfo) -> bool:
    """Whether a field holds numbers by name, which are given one at a time."""
    return any(
        get_origin(each) is dict and get_args(each)[1] is float for each in _alternatives(info.annotation)
    )


def _reads_text(info: FieldInfo) -> bool:
    """Whether a field reads its text by itself: `128k` as a length."""
    import pydantic

    annotations = [info.annotation, *get_args(info.annotation)]
    inner = [each for annotation in annotations for each in getattr(annotation, "__metadata__", ())]
    return any(isinstance(each, pydantic.BeforeValidator) for each in [*info.metadata, *inner])


def _option(field: _Field, words: Mapping[str, str], is_argument: bool = False) -> inspect.Parameter:
    """Return the option of a field; what is given is read by `_value`, and checked by the Config."""
    help = _help(field, words)
    if is_argument:
        argument = typer.Argument(metavar=field.option, help=help)
        many = _is_repeated(field.info)
        annotation: Any = Annotated[list[str] | None, argument] if many else Annotated[str | None, argument]
    elif _plain(field.info.annotation) is bool:
        flag = f"{field.option}/--no-{field.option.removeprefix('--')}"
        annotation = Annotated[bool | None, typer.Option(flag, help=help, show_default=False)]
    else:
        option = typer.Option(field.option, help=help, metavar=_metavar(field.info))
        many = _is_repeated(field.info)
        annotation = Annotated[list[str] | None, option] if many else Annotated[str | None, option]
    return _parameter(field.name, annotation)


def _old_option(old: str, meant: str | tuple[str, Any], fields: Mapping[str, _Field]) -> inspect.Parameter:
    flag = not isinstance(meant, str)
    if isinstance(meant, str) and meant in fields:
        info = fields[meant].info
        flag = _plain(info.annotation) is bool
        if _is_repeated(info):
            return _parameter(_name(old), Annotated[list[str] | None, typer.Option(old, hidden=True)])
    kind = bool if flag else str
    return _parameter(_name(old), Annotated[kind | None, typer.Option(old, hidden=True)])


def _name(old: str) -> str:
    """Return what typer calls an old option."""
    return "old_" + old.partition("/")[0].removeprefix("--").replace("-", "_")


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)


def _metavar(info: FieldInfo) -> str:
    choices = [
        value
        for each in _alternatives(_items(info.annotation) or info.annotation)
        if get_origin(each) is Literal
        for value in get_args(each)
    ]
    if choices:
        return f"<{'|'.join(map(str, choices))}>"
    if _are_numbers(info):
        return "<name=number>"
    if any(map(_is_mapping, _alternatives(info.annotation))):
        return "<yaml>"
    if _plain(info.annotation) is int and _reads_text(info):
        return "<tokens>"
    return f"<{_plain(_items(info.annotation) or info.annotation).__name__}>"


def _help(field: _Field, words: Mapping[str, str]) -> str:
    """Return the docstring of a field, worded for an option, with its default and limits."""
    text = " ".join(field.help.split())
    text = re.sub(r"\bNone\s*[:=]\s*", "Default: ", text)
    text = re.sub(r"`(\w+)`", lambda match: words.get(match[1], match[0]), text)
    remarks = [remark for remark in (_default(field.info), _limits(field.info)) if remark]
    if field.required:
        remarks.append("required")
    return f"{text}  [{'; '.join(remarks)}]" if remarks else text


def _default(info: FieldInfo) -> str:
    value = None if info.is_required() else info.get_default(call_default_factory=True)
    if value is None or value is False or value in ("", (), {}) or _is_config(type(value)):
        return ""
    if isinstance(value, tuple):
        value = ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in value)
    if value is True:
        value = "on"
    return f"default: {value}"


def _limits(info: FieldInfo) -> str:
    """Return the limits of a number, `1<=x<=18`."""
    from annotated_types import Ge, Gt, Le, Lt

    metadata = [*info.metadata]
    for each in get_args(info.annotation):
        metadata += getattr(each, "__metadata__", ())
    whole = _plain(_items(info.annotation) or info.annotation) is int
    low = high = ""
    for each in metadata:
        if isinstance(each, Ge):
            low = f"{each.ge}<="
        elif isinstance(each, Gt):
            low = f"{int(each.gt) + 1}<=" if whole else f"{each.gt}<"  # type: ignore[call-overload]
        elif isinstance(each, Le):
            high = f"<={each.le}"
        elif isinstance(each, Lt):
            high = f"<{each.lt}"
    return f"{low}x{high}" if low or high else ""


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
