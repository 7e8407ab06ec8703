"""RULERv2's scores: how much of what is wanted an answer holds, or how close in words it comes.

mk_niah_medium, mk_niah_hard       the letter of a choice
mv_niah_medium                     the last paragraph alone
qa_...                             any of several right answers, without documents that are copied first
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from longspan.eval.metrics_needlebench import boxed

SUBTASKS = tuple(
    f"{kind}_{level}"
    for kind in ("mk_niah", "mv_niah", "qa")
    for level in ("basic", "easy", "medium", "hard")
)
_LETTERS = ("mk_niah_medium", "mk_niah_hard")
_LAST_LETTER = re.compile(r"\b[A-J]\b(?!.*\b[A-J]\b)", re.DOTALL)
_STATED = re.compile(r"(?i)[*_]{0,2}Answer[*_]{0,2}\s*:[\s*_]{0,2}\s*([A-Z])(?![a-zA-Z0-9])")
_DOCUMENT = re.compile(r"Document \d+:(?:.*\n)+?\n")


def score(expected: Sequence[str], output: str, subtask: str) -> float:
    """Return the score of one output; `subtask` is one of SUBTASKS."""
    if subtask in _LETTERS:
        return float(_letter(output) == expected[0])
    answer = output.split("</think>")[-1].split("Answer:")[-1]
    if subtask == "mv_niah_medium":
        answer = answer.split("\n\n")[-1]
    if subtask.startswith("qa"):
        answer = _DOCUMENT.sub("", answer)
        return max(_held(each, answer) for each in expected)
    return sum(_held(each, answer) for each in expected) / len(expected)


def _held(expected: str, output: str) -> float:
    """Return 1.0 where the output holds a text, else 1 - word error rate, which is no less than 0."""
    wanted, given = expected.lower(), output.lower()
    if wanted in given:
        return 1.0
    words = wanted.split()
    return max(0.0, 1 - Levenshtein.distance(given.split(), words) / len(words)) if words else 0.0


def _letter(output: str) -> str | None:
    found = boxed(output)
    if found is None:
        stated = _STATED.findall(output)
        return str(stated[-1]) if stated else None
    letters = _LAST_LETTER.findall(found) if len(found) != 1 else []
    return str(letters[-1]) if letters else found
