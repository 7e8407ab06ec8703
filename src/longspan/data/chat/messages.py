"""Conversations as data sets write them, brought to one form: a list of {"role", "content"}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from longspan.core.errors import DataError
from longspan.data.readers.base import MissingFieldError
from longspan.data.readers.fields import lookup

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

# Private-use characters that mark places while a conversation is rendered; no message may hold one.
CONTENT_START, CONTENT_END = "\U000f0001", "\U000f0002"
SPECIAL_START, SPECIAL_END = "\U000f0003", "\U000f0004"
GENERATION_START, GENERATION_END = "\U000f0005", "\U000f0006"
MARKS = frozenset((CONTENT_START, CONTENT_END, SPECIAL_START, SPECIAL_END, GENERATION_START, GENERATION_END))


class Message(TypedDict):
    """One turn."""

    role: str
    """"system", "user", "assistant" or "tool"."""
    content: str


class MessagesError(DataError):
    """One conversation that cannot be used; others of the same file may be sound."""


def document_messages(record: Mapping[str, Any], field: str) -> list[Message]:
    """Return the conversation in `field` ("messages", "conversations", a dotted path) of a record.

    Raises:
        DataError: there is no such field.
        MessagesError: it does not hold a conversation; see `as_messages`.
    """
    try:
        return as_messages(lookup(dict(record), field))
    except MissingFieldError as error:
        raise DataError(f"the record has {error.reason}", found=error.found) from None


def as_messages(turns: Any) -> list[Message]:
    """Return turns in one form, from {"role", "content"} or ShareGPT's {"from", "value"}.

    A missing content (null) is an empty one. Other keys of a turn are left out.

    Raises:
        MessagesError: no turns, an unknown role, content that is not text, a tool call, a second system turn
            or one that is not the first.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)) or not turns:
        raise MessagesError(
            "not a conversation", found=repr(turns)[:80], allowed="a list of at least one turn"
        )
    messages = [_message(turn, number) for number, turn in enumerate(turns)]
    late = [number for number, message in enumerate(messages) if message["role"] == "system" and number]
    if late:
        raise MessagesError(f"turn {late[0]} is a system turn; only the first may be")
    return messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise MessagesError(f"turn {number} is not an object", found=repr(turn)[:80])
    keys = next((keys for keys in (("role", "content"), ("from", "value")) if keys[0] in turn), None)
    if keys is None:
        raise MessagesError(
            f"turn {number} does not say who speaks",
            found="keys " + ", ".join(map(str, turn)),
            allowed="role and content, or from and value",
        )
    role = turn[keys[0]]
    if not isinstance(role, str) or role not in ROLES:
        raise MessagesError(f"turn {number} has an unknown role", found=repr(role)[:80], allowed=list(ROLES))
    if turn.get("tool_calls") or turn.get("function_call"):
        raise MessagesError(f"turn {number} calls a tool, which is not supported", fix="leave the record out")
    content = turn.get(keys[1])
    content = "" if content is None else content
    if not isinstance(content, str):
        raise MessagesError(f"turn {number} has content that is not text", found=type(content).__name__)
    if any(mark in content for mark in MARKS):
        raise MessagesError(f"turn {number} holds private-use characters U+F0001 to U+F0006")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise MessagesError(f"turn {number}: lone surrogate at character {error.start}") from None
    return {"role": ROLES[role], "content": content}
