"""LV-Eval's metrics: an answer that holds too few of a question's key words scores 0, whatever else it holds.

Two corrections: a perfect summary scores 1 where the package `rouge` gives 0.999999995, and key words that are nothing
but punctuation are none, where the published code divides by zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from longspan.eval.metrics_longbench import (
    bag_f1,
    chinese_words,
    cut_chinese,
    english_words,
    rouge_l_summary,
    without_chinese_punctuation,
)
from longspan.eval.word_lists import word_list

_LEAST_RECALL = 0.2
_LEAST_RECALL_ZH = 0.4


def f1(expected: str, output: str, keywords: str | None) -> float:
    """Return the F1 of English words; 0.0 below a fifth of the key words, if there are such."""
    given = english_words(output)
    if keywords and _recall(english_words(keywords), given, word_list("lveval_words_en")) < _LEAST_RECALL:
        return 0.0
    return bag_f1(english_words(expected), given)


def f1_zh(expected: str, output: str, keywords: str | None) -> float:
    """Return the F1 of Chinese words; 0.0 below two fifths of the key words, or of the expected ones.

    Raises:
        MissingDependencyError: jieba, which finds the words, is not installed.
    """
    given = chinese_words(output)
    if _recall(chinese_words(keywords or expected), given, word_list("lveval_words_zh")) < _LEAST_RECALL_ZH:
        return 0.0
    return bag_f1(chinese_words(expected), given)


def rouge_l_zh(expected: str, output: str) -> float:
    """Return ROUGE-L of Chinese words without those of the published list. Raises MissingDependencyError: no jieba."""
    common = set(word_list("lveval_words_zh"))

    def told(text: str) -> str:
        # Cut twice, as published: words are joined by spaces, and cut again.
        words = map(without_chinese_punctuation, cut_chinese(" ".join(cut_chinese(text))))
        return " ".join(word for word in words if word not in common)

    return rouge_l_summary(told(expected), told(output))


def _recall(wanted: Sequence[str], given: Sequence[str], common: Sequence[str]) -> float:
    """Return the share of `wanted` that is given, `common` words counted only among the wanted; 1.0 of none."""
    both = Counter(given) & Counter(wanted)
    return sum(count for word, count in both.items() if word not in common) / len(wanted) if wanted else 1.0
