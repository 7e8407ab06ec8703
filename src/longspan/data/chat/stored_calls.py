"""Calls of tools in conversations of one form: their arguments, and the ids by which calls and results name each other.

"arguments": "" or null, or none at all        {}
"parameters" or "input" in their place         "arguments"
JSON in JSON                                   JSON
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from longspan.data.chat.messages import CALLS


def with_arguments(turns: list[Any], notes: Counter[str]) -> list[Any]:
    """Return turns whose calls have arguments, as an object or its JSON; those that have others are counted."""
    made = []
    for turn in turns:
        if isinstance(turn, Mapping) and turn.get("role") == "assistant":
            calls, old = turn.get(CALLS[0]), turn.get(CALLS[1])
            if isinstance(calls, (list, tuple)):
                turn = {**turn, CALLS[0]: [_call(call, notes) for call in calls]}
            if isinstance(old, Mapping):
                turn = {**turn, CALLS[1]: _call(old, notes)}
        made.append(turn)
    return made


def _call(call: Any, notes: Counter[str]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], notes)}
    made = dict(call)
    value = made.get("arguments")
    if value is None:
        other = next((key for key in ("parameters", "input") if made.get(key) is not None), None)
        value = {} if other is None else made.pop(other)
    made["arguments"] = _arguments(value, notes)
    return made


def _arguments(value: Any, notes: Counter[str]) -> Any:
    if isinstance(value, str) and not value.strip():
        return "{}"
    inner: Any = value
    for _ in range(2):
        if isinstance(inner, str):
            value = inner
            try:
                inner = json.loads(inner)
            except (ValueError, RecursionError):
                break
    if not isinstance(inner, Mapping):
        notes["calls whose arguments are no JSON object"] += 1
    return value


def with_ids(turns: list[Any]) -> list[Any]:
    """Return turns in which calls and results name each other, where some of them lack their ids: in their order."""
    results = [turn for turn in turns if isinstance(turn, Mapping) and turn.get("role") == "tool"]
    if not results or all(isinstance(turn.get("tool_call_id"), str) for turn in results):
        return turns
    made: list[Any] = []
    waiting: list[str] = []
    count = 0
    for turn in turns:
        if not isinstance(turn, Mapping):
            made.append(turn)
            continue
        calls = turn.get(CALLS[0])
        if turn.get("role") == "assistant" and isinstance(calls, (list, tuple)):
            named = []
            for call in calls:
                if isinstance(call, Mapping) and not isinstance(call.get("id"), str):
                    # Nine letters and digits: what the strictest templates take.
                    call = {**call, "id": f"call{count:05}"}
                count += 1
                if isinstance(call, Mapping):
                    waiting.append(call["id"])
                named.append(call)
            turn = {**turn, CALLS[0]: named}
        elif turn.get("role") == "tool":
            own = turn.get("tool_call_id")
            if isinstance(own, str):
                waiting = [each for each in waiting if each != own]
            elif waiting:
                turn = {**turn, "tool_call_id": waiting.pop(0)}
        made.append(turn)
    return made
