"""Conversations in every dialect, and the same ones broken at random."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ARGUMENTS = {"at": "a, b", "n": 3}
CALL = {"name": "look", "arguments": ARGUMENTS}
SCHEMA = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": SCHEMA}]
XML = "<function=look>\n<parameter=at>\na, b\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>"


def openai(arguments: Any = ARGUMENTS) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "reasoning_content": "look first", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12 C"},
        {"role": "assistant", "content": "There."},
    ]


DIALECTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "openai": (openai(), {"tools": TOOLS}),
    "arguments as text, developer, parts": (
        [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "input_text", "text": "Where?"}]},
            *openai(json.dumps(ARGUMENTS))[2:4],
            {"role": "assistant", "content": [{"type": "output_text", "text": "There."}]},
        ],
        {"functions": [SCHEMA]},
    ),
    "no ids": (
        [
            {key: value for key, value in turn.items() if key not in ("id", "tool_call_id")}
            if "tool_calls" not in turn
            else {**turn, "tool_calls": [{"function": CALL}]}
            for turn in openai()
        ],
        {"tools": [SCHEMA]},
    ),
    "sharegpt": (
        [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Where?"},
            {"from": "gpt", "value": "", "thinking": "look first", "function_call": CALL},
            {"from": "observation", "value": "12 C"},
            {"from": "gpt", "value": "There."},
        ],
        {"tools": json.dumps([SCHEMA])},
    ),
    "responses": (
        [
            {"type": "message", "role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Where?"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "look first"}]},
            {"type": "function_call", "call_id": "c1", **CALL},
            {"type": "function_call_output", "call_id": "c1", "output": "12 C"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "There."}]},
        ],
        {"tools": [{"type": "function", **SCHEMA}]},
    ),
    "anthropic": (
        [
            {"role": "user", "content": "Where?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "look first", "signature": "x"},
                    {"type": "tool_use", "id": "c1", "name": "look", "input": ARGUMENTS},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "c1",
                        "content": [{"type": "text", "text": "12 C"}],
                    }
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "There."}]},
        ],
        {
            "system": "Be brief.",
            "tools": [{"name": "look", "description": "Look.", "input_schema": SCHEMA["parameters"]}],
        },
    ),
    "hermes": (
        [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Where?"},
            {
                "from": "gpt",
                "value": f"<think>\nlook first\n</think>\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
            },
            {"from": "tool", "value": "<tool_response>\n12 C\n</tool_response>"},
            {"from": "gpt", "value": "There."},
        ],
        {"tools": TOOLS},
    ),
    "channels": (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "channel": "analysis", "content": "look first"},
            {
                "role": "assistant",
                "channel": "commentary",
                "recipient": "functions.look",
                "content": json.dumps(ARGUMENTS),
            },
            {"role": "tool", "name": "functions.look", "content": "12 C"},
            {"role": "assistant", "channel": "final", "content": "There."},
        ],
        {"tools": TOOLS},
    ),
}
"""The same conversation, as different tools and data sets keep it: turns and the other fields of the record."""

STEPS = [
    {"role": "system", "system_prompt": "Be brief."},
    {"role": "user", "text": "Fix it."},
    {"role": "ai", "text": "I look.\n\nls"},
    {"thought": "It is there.", "action": "cat a.py", "observation": "x = 1"},
    {"role": "ai", "text": "Done.", "mask": False},
]
"""An agent's steps; the last one is not to be left out by its mask."""


def malformed(number: int) -> tuple[Any, dict[str, Any]]:
    """Return a conversation of some dialect with one to four random changes; a function of the number."""
    draw = random.Random(number)
    turns, values = copy.deepcopy(draw.choice([*DIALECTS.values(), (STEPS, {})]))
    record: dict[str, Any] = {"turns": turns, **values}
    for _ in range(draw.randint(1, 4)):
        _break(record, draw)
    return record.pop("turns", None), record


def _break(record: dict[str, Any], draw: random.Random) -> None:
    """Change one place of a JSON value, reached at random."""
    holder: Any = record
    for _ in range(draw.randint(0, 6)):
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        inside = [key for key in keys if isinstance(holder[key], (dict, list)) and holder[key]]
        if not inside:
            break
        holder = holder[draw.choice(inside)]
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return
    key, other = draw.choice(keys), draw.choice(keys)
    kind = draw.randrange(7)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.insert(draw.randint(0, len(holder)), copy.deepcopy(holder[other]))
    elif kind == 3 and isinstance(holder[key], str):
        text = holder[key]
        holder[key] = text[: draw.randint(0, len(text))] + draw.choice(
            [
                "",
                "<tool_call>",
                "</think>",
                "<|im_end|>",
                "\ud83d",
                "\x00",
                "[",
                "{",
                "<tool_response>",
                "\U000f0001",
            ]
        )
    elif kind == 4:
        holder[key] = json.dumps(holder[key], ensure_ascii=draw.random() < 0.5)
    else:
        holder[key] = draw.choice(
            [
                None,
                "",
                0,
                1.5,
                True,
                [],
                {},
                [None],
                {"type": "image_url"},
                [{"type": "image"}],
                ["a"],
                "user",
            ]
        )
