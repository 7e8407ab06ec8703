"""Conversations as data sets write them, brought to one form: a list of {"role", "content"} and whatever else a
turn carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from longspan.core.errors import DataError

ROLES: dict[str, str] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
}
"""What data sets call a role, and what templates call it."""

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys under which data sets keep, and templates look for, what the assistant thought."""
CALLS = ("tool_calls", "function_call")
LEARNT = ("weight", "train", "training", "trainable", "loss", "learn")
"""Keys by which data sets say that a turn is learnt (1, true) or only read (0, false)."""
NOT_LEARNT = ("masked", "mask")
"""Keys that say the opposite."""
NO_SPEECH = frozenset(
    {"role", "from", "value", "content", "id", "type", "tool_call_id", *LEARNT, *NOT_LEARNT}
)
"""Keys of a turn that name it or steer its use, and say nothing by themselves."""

# Private-use characters that mark places while a conversation is rendered; no message may hold one.
POINT_START, POINT_END = "\U000f0001", "\U000f0002"
SPECIAL_START, SPECIAL_END = "\U000f0003", "\U000f0004"
GENERATION_START, GENERATION_END = "\U000f0005", "\U000f0006"
GUARD = "\U000f0007"
MARKS = frozenset(
    (POINT_START, POINT_END, SPECIAL_START, SPECIAL_END, GENERATION_START, GENERATION_END, GUARD)
)

Message = dict[str, Any]
"""One turn: "role" ("system", "user", "assistant" or "tool"), "content" (a text, or parts) and other keys."""


class MessagesError(DataError):
    """One conversation that cannot be used; others of the same file may be sound."""


def as_messages(turns: Any) -> list[Message]:
    """Return turns in one form, from {"role", "content"} or ShareGPT's {"from", "value"}, or their JSON.

    A missing content (null) is an empty one; other keys without a value (null) are left out, all others kept.

    Raises:
        MessagesError: no turns, an unknown role, content that is neither text nor parts of text, a second system
            turn or one that is not the first.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parsed(turns, "the conversation")
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)) or not turns:
        raise MessagesError(
            "not a conversation", found=repr(turns)[:80], allowed="a list of at least one turn"
        )
    messages = [_message(turn, number) for number, turn in enumerate(turns)]
    late = [number for number, message in enumerate(messages) if message["role"] == "system" and number]
    if late:
        raise MessagesError(f"turn {late[0]} is a system turn; only the first may be")
    return messages


def parsed(text: str, what: str) -> Any:
    """Return the value of a JSON text. Raises MessagesError, naming `what` it was to be."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessagesError(f"{what} is a text that is not JSON", found=f"{text[:60]!r}: {error}") from None


def unpacked(turn: Any, number: int) -> Any:
    """Return a turn, read where it is an object as JSON text. Raises MessagesError: broken JSON."""
    is_json = isinstance(turn, str) and turn.lstrip().startswith("{")
    return parsed(turn, f"turn {number}") if is_json else turn


def is_learnt(message: Message, number: int) -> bool:
    """Say whether a turn is to be learnt, as its `weight`, `train`, `masked` ... says; True where none does.

    Raises:
        MessagesError: such a key holds something else than yes or no.
    """
    says = {}
    for key in (*LEARNT, *NOT_LEARNT):
        if key not in message:
            continue
        value = message[key]
        value = (
            {"true": True, "false": False, "1": 1, "0": 0}.get(value.lower(), value)
            if isinstance(value, str)
            else value
        )
        # A mask of 1 is "learnt" to some and "left out" to others.
        plain = isinstance(value, bool) or (key != "mask" and value in (0, 1) and not isinstance(value, str))
        if not plain:
            allowed = "true or false" if key == "mask" else "0 or 1, false or true"
            raise MessagesError(
                f"turn {number} does not say by its `{key}` whether it is learnt",
                found=repr(value)[:80],
                allowed=allowed,
            )
        says[key] = bool(value) == (key in LEARNT)
    if len(set(says.values())) > 1:
        raise MessagesError(
            f"turn {number} says both that it is learnt and that it is not", found=", ".join(says)
        )
    return all(says.values())


def is_marked(message: Message) -> bool:
    """Say whether a key of a turn says anything of its learning."""
    return any(key in message for key in (*LEARNT, *NOT_LEARNT))


def strings_of(value: Any) -> list[str]:
    """Return all texts in a JSON value, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, each in value.items() for text in (str(key), *strings_of(each))]
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in strings_of(each)]
    return []


def check_texts(value: Any, what: str) -> None:
    """Raise MessagesError where a text cannot be encoded, or holds characters that mark places in templates."""
    for text in strings_of(value):
        if not text.isascii() and any(mark in text for mark in MARKS):
            raise MessagesError(f"{what} holds private-use characters U+F0001 to U+F0007")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MessagesError(f"{what}: lone surrogate at character {error.start}") from None


def _message(turn: Any, number: int) -> Message:
    turn = unpacked(turn, number)
    if not isinstance(turn, Mapping):
        raise MessagesError(f"turn {number} is not an object", found=repr(turn)[:80])
    # Tables give every turn the keys of all: null for those that it does not have.
    turn = {str(key): value for key, value in turn.items() if value is not None}
    keys = next((keys for keys in (("role", "content"), ("from", "value")) if keys[0] in turn), None)
    if keys is None:
        raise MessagesError(
            f"turn {number} does not say who speaks",
            found="keys " + ", ".join(turn),
            allowed="role and content, or from and value",
        )
    role = turn.pop(keys[0])
    if not isinstance(role, str) or role not in ROLES:
        raise MessagesError(f"turn {number} has an unknown role: {role!r:.40}", allowed=list(ROLES))
    content = _content(turn.pop(keys[1], ""), number)
    check_texts([content, turn], f"turn {number}")
    message = {"role": ROLES[role], "content": content, **turn, **_checked_calls(turn, number)}
    for key in CALLS:
        # Templates ask whether there is such a key, not whether it holds a call.
        if key in message and not message[key]:
            del message[key]
    if not content and not any(message.get(key) for key in (*CALLS, *THOUGHTS)) and keys[1] == "content":
        _check_empty(turn, number)
    return message


def calls_in(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the calls of tools in a turn by their keys, as JSON values. Raises MessagesError: broken JSON."""
    found = {key: turn[key] for key in CALLS if turn.get(key)}
    return {
        key: parsed(value, f"`{key}` of turn {number}") if isinstance(value, str) else value
        for key, value in found.items()
    }


def _checked_calls(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    found = calls_in(turn, number)
    calls = found.get(CALLS[0], [])
    if not isinstance(calls, (list, tuple)):
        raise MessagesError(f"turn {number} has tool calls that are not a list", found=repr(calls)[:80])
    old = found.get(CALLS[1])
    for call in [*calls, *([] if old is None else [old])]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name.strip():
            raise MessagesError(f"turn {number} has a tool call without a name", found=repr(call)[:80])
    return found


def _check_empty(turn: Mapping[str, Any], number: int) -> None:
    """Raise MessagesError where a turn says what it has to say under a key that is no content."""
    other = next((key for key in ("value", "text", "message", "parts") if turn.get(key)), None)
    if other is not None:
        raise MessagesError(f"turn {number} has no content, but a `{other}`", allowed="role and content")


def _content(content: Any, number: int) -> Any:
    """Return a text, or a list of {"type": "text", "text": ...}."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, (list, tuple)):
        raise MessagesError(f"turn {number} has content that is not text: {type(content).__name__}")
    parts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            found = "a part without a text" if kind == "text" else f"a part of type {kind}"
            raise MessagesError(f"turn {number} has content that is not text: {found}")
        parts.append({key: value for key, value in part.items() if value is not None})
    return parts
