"""Porter's stemmer with the changes that NLTK makes to it, which ROUGE scores are published with.

    stem("retrieved") -> "retriev"      stem("flies") -> "fli"      stem("dies") -> "die"

M. Porter, "An algorithm for suffix stripping" (1980); the steps below have the paper's numbers. A word is read
as a row of consonants and vowels; its measure is how often a consonant follows a vowel (tr-oubl-e: 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

Rule = tuple[str, str]

_IRREGULAR = {
    "skies": "sky",
    "sky": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "news": "news",
    "innings": "inning",
    "inning": "inning",
    "outings": "outing",
    "outing": "outing",
    "cannings": "canning",
    "canning": "canning",
    "howe": "howe",
    "proceed": "proceed",
    "exceed": "exceed",
    "succeed": "succeed",
}
_STEP_3: tuple[Rule, ...] = (
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
)
_STEP_4: tuple[Rule, ...] = tuple(
    (suffix, "")
    for suffix in (
        *("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent"),
        *("ion", "ou", "ism", "ate", "iti", "ous", "ive", "ize"),
    )
)


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Return the stem of a word in lower case."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _final_y, _step_2, _step_3, _step_4, _final_e, _double_l):
        word = step(word)
    return word


def _consonants(word: str) -> list[bool]:
    """Return for each letter whether it is a consonant; y is one at the start and after a vowel."""
    flags: list[bool] = []
    for letter in word:
        flags.append(letter not in "aeiou" and not (letter == "y" and bool(flags) and flags[-1]))
    return flags


def _measure(word: str) -> int:
    flags = _consonants(word)
    return sum(not left and right for left, right in pairwise(flags))


def _ends_short(word: str) -> bool:
    """Whether the word ends consonant, vowel, consonant other than w, x, y; or is vowel, consonant."""
    flags = _consonants(word)
    if len(word) == 2:
        return flags == [False, True]
    return flags[-3:] == [True, False, True] and word[-1] not in "wxy"


def _replace(word: str, rules: Sequence[Rule], allowed: Callable[[str, str], bool]) -> str:
    """Apply the first rule whose suffix the word has, if `allowed(stem, suffix)`."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            kept = word[: len(word) - len(suffix)]
            return kept + replacement if allowed(kept, suffix) else word
    return word


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    rules = (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", ""))
    return _replace(word, rules, lambda kept, suffix: True)


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        kept = word[: len(word) - len(suffix)]
        if word.endswith(suffix) and not all(_consonants(kept)):
            break
    else:
        return word
    if kept.endswith(("at", "bl", "iz")):
        return kept + "e"
    if len(kept) >= 2 and kept[-1] == kept[-2] and _consonants(kept)[-1]:
        return kept if kept[-1] in "lsz" else kept[:-1]
    return kept + "e" if _measure(kept) == 1 and _ends_short(kept) else kept


def _final_y(word: str) -> str:
    kept = word[:-1]
    return kept + "i" if word.endswith("y") and len(kept) > 1 and _consonants(kept)[-1] else word


def _step_2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _step_2(word[:-2])  # normally: normalli, normal
    rules = (
        *(("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize")),
        *(("bli", "ble"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize")),
        *(("ation", "ate"), ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful")),
        *(("ousness", "ous"), ("aliti", "al"), ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful")),
        ("logi", "log"),
    )
    # The l of -logi counts for the measure.
    return _replace(word, rules, lambda kept, suffix: _measure(kept + "l" * (suffix == "logi")) > 0)


def _step_3(word: str) -> str:
    return _replace(word, _STEP_3, lambda kept, suffix: _measure(kept) > 0)


def _step_4(word: str) -> str:
    def allowed(kept: str, suffix: str) -> bool:
        return _measure(kept) > 1 and (suffix != "ion" or kept[-1] in "st")

    return _replace(word, _STEP_4, allowed)


def _final_e(word: str) -> str:
    kept = word[:-1]
    if not word.endswith("e"):
        return word
    measure = _measure(kept)
    return kept if measure > 1 or (measure == 1 and not _ends_short(kept)) else word


def _double_l(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
