"""The metrics of LongBench (Bai et al., arXiv 2308.14508), as its published code defines them.

    qa_f1("the Eiffel Tower", "Eiffel tower, Paris")        0.8    articles, case and punctuation do not count
    retrieval("Paragraph 3", "It is paragraph 3, not 5.")   0.5    one of two numbers is right
    code_similarity("return x", "\\n# so\\nreturn y\\n")       0.88   the first line that is no comment

Each is a pure function of expected and given text, 0..1. Two corrections: a perfect answer scores 1 where the
published code gives 0.999999995 (rouge) or takes away only every second class name that is part of the right
one (classification).

How alike two lines of code are depends on what is installed there: `fuzz.ratio` of the package fuzzywuzzy counts edits
where python-Levenshtein is, and takes difflib's blocks where it is not, which gives some tenths less. `similarity`
is the first, `similarity_difflib` the second.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from rapidfuzz.distance import Indel

from longspan.core.optional import require
from longspan.eval.metrics import common_places, f_measure

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE_PUNCTUATION = str.maketrans(
    "",
    "",
    string.punctuation
    # Full-width forms of ASCII punctuation, CJK marks, half-width forms, dashes, quotes, ellipses.
    + "".join(map(chr, (*range(0xFF01, 0xFF0E), 0xFF0F, *range(0xFF1A, 0xFF21), *range(0xFF3B, 0xFF41))))
    + "".join(map(chr, (*range(0xFF5B, 0xFF65), *range(0x3001, 0x3004), *range(0x300B, 0x3012))))
    + "".join(map(chr, (*range(0x3014, 0x3020), 0x3030, 0x303E, 0x303F, 0x2013, 0x2014, 0x2018, 0x2019)))
    + "".join(map(chr, (0x201B, 0x201C, 0x201D, 0x201E, 0x201F, 0x2026, 0x2027, 0xFE4F))),
)


def first_line(output: str) -> str:
    """Return the first line that is not empty; what LongBench keeps of an output of few-shot tasks."""
    return output.lstrip("\n").split("\n")[0]


def qa_f1(expected: str, output: str) -> float:
    """Return the F1 of the words that both texts hold, without case, punctuation and articles."""
    return bag_f1(english_words(expected), english_words(output))


def qa_f1_zh(expected: str, output: str) -> float:
    """Return the F1 of the Chinese words that both texts hold, without punctuation.

    Raises:
        MissingDependencyError: jieba, which finds the words, is not installed.
    """
    return bag_f1(chinese_words(expected), chinese_words(output))


def rouge_l_summary(expected: str, output: str) -> float:
    """Return ROUGE-L of summaries as the package `rouge` computes it, on which LongBench relies.

    Texts are cut into sentences at ".", words at white space. Common are the different words in the union of
    the longest common subsequences of every pair of sentences; the F-measure counts different words. Cost:
    expected x output words.
    """
    left, right = _sentences(expected), _sentences(output)
    common: set[str] = set()
    for sentence in left:
        for other in right:
            # As the package does: of several subsequences the one that leaves words of `other` out first.
            common.update(other[place] for place in common_places(other, sentence))
    expected_words = {word for sentence in left for word in sentence}
    given_words = {word for sentence in right for word in sentence}
    return f_measure(len(common), len(expected_words), len(given_words))


def rouge_l_summary_zh(expected: str, output: str) -> float:
    """Return `rouge_l_summary` of Chinese texts cut into words.

    Raises:
        MissingDependencyError: jieba, which finds the words, is not installed.
    """
    left, right = (" ".join(cut_chinese(text)) for text in (expected, output))
    return rouge_l_summary(left, right)


def classification(expected: str, output: str, classes: Sequence[str]) -> float:
    """Return 1 / (class names in the output) when the right one is among them, else 0.0.

    A name that is part of the right one ("event" of "sports event") is not counted.
    """
    named = [name for name in classes if name in output]
    named = [name for name in named if name == expected or name not in expected]
    return 1.0 / len(named) if expected in named else 0.0


def classification_closest(expected: str, output: str, classes: Sequence[str]) -> float:
    """Return `classification`; of an output that names no class, 1.0 when the right one is most like it.

    As LongBench's first release has it, and `long-llm` still: likeness is difflib's ratio, the first of equals counts.
    """
    if any(name in output for name in classes):
        return classification(expected, output, classes)
    alike = [SequenceMatcher(None, name, output).ratio() for name in classes]
    best = max(alike, default=0.0)
    return float(best > 0 and classes[alike.index(best)] == expected)


def retrieval(expected: str, output: str) -> float:
    """Return the share of the numbers in the output that are the one of `Paragraph 17` (in Chinese too)."""
    found = re.search("(?:Paragraph |\u6bb5\u843d)(\\d+)", expected)
    return count(found.group(1) if found else expected, output)


def count(expected: str, output: str) -> float:
    """Return the share of the numbers in the output that are the expected one."""
    numbers = re.findall(r"\d+", output)
    return numbers.count(expected.strip()) / len(numbers) if numbers else 0.0


def code_similarity(expected: str, output: str, *, alike: Callable[[str, str], float] | None = None) -> float:
    """Return how `alike` (None: `similarity`) the expected line and the first line of the output are, in hundredths.

    Lines with a back-tick, `#` or `//` are passed over, and so are empty ones at the start; one after a comment
    is the line that counts.
    """
    lines = output.lstrip("\n").split("\n")
    first = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return (alike or similarity)(expected, first)


def similarity(expected: str, output: str) -> float:
    """Return 1 - edits / characters of both in hundredths; edits put in or take out one; 0.0 if one is empty.

    That is `fuzz.ratio` of the package fuzzywuzzy beside python-Levenshtein.
    """
    if not expected or not output:
        return float(expected == output)
    return round(100 * Indel.normalized_similarity(output, expected)) / 100


def similarity_difflib(expected: str, output: str) -> float:
    """Return difflib's ratio in hundredths, `fuzz.ratio` of fuzzywuzzy by itself; 0.0 if one is empty."""
    if not expected or not output:
        return float(expected == output)
    return round(100 * SequenceMatcher(None, output, expected).ratio()) / 100


def english_words(text: str) -> list[str]:
    """Return the words of a text, without case, punctuation and articles."""
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def cut_chinese(text: str) -> list[str]:
    """Return a text cut into words, nothing left out. Raises MissingDependencyError: jieba is not installed."""
    jieba = require("jieba", extra="chinese", feature="scoring of Chinese text")
    jieba.setLogLevel("WARNING")  # else it reports on stderr that it reads its dictionary
    return list(jieba.cut(text, cut_all=False))


def chinese_words(text: str) -> list[str]:
    """Return the words of a Chinese text without punctuation. Raises as `cut_chinese`."""
    return [word for word in map(without_chinese_punctuation, cut_chinese(text)) if word]


def without_chinese_punctuation(text: str) -> str:
    """Return a text in lower case without white space and punctuation, Chinese and other."""
    return "".join(text.lower().translate(_CHINESE_PUNCTUATION).split())


def bag_f1(expected: Sequence[str], given: Sequence[str]) -> float:
    """Return the F-measure of the words that both texts hold, each as often as in both."""
    common = Counter(expected) & Counter(given)
    return f_measure(common.total(), len(expected), len(given))


def _sentences(text: str) -> list[list[str]]:
    # As the package splits: white space of any kind first, and a sentence of nothing but spaces is one word "".
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def choice_stated(expected: str, output: str) -> float:
    """Return 1.0 where LongBench v2 reads the expected letter behind "The correct answer is", bracketed ones first."""
    said = output.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", said) or re.search(
        r"The correct answer is ([A-D])", said
    )
    return float(found is not None and found.group(1) == expected)
