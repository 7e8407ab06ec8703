"""NeedleBench's scores: what the last box holds, and of v1 how much of a needle or of a name an answer says."""

from __future__ import annotations

import re

from rapidfuzz.distance import Levenshtein

_MISSED = 0.2
"""What a needle said without its key words counts, at most."""
_NONE = "None"
_BOX = "\\boxed"


def boxed_name(expected: str, output: str) -> float:
    """Return 1.0 when what stands in the last \\\\boxed{} of an output is the expected text, cleaned as published."""
    inside = boxed(output) or ""
    twice = re.match(r"\{(.*)\}$", inside)
    return float(_cleaned(twice.group(1) if twice else inside).strip() == expected.strip())


def needle_said(keyword: str, output: str, needle: str) -> float:
    """Return 1.0 where an output holds the key words, else a fifth of its likeness to the needle, spaces left out."""
    if keyword in output:
        return 1.0
    wanted, given = (re.sub(r"\s+", "", text) for text in (needle, output))
    longest = max(len(wanted), len(given))
    return _MISSED * (1 - Levenshtein.distance(wanted, given) / longest) if longest else _MISSED


def words_said(expected: str, output: str) -> float:
    """Return the share of the expected words that stand in an output, in any case and also inside of others."""
    words, given = expected.lower().split(), output.lower()
    return sum(word in given for word in words) / len(words) if words else 0.0


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
