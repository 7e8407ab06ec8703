"""The option that a field of settings becomes: its name, help, limits, and how what is given is read."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer

from longspan.core.places import load_place

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from longspan.core.config import Config


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
        return load_place(self.config)


class OptionField(NamedTuple):
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


def fields_of(
    part: Part, config: type[Config], prefix: str = "", optional: bool = False
) -> Iterator[OptionField]:
    """Yield the fields of a Config that become options, those of nested ones in their place."""
    for name, info in config.model_fields.items():
        path = f"{prefix}{name}"
        if path in part.without:
            continue
        if path in part.nested:
            inner = next(each for each in _alternatives(info.annotation) if _is_config(each))
            yield from fields_of(part, inner, f"{path}.", optional or not info.is_required())
        else:
            usual = name.upper() if path == part.argument else f"--{name.replace('_', '-')}"
            option = part.names.get(path, usual)
            words = part.help.get(path, info.description or "")
            yield OptionField(path, option, info, info.is_required() and not optional, words)
    for path in () if prefix else part.lifted:
        option = part.names.get(path, f"--{path.rpartition('.')[2].replace('_', '-')}")
        info = info_at(config, path)
        yield OptionField(path, option, info, False, info.description or "")


def info_at(config: type[Config], path: str) -> FieldInfo:
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


def plain_kind(annotation: Any) -> type:
    """Return the simple type that a value is."""
    kinds = _alternatives(annotation)
    return next((kind for kind in (bool, int, float) if kind in kinds), str)


def value_of(option: str, info: FieldInfo, given: Any) -> Any:
    """Return what was given to an option as a Config takes it. Raises ConfigError or ArgumentError naming it."""
    from longspan.core.errors import ArgumentError, ConfigError
    from longspan.core.units import parse_count

    if _items(info.annotation) is not None:
        return given if is_repeated(info) else [part.strip() for part in given.split(",")]
    if _are_numbers(info):
        numbers: dict[str, Any] = {}
        for text in given:
            if os.path.isfile(text) or text.lstrip().startswith("{"):
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
    if (
        plain_kind(info.annotation) is int
        and not _reads_text(info)
        and not re.fullmatch(r"-?\d+", str(given))
    ):
        try:
            return parse_count(given)
        except ArgumentError as error:
            raise ConfigError(f"{option}: {error}") from None
    return given


def is_repeated(info: FieldInfo) -> bool:
    """Whether an option is given once for each of its values: texts, which may hold commas, and numbers by name."""
    from longspan.core.config import Commas

    texts = str in _alternatives(_items(info.annotation)) and Commas not in info.metadata
    return texts or _are_numbers(info)


def _value_of_mapping(option: str, given: str) -> Any:
    """Read a file, YAML, or `a=1,b.c=2`."""
    from longspan.core.config import apply_overrides, parse_yaml, read_yaml

    if os.path.isfile(given):  # False of a text longer than a name may be, as lists of factors are
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


def option_of(field: OptionField, words: Mapping[str, str], is_argument: bool = False) -> inspect.Parameter:
    """Return the option of a field; what is given is read by `value_of`, and checked by the Config."""
    help = _help(field, words)
    if is_argument:
        argument = typer.Argument(metavar=field.option, help=help)
        many = is_repeated(field.info)
        annotation: Any = Annotated[list[str] | None, argument] if many else Annotated[str | None, argument]
    elif plain_kind(field.info.annotation) is bool:
        flag = f"{field.option}/--no-{field.option.removeprefix('--')}"
        annotation = Annotated[bool | None, typer.Option(flag, help=help, show_default=False)]
    else:
        option = typer.Option(field.option, help=help, metavar=_metavar(field.info))
        many = is_repeated(field.info)
        annotation = Annotated[list[str] | None, option] if many else Annotated[str | None, option]
    return parameter(field.name, annotation)


def parameter(name: str, annotation: Any) -> inspect.Parameter:
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
    if plain_kind(info.annotation) is int and _reads_text(info):
        return "<tokens>"
    return f"<{plain_kind(_items(info.annotation) or info.annotation).__name__}>"


def _help(field: OptionField, words: Mapping[str, str]) -> str:
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
    whole = plain_kind(_items(info.annotation) or info.annotation) is int
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
