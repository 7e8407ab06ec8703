"""Which questions are worth training on: supported by the text, not known without it, not asked before.

Texts are compared as words: lower case, without punctuation, accents kept. Words that are in every text (the
profile of English in `language`, and of the set's own language) are left out where meaning is compared.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from itertools import pairwise

from longspan.data.texts.sentences import sentence_borders
from longspan.synth.language import PROFILES
from longspan.synth.sections import Span

DUPLICATE_JACCARD = 0.8
"""Two questions are nearly the same if their sets of content words agree this much (Jaccard)."""
LEAK_F1 = 0.6
"""A closed-book answer with this token F1 against the expected one counts as known."""
SHORT_ANSWER_WORDS = 4
"""An expected answer of at most so many content words is also known if the closed-book answer contains them all."""

_WORD = re.compile(r"\w+(?:['\u2019]\w+)?")
_UNKNOWN = frozenset({"unknown", "i don't know", "i do not know", "not known"})
_CARRY_MEANING = frozenset({"no", "not", "more", "all", "less"})


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return [word.lower().replace("\u2019", "'") for word in _WORD.findall(text)]


def content_words(text: str, language: str | None = "en") -> list[str]:
    """Return the words that carry meaning; all words where none does."""
    words = words_of(text)
    common = (PROFILES["en"] | PROFILES.get(language or "en", frozenset())) - _CARRY_MEANING
    return [word for word in words if word not in common] or words


def recall(answer: str, evidence: str, language: str | None = "en") -> float:
    """Return the share of the answer's content words that stand in the evidence; 1 where it stands there whole."""
    if " ".join(answer.split()).lower() in " ".join(evidence.split()).lower():
        return 1.0
    wanted = content_words(answer, language)
    known = set(words_of(evidence))
    return sum(word in known for word in wanted) / len(wanted) if wanted else 0.0


def token_f1(found: str, expected: str, language: str | None = "en") -> float:
    """Return the F1 of two texts as bags of content words."""
    one, two = Counter(content_words(found, language)), Counter(content_words(expected, language))
    common = sum((one & two).values())
    return 2 * common / (one.total() + two.total()) if common else 0.0


def knows(reply: str, expected: str, language: str | None = "en") -> bool:
    """Say whether a closed-book reply gives the expected answer away."""
    if reply.strip().strip(".").lower() in _UNKNOWN:
        return False
    wanted = content_words(expected, language)
    if len(wanted) <= SHORT_ANSWER_WORDS and wanted and set(wanted) <= set(words_of(reply)):
        return True
    return token_f1(reply, expected, language) >= LEAK_F1


def find_quote(quote: str, text: str, within: Span) -> Span | None:
    """Return where a text is quoted: as it is, or with other white space, punctuation and case."""
    quote = quote.strip()
    if not quote:
        return None
    at = text.find(quote, within.start, within.end)
    if at >= 0:
        return Span(at, at + len(quote))
    words = _WORD.findall(quote)[:80]
    if not words:
        return None
    pattern = re.compile(r"[\W_]+".join(map(re.escape, words)), re.IGNORECASE)
    match = pattern.search(text, within.start, within.end)
    return Span(*match.span()) if match else None


def find_support(words: list[str], text: str, within: Span) -> Span:
    """Return the sentence that has most of these words, the first of several; all of `within` where none has any."""
    wanted = set(words)
    best, most = within, 0
    for start, end in pairwise(sentence_borders(within.of(text))):
        span = Span(within.start + start, within.start + end)
        score = len(wanted.intersection(words_of(span.of(text))))
        if score > most:
            best, most = span, score
    return best


class NearDuplicates:
    """Finds questions that were nearly asked before; exact, by prefix filtering (Bayardo et al. 2007).

    Two sets with Jaccard >= t share one of their first |x| - ceil(t |x|) + 1 words in any fixed order of all words,
    so only these are looked up: about 2 of 10.
    """

    def __init__(self, threshold: float = DUPLICATE_JACCARD) -> None:
        self._threshold = threshold
        self._sets: list[frozenset[int]] = []
        self._with_word: dict[int, list[int]] = defaultdict(list)

    def add(self, words: list[str]) -> bool:
        """Take a question's content words; return False, and take nothing, if they are nearly those of another."""
        # In the order of a hash, frequent words are no likelier to come first than rare ones.
        members = sorted({_number(word) for word in words})
        own = frozenset(members)
        first = members[: len(members) - math.ceil(self._threshold * len(members)) + 1]
        candidates = {index for word in first for index in self._with_word.get(word, ())}
        if any(self._similar(own, self._sets[index]) for index in candidates):
            return False
        for word in first:
            self._with_word[word].append(len(self._sets))
        self._sets.append(own)
        return True

    def _similar(self, one: frozenset[int], two: frozenset[int]) -> bool:
        common = len(one & two)
        return common >= self._threshold * (len(one) + len(two) - common) and common > 0


def _number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=7).digest(), "little")
