"""Scores of InfiniteBench's tasks, from what its published scoring says; 0..1 for one output.

Kept is what decides a score: which word or number of an output counts. A perfect answer scores 1 everywhere,
which the published code misses for negative numbers (math_calc, math_find), for a bare letter or name and for a
space before it (code_debug), for a name of several words (longdialogue_qa_eng) and for a text with marks that it
takes out of the output alone (longbook_choice_eng). It stops with an error at a decimal number where a whole one
is expected (math_find) and at an empty output.
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
_SIGNED = re.compile(r"-?\d+\.\d+|-?\d+")
_DEBUG_LEADS = ("answer is:", "is:", "answer:")
_CHOICE_LEADS = ("answer is:", "answer:", "answer is", "option is")


def word_found(expected: str, output: str) -> float:
    """Return 1.0 when the value is one of the words of the output (kv_retrieval)."""
    return float(_stands_in(_words(expected), _words(output)))


def name_found(expected: str, output: str) -> float:
    """Return 1.0 when the name stands in the output, in any case of its letters (longdialogue_qa_eng)."""
    return float(_stands_in(_words(expected.upper()), _words(output.upper())))


def _words(text: str) -> list[str]:
    return _PUNCTUATION.sub(" ", text).split()


def _stands_in(wanted: Sequence[str], words: Sequence[str]) -> bool:
    """Return whether the words that are wanted stand in others, side by side; most values are one word."""
    size = len(wanted)
    return size > 0 and any(words[place : place + size] == wanted for place in range(len(words) - size + 1))


def last_number(expected: str, output: str) -> float:
    """Return 1.0 when the last word of the output is the expected number (code_run)."""
    words = _CODE_NOISE.sub(" ", output).split()
    return float(bool(words) and words[-1] == expected.strip())


def first_decimal(expected: str, output: str) -> float:
    """Return 1.0 when the first number of the output equals the expected one (math_find)."""
    wanted = float(expected)
    # As published a minus sign is none of a number, unless a negative one is expected.
    found = (_SIGNED if wanted < 0 else _NUMBER).search(output)
    return float(found is not None and float(found.group()) == wanted)


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
    output = output.strip()
    text = _without(_DEBUG_NOISE, output)
    names = (name, letter, _without(_DEBUG_NOISE, name))
    if output[:2] in (f"{letter}.", f"{letter}:") or {output, text, text.removesuffix(".")} & {*names}:
        return 1.0
    for lead in _DEBUG_LEADS:
        if lead in text:
            # A name may hold what is taken out of the output: an option, a hyphen.
            after = output.partition(lead)[2].lstrip(" \n`'\"*-")
            return float(after.startswith(name) or text.partition(lead)[2].strip().startswith((letter, name)))
    return 0.0


def letter_chosen(expected: Sequence[str], output: str) -> float:
    """Return 1.0 when the output chooses the right option (longbook_choice_eng): `expected` = text, letter.

    The text of the option or a letter at its start counts, else what follows "answer is" and the like, else the
    first A, B, C or D.
    """
    output = output.strip()
    if not output:
        return 0.0
    text = _without(_CHOICE_NOISE, output)
    wanted = tuple(shown for each in expected if (shown := _without(_CHOICE_NOISE, each)))
    if output in expected or text in wanted:
        return 1.0
    if output[0] in "ABCD":
        return float(output[0] in expected)
    for lead in _CHOICE_LEADS:
        if lead in text:
            after = text.partition(lead)[2].strip()
            return float(after.startswith(wanted))
    letters = [word for word in text.split() if word in ("A", "B", "C", "D")]
    return float(bool(letters) and letters[0] in expected)


def _without(noise: re.Pattern[str], text: str) -> str:
    return " ".join(noise.sub(" ", text).split())


def character_f1(expected: str, output: str) -> float:
    """Return the F1 of the characters that both texts hold, without punctuation (longbook_qa_chn)."""
    left, right = (without_chinese_punctuation(text) for text in (expected, output))
    return f_measure((Counter(left) & Counter(right)).total(), len(left), len(right))
