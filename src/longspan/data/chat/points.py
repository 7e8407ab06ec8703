"""Points in messages: private-use marks around what a turn says show where a template puts it.

    said       Hi                        <point 0>Hi<point 0>
    rendered   <|user|>Hi<|end|>         <|user|><point 0>Hi<point 0><|end|>

Without its points the second text must be the first, character by character: then the template took the same way
both times, and where the points are is where the words are, whatever was trimmed, cut off or escaped on the way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from longspan.data.chat.messages import (
    CALLS,
    GENERATION_END,
    GENERATION_START,
    NO_SPEECH,
    POINT_END,
    POINT_START,
    THOUGHTS,
    Message,
)

_EVENT = re.compile(f"({POINT_START}[0-9]+{POINT_END}|{GENERATION_START}|{GENERATION_END})")
_TAG = re.compile(r"<[^<>\s]{1,38}>|\[[^\[\]\s]{1,38}\]|\u25c1[^\u25c1\u25b7\s]{1,38}\u25b7")
_COMMAND = re.compile(r"/[a-z_]{2,38}")
"""A word that switches something, such as SmolLM3's /no_think: the template takes it out of what is said."""
THOUGHT = "thoughts"
SPOKEN_IN_CALLS = ("name", "arguments", "parameters", "input")


class Leaf(NamedTuple):
    """A text between two points."""

    turn: int
    field: str
    """"content", "thoughts", "tool_calls", or another key of the turn."""
    text: str


class Point(NamedTuple):
    """A point found in a rendered text."""

    order: int
    """Number among all points and borders of blocks."""
    place: int
    leaf: int


class GenerationBlock(NamedTuple):
    """What a `{% generation %}` block wrote: characters `start` to `end`."""

    first: int
    """`order` of its start and its end."""
    last: int
    start: int
    end: int


class MarkedText(NamedTuple):
    """A rendered text without its marks, and where they were."""

    text: str
    points: list[Point]
    blocks: list[GenerationBlock]
    leaves: list[Leaf]

    def counts(self) -> list[int]:
        """Return how many points of each leaf there are: 2 where the template writes it once."""
        counts = [0] * len(self.leaves)
        for point in self.points:
            counts[point.leaf] += 1
        return counts


def read(rendered: str, leaves: Sequence[Leaf]) -> MarkedText:
    """Take the marks out of a rendered text."""
    parts = _EVENT.split(rendered)
    points: list[Point] = []
    blocks: list[GenerationBlock] = []
    opened: list[tuple[int, int]] = []
    place = 0
    for order, part in enumerate(parts):
        if order % 2 == 0:
            place += len(part)
        elif part == GENERATION_START:
            opened.append((order, place))
        elif part == GENERATION_END:
            first, start = opened.pop()
            # What an inner block writes is in the outer one.
            if not opened:
                blocks.append(GenerationBlock(first, order, start, place))
        else:
            points.append(Point(order, place, int(part[1:-1])))
    return MarkedText("".join(parts[0::2]), points, blocks, list(leaves))


def forms_of(text: str) -> tuple[str, ...]:
    """Return a text as it stands and as JSON writes it."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


class Pointer:
    """Puts points into messages.

    Args:
        guard: keeps special tokens in a text from being read as such.
        names: every name that the template may look up in a turn.
        texts: every text in the template.
        is_special: says whether a text holds a special token.
    """

    def __init__(
        self,
        guard: Callable[[str], str],
        names: Collection[str],
        texts: Collection[str],
        is_special: Callable[[str], Any],
    ) -> None:
        self._guard, self._names = guard, names
        found = {tag for text in texts for tag in _TAG.findall(text)}
        found |= {text for text in texts if _COMMAND.fullmatch(text)}
        usable = sorted((tag for tag in found if not is_special(tag)), key=len, reverse=True)
        self.tags = re.compile("(" + "|".join(map(re.escape, usable)) + ")" if usable else "((?!))")
        """Matches what the template may look for in a content, such as `</think>` or `/no_think`: points keep clear of
        it."""

    def guarded(self, value: Any) -> Any:
        """Return a JSON value with guards in all its texts."""
        if isinstance(value, str):
            return self._guard(value)
        if isinstance(value, Mapping):
            return {self._guard(str(key)): self.guarded(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.guarded(each) for each in value]
        return value

    def point(
        self, messages: Sequence[Message], *, others: bool, calls: bool, outside: Collection[int]
    ) -> tuple[list[Message], list[Leaf]]:
        """Return messages with points in them, and what each is a point of.

        Args:
            others: also in turns that are not the assistant's.
            calls: also in calls of tools and in keys of the template's own.
            outside: turns whose content has its first point before its leading white space, not behind it.
        """
        leaves: list[Leaf] = []
        pointed = []
        for number, message in enumerate(messages):
            answer = message["role"] == "assistant"
            if answer or others:
                message = dict(message)
            if (answer or others) and message["content"] is not None:
                self._point_content(message, number, leaves, number in outside)
            if answer:
                self._point_thoughts(message, number, leaves)
            if answer and calls:
                self._point_rest(message, number, leaves)
            silent = answer and not any(leaf.turn == number for leaf in leaves)
            if silent and isinstance(message["content"], str):
                message["content"] += _around("", Leaf(number, "content", ""), leaves)
            pointed.append(message)
        return pointed, leaves

    def _point_content(self, message: Message, number: int, leaves: list[Leaf], outside: bool) -> None:
        content = message["content"]
        if isinstance(content, str):
            message["content"] = self._point_text(content, number, leaves, outside)
        else:
            message["content"] = [
                {**part, "text": self._point_text(part["text"], number, leaves, outside and place == 0)}
                for place, part in enumerate(content)
            ]

    def _point_text(self, text: str, number: int, leaves: list[Leaf], outside: bool) -> str:
        parts = self.tags.split(text)
        for place in range(0, len(parts), 2):
            part = parts[place]
            core = part.strip()
            if outside and place == 0:
                core = part.rstrip()
            if not core.strip():
                continue
            before, _, after = part.partition(core)
            parts[place] = before + _around(core, Leaf(number, "content", core), leaves) + after
        return "".join(parts)

    def _point_thoughts(self, message: Message, number: int, leaves: list[Leaf]) -> None:
        known: dict[str, str] = {}
        for key in THOUGHTS:
            text = message.get(key)
            if isinstance(text, str) and text.strip():
                core = text.strip()
                if core not in known:
                    known[core] = _around(core, Leaf(number, THOUGHT, core), leaves)
                message[key] = text.replace(core, known[core], 1)

    def _point_rest(self, message: Message, number: int, leaves: list[Leaf]) -> None:
        if message.get("tool_calls"):
            message["tool_calls"] = [_point_call(call, number, leaves) for call in message["tool_calls"]]
        if isinstance(message.get("function_call"), Mapping):
            message["function_call"] = _point_call(message["function_call"], number, leaves)
        for key, value in message.items():
            own = key in self._names and key not in NO_SPEECH and key not in (*THOUGHTS, *CALLS, "name")
            if own and isinstance(value, str) and value.strip():
                core = value.strip()
                message[key] = value.replace(core, _around(core, Leaf(number, key, core), leaves), 1)


def _around(text: str, leaf: Leaf, leaves: list[Leaf]) -> str:
    point = f"{POINT_START}{len(leaves)}{POINT_END}"
    leaves.append(leaf)
    return f"{point}{text}{point}"


def _point_call(call: Mapping[str, Any], number: int, leaves: list[Leaf]) -> dict[str, Any]:
    made = dict(call)
    for key, value in call.items():
        if key == "function" and isinstance(value, Mapping):
            made[key] = _point_call(value, number, leaves)
        elif key in SPOKEN_IN_CALLS:
            made[key] = _point_values(value, number, leaves)
    return made


def _point_values(value: Any, number: int, leaves: list[Leaf]) -> Any:
    if isinstance(value, str):
        core = value.strip()
        return value.replace(core, _around(core, Leaf(number, CALLS[0], core), leaves), 1) if core else value
    if isinstance(value, Mapping):
        return {key: _point_values(each, number, leaves) for key, each in value.items()}
    if isinstance(value, list):
        return [_point_values(each, number, leaves) for each in value]
    return value
