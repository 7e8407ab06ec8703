"""NeedleBench's score of its Ancestral Trace Challenge: the last box holds the name, or the number, to the letter."""

from __future__ import annotations

import re

_NONE = "None"
_BOX = "\\boxed"


def boxed_name(expected: str, output: str) -> float:
    """Return 1.0 when what stands in the last \\\\boxed{} of an output is the expected text, cleaned as published."""
    inside = boxed(output) or ""
    twice = re.match(r"\{(.*)\}$", inside)
    return float(_cleaned(twice.group(1) if twice else inside).strip() == expected.strip())


def boxed(output: str) -> str | None:
    """Return what stands in the last box; None: there is none, or it has no end."""
    start = output.rfind(_BOX)
    if start < 0:
        return None
    opened = 0
    for place in range(start, len(output)):
        opened += (output[place] == "{") - (output[place] == "}")
        if output[place] == "}" and opened == 0:
            break
    else:
        return None
    box = output[start : place + 1]
    return box[len(_BOX) + 1 : -1] if box.startswith(_BOX + "{") else None


def _cleaned(text: str) -> str:
    if not text:
        return _NONE
    text = re.sub(r"\\boxed\{([^}]+)\}", r"\1", re.sub(r"\\text\{([^}]+)\}", r"\1", text))
    text = re.sub(r"\\[\[\]]", "", text).replace("\\", "")
    return re.sub(r"\s+", " ", text).strip().replace('"', "").replace("'", "").replace("~", " ")
