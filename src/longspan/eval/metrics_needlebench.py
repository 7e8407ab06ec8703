"""NeedleBench's score of its Ancestral Trace Challenge: the last box holds the name, or the number, to the letter."""

from __future__ import annotations

import re

_NONE = "None"
_BOX = "\\boxed"


def boxed_name(expected: str, output: str) -> float:
    """Return 1.0 when what stands in the last \\\\boxed{} of an output is the expected text, cleaned as published."""
    return float(_cleaned(_boxed(output)).strip() == expected.strip())


def _boxed(output: str) -> str:
    """Return what stands in the last box, without a second pair of braces; empty where there is none that ends."""
    start = output.rfind(_BOX)
    if start < 0:
        return ""
    opened = 0
    for place in range(start, len(output)):
        opened += (output[place] == "{") - (output[place] == "}")
        if output[place] == "}" and opened == 0:
            break
    else:
        return ""
    box = output[start : place + 1]
    if not box.startswith(_BOX + "{"):
        return ""
    inside = box[len(_BOX) + 1 : -1]
    twice = re.match(r"\{(.*)\}$", inside)
    return twice.group(1) if twice else inside


def _cleaned(text: str) -> str:
    if not text:
        return _NONE
    text = re.sub(r"\\boxed\{([^}]+)\}", r"\1", re.sub(r"\\text\{([^}]+)\}", r"\1", text))
    text = re.sub(r"\\[\[\]]", "", text).replace("\\", "")
    return re.sub(r"\s+", " ", text).strip().replace('"', "").replace("'", "").replace("~", " ")
