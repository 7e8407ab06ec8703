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
GENERATION = "generated"
"""Method that a `{% generation %}` block calls."""
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


class Template:
    """A compiled chat template.

    Raises:
        DataError: it is not valid Jinja.
    """

    def __init__(self, text: str, special: Mapping[str, str]) -> None:
        import jinja2
        import jinja2.meta

        self._special = dict(special)
        environment = _environment(marks=False)
        try:
            tree = environment.parse(text)
            self._compiled = environment.from_string(text)
            self._marking = _environment(marks=True).from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid: {error.message}, line {error.lineno}") from None
        given = {"messages", "add_generation_prompt", "continue_final_message", *environment.globals}
        unknown = jinja2.meta.find_undeclared_variables(tree)
        self.variables = frozenset(name for name in unknown if name not in given and name not in special)
        """What the template reads beside the messages: "tools", "documents", settings of its own."""
        texts = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        self.names = frozenset(texts | {node.attr for node in tree.find_all(jinja2.nodes.Getattr)})
        """Every name that it may look up in a message, and every other constant text."""
        written = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
        self.texts = frozenset(texts | written)
        """Every text in it: what it writes, and what it looks for."""
        self.has_blocks = any(
            call.name == GENERATION for call in tree.find_all(jinja2.nodes.ExtensionAttribute)
        )
        """Whether it says by `{% generation %}` what is learnt."""

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> str:
        """Return the text of a conversation; with `marks`, `{% generation %}` blocks stand between private-use ones.

        `add_generation_prompt` has the template write how an answer of the assistant begins.

        Raises:
            MessagesError: the template refuses the conversation (`raise_exception`), or fails on it.
        """
        import jinja2

        settings = {"tools": None, "documents": None, **self._special, **(variables or {})}
        template = self._marking if marks else self._compiled
        try:
            return template.render(
                **settings,
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
            )
        except _RefusedError as error:
            raise MessagesError("the chat template refuses the conversation", found=str(error)) from None
        except (
            jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError
        ) as error:  # fmt: skip
            raise MessagesError("the chat template fails", found=f"{type(error).__name__}: {error}") from None


class _RefusedError(Exception):
    """Raised by a template through raise_exception."""


def _environment(*, marks: bool) -> jinja2.Environment:
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
            return jinja2.nodes.CallBlock(self.call_method(GENERATION), [], [], body).set_lineno(line)

        def generated(self, caller: Any) -> str:
            return f"{GENERATION_START}{caller()}{GENERATION_END}" if marks else str(caller())

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
