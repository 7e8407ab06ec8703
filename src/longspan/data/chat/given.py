"""What a template is given of a conversation: everything a record holds, under the names and in the forms it reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from longspan.data.chat.messages import (
    LEARNT,
    NOT_LEARNT,
    THOUGHTS,
    Message,
    MessagesError,
    check_texts,
    parsed,
)
from longspan.data.chat.template import Template

SETTINGS = "chat_template_kwargs"
"""Field of a record with further variables of the template."""
SYSTEM = "system"
LISTS = ("tools", "documents")
FIELDS = (*LISTS, "functions", SYSTEM, SETTINGS)
"""Fields that belong to a conversation whatever the template reads."""


class Given(NamedTuple):
    """A conversation as the template gets it."""

    messages: list[Message]
    variables: dict[str, Any]
    text: str
    """What the template makes of it."""


def variables_of(values: Mapping[str, Any], template: Template) -> dict[str, Any]:
    """Return the variables of a template among the fields of a record, without those that are empty.

    Raises:
        MessagesError: the record has tools or documents that the template does not read.
    """
    found: dict[str, Any] = {}
    settings = values.get(SETTINGS)
    if isinstance(settings, str):
        settings = parsed(settings, SETTINGS)
    if settings and not isinstance(settings, Mapping):
        raise MessagesError(f"{SETTINGS} is not an object", found=repr(settings)[:80])
    for name, value in {**values, **(settings or {})}.items():
        if name == SETTINGS or value is None or (isinstance(value, str) and not value.strip()):
            continue
        if name in LISTS:
            value = _list(value, name)
        if value in ([], {}):
            continue
        if name in LISTS and name not in template.variables:
            raise MessagesError(f"the chat template does not write the {name} of the record")
        check_texts(value, name)
        found[name] = value
    return found


def with_marks(turns: list[Message], values: dict[str, Any], template: Template) -> list[Message]:
    """Return turns with the marks of what is learnt that a record keeps beside them, taken out of `values`.

    A list has a mark for each turn; yes or no is for all. What a template reads under such a name is its own, and a
    number other than 0 and 1 (the loss of a record, its share) says nothing of turns.

    Raises:
        MessagesError: a list of another length.
    """
    for name in (*LEARNT, *NOT_LEARNT):
        if name in template.variables or values.get(name) is None:
            continue
        value = values[name]
        if isinstance(value, (list, tuple)):
            if len(value) != len(turns):
                raise MessagesError(
                    f"the record has {len(value)} marks in `{name}`",
                    allowed=f"one for each of {len(turns)} turns",
                )
            marks = list(value)
        elif value in (0, 1) or (isinstance(value, str) and value.lower() in ("0", "1", "true", "false")):
            marks = [value] * len(turns)
        else:
            continue
        del values[name]
        turns = [
            turn if mark is None else {name: mark, **turn} for turn, mark in zip(turns, marks, strict=True)
        ]
    return turns


def with_system(turns: list[Message], variables: dict[str, Any], template: Template) -> list[Message]:
    """Return the turns with the record's `system`, taken out of `variables`, as the first of them."""
    if SYSTEM in template.variables or SYSTEM not in variables:
        return turns
    text = variables.pop(SYSTEM)
    if not isinstance(text, str):
        raise MessagesError(f"{SYSTEM} is not text", found=type(text).__name__)
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": text}, *turns] if text.strip() else turns
    if turns[0]["content"] != text:
        raise MessagesError("the record has a system text beside its system turn")
    return turns


def give(template: Template, turns: Sequence[Message], variables: Mapping[str, Any]) -> Given:
    """Return the first form of a conversation that the template writes well.

    Data sets keep the arguments of a call as an object or as its JSON, a content as a text or in parts, and nothing
    beside a call as null or as an empty text; a template made for one writes the other as Python's own notation, or as
    JSON in JSON, or not, or fails.

    Raises:
        MessagesError: it writes none of the forms.
    """
    problem: MessagesError | None = None
    silent: Given | None = None
    for messages in _forms(template, [_named(turn, template) for turn in turns]):
        try:
            text = template.render(messages, variables)
        except MessagesError as error:
            problem = problem or error
            continue
        garbled = next((each for each in _garbled(messages) if each in text), None)
        if garbled is None:
            given = Given(messages, dict(variables), text)
            if all(name in text for name in _called(messages)):
                return given
            silent = silent or given
            continue
        problem = problem or MessagesError(
            "the chat template writes parts of a content, or arguments of a call, as no model reads them",
            found=garbled[:80],
        )
    if silent is not None:
        return silent
    assert problem is not None, "there is at least one form"
    raise problem


def arguments_of(message: Message) -> list[Any]:
    """Return the arguments of a turn's calls."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
    functions += [message["function_call"]] if "function_call" in message else []
    return [each["arguments"] for each in functions if isinstance(each, Mapping) and "arguments" in each]


def _list(value: Any, name: str) -> list[Any]:
    value = parsed(value, name) if isinstance(value, str) else value
    value = [] if value in (None, {}) else value
    if not isinstance(value, (list, tuple)):
        raise MessagesError(f"{name} is not a list", found=repr(value)[:80])
    return [parsed(each, name) if isinstance(each, str) else each for each in value]


def _named(turn: Message, template: Template) -> Message:
    """Return a turn whose thoughts and calls stand under every name that templates know, as transformers names them."""
    turn = dict(turn)
    if "function_call" in turn and "tool_calls" not in turn and "function_call" not in template.names:
        turn["tool_calls"] = [{"type": "function", "function": turn.pop("function_call")}]
    thoughts = next((turn[key] for key in THOUGHTS if turn.get(key)), None)
    if thoughts is None:
        return turn
    if not isinstance(thoughts, str):
        raise MessagesError("thoughts that are not text", found=type(thoughts).__name__)
    turn = {"thinking": thoughts, **turn, "reasoning_content": thoughts}
    return {"reasoning": thoughts, **turn} if "reasoning" in template.names else turn


def _forms(template: Template, turns: list[Message]) -> Iterator[list[Message]]:
    reads_parts = {"type", "text"} <= template.names
    has_parts = any(not isinstance(turn["content"], str) for turn in turns)
    contents: list[Callable[[Any], Any]] = [_as_text] if has_parts and not reads_parts else [_as_is]
    if has_parts and reads_parts:
        contents.append(_as_text)
    calls: list[Callable[[Any], Any]] = [_as_is]
    if any(arguments_of(turn) for turn in turns):
        calls += [_as_object, _as_json]
    if any(turn["content"] == "" and turn.get("tool_calls") for turn in turns):
        contents.append(_as_null)
    for content in contents:
        for arguments in calls:
            yield [_formed(turn, content, arguments) for turn in turns]


def _formed(turn: Message, content: Callable[[Any], Any], arguments: Callable[[Any], Any]) -> Message:
    made = {**turn, "content": content(turn["content"])}
    if made["content"] is None and not turn.get("tool_calls"):
        made["content"] = ""
    if turn.get("tool_calls"):
        made["tool_calls"] = [_call(call, arguments) for call in turn["tool_calls"]]
    if isinstance(turn.get("function_call"), Mapping):
        made["function_call"] = _call(turn["function_call"], arguments)
    return made


def _call(call: Mapping[str, Any], arguments: Callable[[Any], Any]) -> dict[str, Any]:
    made = dict(call)
    if isinstance(call.get("function"), Mapping):
        made["function"] = _call(call["function"], arguments)
    if "arguments" in call:
        made["arguments"] = arguments(call["arguments"])
    return made


def _as_is(value: Any) -> Any:
    return value


def _as_text(content: Any) -> Any:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _as_null(content: Any) -> Any:
    return content or None


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _called(messages: Sequence[Message]) -> list[str]:
    """Return the names of all functions that are called."""
    return [
        call.get("function", call)["name"] for message in messages for call in message.get("tool_calls") or ()
    ]


def _garbled(messages: Sequence[Message]) -> Iterator[str]:
    """Yield what would stand in the text if a template had not understood a value."""
    for message in messages:
        if not isinstance(message["content"], str) and message["content"]:
            yield str(message["content"])
        for arguments in arguments_of(message):
            if isinstance(arguments, str) and not isinstance(_as_object(arguments), str):
                yield json.dumps(arguments, ensure_ascii=False)
            elif not isinstance(arguments, str) and str(arguments) != json.dumps(
                arguments, ensure_ascii=False
            ):
                yield str(arguments)
