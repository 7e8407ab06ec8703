"""How much of an expected text is in an output: pure functions of two strings, each 0..1.

`rouge_n` and `rouge_l` give the F-measures of the `rouge-score` package (C.-Y. Lin, "ROUGE", 2004): words are
runs of a-z and 0-9 in lower case, so text in other scripts has none.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

_WORD = re.compile(r"\w+")
_ROUGE_WORD = re.compile(r"[a-z0-9]+")
_CONTROL = re.compile(r"[\x00-\x1f]")


def exact_match(expected: str, output: str) -> float:
    """Return 1.0 when the whole value is right, else 0.0; surrounding white space does not count."""
    return float(output.strip() == expected.strip())


def contains(expected: str, output: str) -> float:
    """Return 1.0 when the value stands in the output, whatever the case of its letters, else 0.0."""
    wanted = expected.strip().casefold()
    return float(wanted in output.casefold()) if wanted else exact_match(expected, output)


def contains_exactly(expected: str, output: str) -> float:
    """Return 1.0 when the value stands in the output as it is written, else 0.0."""
    return float(expected in output)


def last_line_contains(expected: str, output: str) -> float:
    """Return 1.0 when the value stands in the last line of the output as it is written, else 0.0."""
    return float(expected in output.strip().split("\n")[-1])


def ruler_part(expected: str, output: str) -> float:
    """Return whether RULER finds `expected` in an output: in lower case, control characters as new lines."""
    return float(expected.lower() in _CONTROL.sub("\n", output).strip().lower())


def first_number(expected: str, output: str) -> float:
    """Return 1.0 when the first run of digits in the output is the expected one, else 0.0."""
    found = re.search(r"\d+", output)
    return float(found is not None and found.group() == expected.strip())


def call_match(expected: str, output: str) -> float:
    """Return 1.0 when the first JSON object in the output is the expected one, as a value, else 0.0."""
    wanted, found = _first_object(expected), _first_object(output)
    if wanted is None:
        return exact_match(expected, output)
    # As text: 1 and true are equal to Python, and not the same argument.
    return float(json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True))


def _first_object(text: str) -> Any:
    start = text.find("{")
    try:
        return json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else None
    except (ValueError, RecursionError):
        return None


def word_recall(expected: str, output: str) -> float:
    """Return the share of the different words of `expected` that the output holds, in any case and order."""
    wanted = set(_WORD.findall(expected.casefold()))
    if not wanted:
        return exact_match(expected, output)
    return len(wanted & set(_WORD.findall(output.casefold()))) / len(wanted)


def word_recall_spaced(expected: str, output: str, *, repeated: bool = False) -> float:
    """Return the share of what stands between white space in `expected` that the output holds, in any case.

    `repeated`: a word that stands twice is looked for once and divided by twice, so a perfect answer may have less
    than 1, as in the plots of Fu et al. 2024.
    """
    words = expected.lower().split()
    if not words:
        return exact_match(expected, output)
    return len(set(words) & set(output.lower().split())) / len(words if repeated else set(words))


def mrcr_ratio(expected: str, output: str, prefix: str) -> float:
    """Return difflib's ratio of what follows the prefix in both texts; 0.0 where the output does not begin with it."""
    if not output.startswith(prefix):
        return 0.0
    one, two = output.removeprefix(prefix), expected.removeprefix(prefix)
    return SequenceMatcher(None, one, two).ratio()


def graphwalks_f1(expected: Sequence[str], output: str) -> float:
    """Return the F1 of two sets of nodes, of the expected ones and of the list in the last line of the output.

    As the code on the data set's card, with two slips mended that would have a wrong answer score 1 and a right one
    less: the first node is read without the words before the list, and sets that share nothing score 0.
    """
    found = re.search(r"Final Answer: ?\[(.*)\]", output.split("\n")[-1])
    if found is None:
        return 0.0
    given = {node for each in found[1].split(",") if (node := each.strip(" \t[]"))}
    wanted = {node for node in expected if node}
    if not given and not wanted:
        return 1.0
    return f_measure(len(given & wanted), len(wanted), len(given))


def rouge_n(expected: str, output: str, *, n: int = 1, stemmed: bool = False) -> float:
    """Return the F-measure of n-grams that both texts hold, each as often as in both."""
    left, right = (_ngrams(rouge_words(text, stemmed=stemmed), n) for text in (expected, output))
    common = sum((left & right).values())
    return f_measure(common, left.total(), right.total())


def rouge_l(expected: str, output: str, *, stemmed: bool = False) -> float:
    """Return the F-measure of the longest common subsequence of words. Cost: expected x output words."""
    left, right = (rouge_words(text, stemmed=stemmed) for text in (expected, output))
    table = common_lengths(left, right)
    return f_measure(table[-1][-1], len(left), len(right))


def rouge_l_sum(expected: str, output: str, *, stemmed: bool = False) -> float:
    """Return the F-measure of words common to the lines of two texts, as rouge-score's rougeLsum.

    A line of `expected` has in common what lies on its longest common subsequence with any line of `output`; a word
    counts as often as both texts hold it. Cost: expected x output words.
    """
    lines = [
        [words for line in text.split("\n") if (words := rouge_words(line, stemmed=stemmed))]
        for text in (expected, output)
    ]
    left, right = (Counter(word for line in each for word in line) for each in lines)
    common: Counter[str] = Counter()
    for line in lines[0]:
        places = set().union(*(common_places(line, other) for other in lines[1]))
        common.update(line[place] for place in places)
    return f_measure((common & right).total(), left.total(), right.total())


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer  # a second to import

    return PorterStemmer()


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Return the stem of a word in lower case, as published ROUGE scores have it: retriev of retrieved."""
    return str(_stemmer().stem(word, to_lowercase=False))


def rouge_words(text: str, *, stemmed: bool) -> list[str]:
    """Return the words that ROUGE counts; `stemmed` cuts the endings of those longer than three letters."""
    words = _ROUGE_WORD.findall(text.lower())
    return [stem(word) if len(word) > 3 else word for word in words] if stemmed else words


def common_lengths(left: Sequence[Hashable], right: Sequence[Hashable]) -> list[list[int]]:
    """Return the length of the longest common subsequence of every head of `left` and head of `right`."""
    table = [[0] * (len(right) + 1)]
    for item in left:
        above, row, last = table[-1], [0], 0
        for column, other in enumerate(right):
            if item == other:
                last = above[column] + 1
            elif above[column + 1] > last:
                last = above[column + 1]
            row.append(last)
        table.append(row)
    return table


def common_places(line: Sequence[Hashable], other: Sequence[Hashable]) -> set[int]:
    """Return where in `line` the words of its longest common subsequence with `other` stand, the last of several."""
    table = common_lengths(line, other)
    row, column, places = len(line), len(other), set()
    while row and column:
        if line[row - 1] == other[column - 1]:
            row, column = row - 1, column - 1
            places.add(row)
        elif table[row][column - 1] > table[row - 1][column]:
            column -= 1
        else:
            row -= 1
    return places


def f_measure(common: int, expected: int, given: int) -> float:
    """Return the harmonic mean of common / given and common / expected; 0.0 when nothing is common."""
    return 2 * common / (expected + given) if common else 0.0


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
