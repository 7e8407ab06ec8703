"""Solves RULER's prompts from their text alone, as a careful reader would: what the expected answers must equal."""

from __future__ import annotations

import re
from collections import Counter


def solve(subtask: str, prompt: str) -> list[str]:
    """Return the answers in any order."""
    if subtask.startswith("niah"):
        return _needles(prompt)
    return {"vt": _variables, "cwe": _common, "fwe": _frequent}[subtask](prompt)


def _needles(prompt: str) -> list[str]:
    context, _, question = prompt.rpartition("\nWhat ")
    said = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", context)
    asked = re.split(r", and |, ", re.search(r" for (.*?) mentioned", question).group(1))  # type: ignore[union-attr]
    return [value for key, value in said if key in asked]


def _variables(prompt: str) -> list[str]:
    _, _, task = prompt.rpartition("Memorize and track")
    value = re.search(r"assigned the value (\d+) in", task).group(1)  # type: ignore[union-attr]
    said = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", task)
    found, last = [], [value]
    while last:
        last = [name for name, origin in said if origin in last]
        found += last
    return found


def _common(prompt: str) -> list[str]:
    _, _, task = prompt.rpartition("Below is a numbered list")
    counts = Counter(re.findall(r"\d+\. (\S+)", task.partition("\nQuestion")[0]))
    ranked = counts.most_common()
    assert ranked[9][1] > ranked[10][1]
    return [word for word, _ in ranked[:10]]


def _frequent(prompt: str) -> list[str]:
    text = prompt.partition("coded words. ")[2].rpartition("\nQuestion")[0]
    ranked = [(word, count) for word, count in Counter(text.split()).most_common() if word != "..."]
    assert len(ranked) == 3 or ranked[2][1] > ranked[3][1]
    return [word for word, _ in ranked[:3]]
