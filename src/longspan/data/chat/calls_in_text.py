"""Calls of tools, their results and thoughts that stand as marked-up text in what a turn says.

<tool_call>{"name": "look", "arguments": {"at": "a"}}</tool_call>                  Hermes, Qwen 2.5
<tool_call><function=look><parameter=at>a</parameter></function></tool_call>        Qwen 3 Coder, SWE agents
<tool_response>12 C</tool_response>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>|(<function=[^<>\n]+>.*?</function>)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^<>\n]+)>(.*)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>(.*?)</parameter>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def calls_of(text: str) -> tuple[str, list[dict[str, Any]]] | None:
    """Return what is said before the calls in a text, and the calls; None where it ends in none, or in a broken one.

    Nothing may stand between or behind calls: a turn as a template writes it from keys says it before.
    """
    matches = list(_CALL.finditer(text))
    if not matches:
        return None
    said, place = text[: matches[0].start()], matches[0].start()
    calls = []
    for match in matches:
        call = _call(match.group(1) if match.group(1) is not None else match.group(2))
        if call is None or text[place : match.start()].strip():
            return None
        calls.append(call)
        place = match.end()
    return None if text[place:].strip() else (said.rstrip(), calls)


def results_of(text: str) -> list[str] | None:
    """Return the results of tools that a text is made of; None where it holds anything else."""
    results = _RESULT.findall(text)
    return results if results and not _RESULT.sub("", text).strip() else None


def thoughts_of(text: str) -> tuple[str, str]:
    """Return the thoughts before what a text says, and the rest; no thoughts where it begins with none."""
    match = _THOUGHT.match(text)
    return ("", text) if match is None else (match.group(1).strip(), text[match.end() :])


def _call(text: str) -> dict[str, Any] | None:
    """Return the name and arguments of a call; None where they cannot be read."""
    function = _FUNCTION.fullmatch(text.strip())
    if function is not None:
        found = _PARAMETER.findall(function.group(2))
        if _PARAMETER.sub("", function.group(2)).strip() or len(dict(found)) < len(found):
            return None
        return {
            "name": function.group(1).strip(),
            "arguments": {name: _value(value) for name, value in found},
        }
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return None
    # A key more would be lost.
    if call.keys() - {"name", "arguments", "parameters"}:
        return None
    return {"name": call["name"], "arguments": call.get("arguments", call.get("parameters", {}))}


def _value(text: str) -> Any:
    """Return an object or a list as such; every other argument is a text, which templates write as it stands."""
    text = text.removeprefix("\n").removesuffix("\n")
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text
