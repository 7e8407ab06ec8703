"""Random conversations with system turns, tools, calls, thoughts and results; a function of a number."""

from __future__ import annotations

import json
import random
from typing import Any

WORDS = [
    "Hello",
    "x = 1\n",
    " \u00e9t\u00e9",
    "<b>",
    "12",
    "\n\n",
    "so.",
    "a\tb",
    "&",
    '"q"',
    "\u4e2d\u6587",
    "{y}",
]
SPECS: list[dict[str, Any]] = [
    {"type": "string", "description": "Where."},
    {"type": "string", "enum": ["a", "b"], "default": "a"},
    {"type": "integer", "default": 3},
    {"type": "number", "nullable": True},
    {"type": "boolean"},
    {"type": "array", "items": {"type": "integer"}, "nullable": True},
    {"type": "array"},
    {"type": "array", "items": {"type": "object", "properties": {"deep": {"type": "string"}}}},
    {"type": "object"},
    {
        "type": "object",
        "properties": {"one": {"type": "number"}, "two": {"type": "string"}},
        "required": ["one"],
    },
    {"type": ["string", "null"]},
    {"oneOf": [{"type": "string", "description": "A text."}, {"type": "integer"}]},
    {"oneOf": [{"type": "object"}, {"type": "integer"}]},
    {
        "oneOf": [{"type": "integer", "default": 3}, {"type": "array", "items": {"type": "string"}}],
        "default": "3",
    },
    {},
]


def chat(number: int, **may: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return turns and the other variables of a template; `may`: tools, parallel, thoughts, text_beside_calls."""
    draw = random.Random(number)
    turns: list[dict[str, Any]] = []
    if draw.random() < 0.5:
        turns.append({"role": "system", "content": _text(draw)})
    tools = (
        [_tool(draw, name) for name in ("look", "send")] if may.get("tools") and draw.random() < 0.7 else []
    )
    for _ in range(draw.randint(1, 3)):
        turns.append({"role": "user", "content": _text(draw)})
        for _ in range(draw.randint(0, 3) if tools else 0):
            count = draw.randint(1, 2) if may.get("parallel") else 1
            calls = [_call(draw, number) for number in range(count)]
            answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": calls}
            thinks = may.get("thoughts") and draw.random() < 0.5
            if may.get("text_beside_calls") and not thinks and draw.random() < 0.4:
                answer["content"] = _text(draw)
            if thinks:
                answer["reasoning_content"] = _text(draw)
            turns.append(answer)
            turns += [
                {
                    "role": "tool",
                    "name": call["function"]["name"],
                    "tool_call_id": call["id"],
                    "content": _text(draw),
                }
                for call in calls
            ]
        answer = {"role": "assistant", "content": _text(draw)}
        if may.get("thoughts") and draw.random() < 0.5:
            answer["reasoning_content"] = _text(draw)
        turns.append(answer)
    return turns, {"tools": tools} if tools else {}


def _text(draw: random.Random) -> str:
    return "say " + "".join(draw.choices(WORDS, k=draw.randint(0, 4))) + draw.choice(["end", "end\n", "end "])


def _call(draw: random.Random, number: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"at": _text(draw)}
    if draw.random() < 0.5:
        arguments["more"] = draw.choice([3, 1.5, True, None, ["x", 2], {"deep": "\u00e9"}])
    function = {"name": draw.choice(["look", "send"]), "arguments": arguments}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def _tool(draw: random.Random, name: str) -> dict[str, Any]:
    names = ["at", "more", "third"][: draw.randint(0, 3)]
    properties = {each: draw.choice(SPECS) for each in names}
    parameters = {"type": "object", "properties": properties, "required": names[:1]}
    return {
        "type": "function",
        "function": {"name": name, "description": f"{name} it.", "parameters": parameters},
    }


def with_text_arguments(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return turns whose calls keep their arguments as JSON."""
    return json.loads(json.dumps(turns), object_hook=_as_text)


def _as_text(value: dict[str, Any]) -> dict[str, Any]:
    if isinstance(value.get("arguments"), dict):
        return {**value, "arguments": json.dumps(value["arguments"], ensure_ascii=False)}
    return value
