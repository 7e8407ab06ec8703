"""Jinja chat templates: where a tokenizer keeps them, and rendering them as transformers does, without it.

A template is a program from somewhere else: it runs in Jinja's immutable sandbox.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.core.errors import DataError
from longspan.core.files import read_json
from longspan.data.chat.messages import GENERATION_END, GENERATION_START, Message, MessagesError

if TYPE_CHECKING:
    import jinja2

DATE = datetime.datetime(2024, 7, 26)  # noqa: DTZ001  a date in a text, of no zone
"""What templates that write today's date get to write: the same text whenever a corpus is tokenized."""

DEFAULT = "default"
_SHIPPED = resources.files("longspan.data") / "chat_templates"


def shipped_templates() -> list[str]:
    """Return the names of the templates that come with this package."""
    return sorted(entry.name.removesuffix(".jinja") for entry in _SHIPPED.iterdir())


def find_template(folder: Path, name: str | None) -> str:
    """Return the text of a chat template.

    Args:
        folder: where the tokenizer's files lie.
        name: None takes the tokenizer's own. Else one of its named templates, a shipped name, or a file.

    Raises:
        DataError: there is no such template, or it cannot be read.
    """
    own = _own_templates(folder)
    if name is None:
        if not own:
            raise DataError(
                f"the tokenizer in {folder} has no chat template",
                fix=f"name one with --chat-template: {', '.join(shipped_templates())}, or a file",
            )
        # A tokenizer whose only template bears another name means that one.
        return own.get(DEFAULT) or next(iter(own.values()))
    if name in own:
        return own[name]
    if name in shipped_templates():
        return (_SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")
    if Path(name).is_file():
        return _read_text(Path(name))
    raise DataError(
        "there is no such chat template",
        found=name,
        allowed=[*own, *shipped_templates(), "or a file"],
    )


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the texts of bos_token, eos_token and the like that the tokenizer's configs name."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, value in _config(folder / file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
    return found


class Template:
    """A compiled chat template.

    Raises:
        DataError: it is not valid Jinja.
    """

    def __init__(self, text: str, special: Mapping[str, str]) -> None:
        import jinja2

        self._special = dict(special)
        try:
            self._compiled = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid: {error.message}, line {error.lineno}") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation; `{% generation %}` blocks stand between private-use marks.

        `add_generation_prompt` has the template write how an answer of the assistant begins; `variables` are further
        ones that it knows (`enable_thinking`).

        Raises:
            MessagesError: the template refuses the conversation (`raise_exception`).
            DataError: the template fails.
        """
        import jinja2

        try:
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._special, **(variables or {})},
            )
        except _RefusedError as error:
            raise MessagesError("the chat template refuses the conversation", found=str(error)) from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise DataError("the chat template fails", found=f"{type(error).__name__}: {error}") from None


class _RefusedError(Exception):
    """Raised by a template through raise_exception."""


def _environment() -> jinja2.Environment:
    """Return an environment with the settings that published templates are written for."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class GenerationBlocks(jinja2.ext.Extension):
        """`{% generation %}` ... `{% endgeneration %}`: what the assistant writes."""

        tags = {"generation"}  # noqa: RUF012  the interface of Jinja

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{GENERATION_START}{caller()}{GENERATION_END}"

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = DATE.strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise _RefusedError(message)


def _own_templates(folder: Path) -> dict[str, str]:
    """Return the tokenizer's templates by name; a file beside the config outranks one in it."""
    found: dict[str, str] = {}
    for file in ("tokenizer_config.json", "chat_template.json"):
        given = _config(folder / file).get("chat_template")
        if isinstance(given, str):
            found[DEFAULT] = given
        elif isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
            found |= {str(entry.get("name")): str(entry.get("template")) for entry in given}
        elif given is not None:
            raise DataError(
                f"{folder / file}: chat_template is neither a text nor a list of named texts",
                found=type(given).__name__,
            )
    if (folder / "chat_template.jinja").is_file():
        found[DEFAULT] = _read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _read_text(path)
    return found


def _config(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a chat template", found=str(error)) from None
