"""Scores of InfiniteBench's tasks, from what its published scoring says; 0..1 for one output.

Kept is what decides a score: which word or number of an output counts. A perfect answer scores 1 everywhere,
which the published code misses for negative numbers (math_calc) and for a bare letter or name (code_debug), and
it stops with an error at a decimal number where a whole one is expected (math_find) and at an empty summary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from longspan.eval.metrics import f_measure
from longspan.eval.metrics_longbench import without_chinese_punctuation

_PUNCTUATION = re.compile(r"[\n:\"'.,?!{}]")
_CHOICE_NOISE = re.compile(r"[\n\"'.,?!{}]")
_CODE_NOISE = re.compile(r"[\n.`'\":]")
_DEBUG_NOISE = re.compile(r"[\n`'\"*-]|[Oo]ption")
_NUMBER = re.compile(r"\d+\.\d+|\d+")
_DEBUG_LEADS = ("answer is:", "is:", "answer:")
_CHOICE_LEADS = ("answer is:", "answer:", "answer is", "option is")


def word_found(expected: str, output: str) -> float:
    """Return 1.0 when the value is one of the words of the output (kv_retrieval)."""
    return float(expected in _PUNCTUATION.sub(" ", output).split())


def name_found(expected: str, output: str) -> float:
    """Return 1.0 when the name, in capitals, is one of the words of the output (longdialogue_qa_eng)."""
    return float(expected.upper() in _PUNCTUATION.sub(" ", output).upper().split())


def last_number(expected: str, output: str) -> float:
    """Return 1.0 when the last word of the output is the expected number (code_run)."""
    words = _CODE_NOISE.sub(" ", output).split()
    return float(bool(words) and words[-1] == expected.strip())


def first_decimal(expected: str, output: str) -> float:
    """Return 1.0 when the first number of the output equals the expected one (math_find)."""
    found = _NUMBER.search(output)
    return float(found is not None and float(found.group()) == float(expected))


def leading_numbers(expected: Sequence[str], output: str) -> float:
    """Return the share of the expected numbers that the output begins with, in their order (math_calc)."""
    given = [int(number) for number in re.findall(r"-?\d+", output)]
    right = 0
    for wanted, number in zip(expected, given):
        if int(wanted) != number:
            break
        right += 1
    return right / len(expected)


def function_chosen(expected: Sequence[str], output: str) -> float:
    """Return 1.0 when the output names the function or its letter (code_debug): `expected` holds both.

    "B." and "B:" at the start count, and what follows "answer is:", "is:" or "answer:".
    """
    name, letter = expected
    if output.strip() in (name, letter) or output[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = " ".join(_DEBUG_NOISE.sub(" ", output).split())
    for lead in _DEBUG_LEADS:
        if lead in text:
            after = text.partition(lead)[2].strip()
            return float(after.startswith((letter, name)))
    return 0.0


def letter_chosen(expected: Sequence[str], output: str) -> float:
    """Return 1.0 when the output chooses the right option (longbook_choice_eng): `expected` = text, letter.

    A letter at its start counts, else what follows "answer is" and the like, else the first A, B, C or D.
    """
    output = output.strip()
    if not output:
        return 0.0
    if output in expected:
        return 1.0
    if output[0] in "ABCD":
        return float(output[0] in expected)
    text = " ".join(_CHOICE_NOISE.sub(" ", output).split())
    for lead in _CHOICE_LEADS:
        if lead in text:
            after = text.partition(lead)[2].strip()
            return float(after.startswith(tuple(expected)))
    letters = [word for word in text.split() if word in ("A", "B", "C", "D")]
    return float(bool(letters) and letters[0] in expected)


def character_f1(expected: str, output: str) -> float:
    """Return the F1 of the characters that both texts hold, without punctuation (longbook_qa_chn)."""
    left, right = (without_chinese_punctuation(text) for text in (expected, output))
    return f_measure((Counter(left) & Counter(right)).total(), len(left), len(right))
