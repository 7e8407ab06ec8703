r"""Where a long text may be cut so that the ids of the pieces, joined, are the ids of the whole.

A pre-tokenizer splits a text with regular expressions; the model then works on each part alone. A cut between
a letter and what ends a word, `wor|d` no, `word| next` yes, changes nothing if

1. no expression can match a letter followed by white space or a CJK full stop or comma, so that a part always
   ends there, and
2. no expression looks behind, so that the rest of the text is split as if it stood alone, and
3. normalization does not cross the cut (none, or NFC: neither side composes with the other).

Expressions are judged by their alternatives, of which a list is known to be sound; a tokenizer with any other
is encoded whole. A byte-pair model without a pre-tokenizer (Llama 2) may be cut before a single space between
two ASCII letters if no entry of its vocabulary holds a space after something else: then no merge crosses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

SPACE = "\u2581"

# Alternatives that match no letter followed by white space, and look behind nothing.
SOUND: frozenset[str] = frozenset(
    [
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        "(?i:[sdmt]|ll|ve|re)",
        "'(?i:[sdmt]|ll|ve|re)",
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
        *(r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r"\p{N}{1,2}", r"\p{N}{1,3}+", r"\d", r"\d+"),
        *(r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\p{L}+", r"\s?\p{L}+", r"\s?\p{N}+"),
        *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}++"),
        *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*"),
        *(r" ?[^\s\p{L}\p{N}]++[\r\n]*+", r"\s?[^\s\p{L}\p{N}]++[\r\n]*", r"\s?[^\s\p{L}\p{N}]+"),
        *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+", r"\s", r"\s++$", r"\s+$"),
        *(r"[\r\n]+", r"[\r\n]", r"\n", r"[^\s\p{L}\p{N}]+"),
        # o200k: letters by case, marks count as letters, a contraction may follow
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        # Letters and marks together, and runs of one script
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[\u4e00-\u9fff\u3040-\u309f\u30a0-\u30ff]+",
    ]
)

# Letters that no mark after them can follow up across the cut: the character after it ends a word.
_AFTER_WORD = re.compile(
    "(?<=[A-Za-z\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])(?=[ \t\n\r\u3001\u3002\uff0c])"
)
_BEFORE_WORD = re.compile("(?<=[A-Za-z])(?= [A-Za-z])")


class CutRule(NamedTuple):
    """How texts of one tokenizer are cut."""

    places: re.Pattern[str]
    """Matches, without width, where a cut is sound."""
    drop_space: bool = False
    """The tokenizer puts a space before every text: a piece gives up the one that it begins with."""

    def pieces(self, text: str, characters: int) -> Iterator[tuple[int, str]]:
        """Yield (where it begins in the text, piece) of at least `characters` each, cut at sound places."""
        start = 0
        while len(text) - start > characters:
            place = self.places.search(text, start + characters)
            if place is None:
                break
            yield self._piece(text, start, place.start())
            start = place.start()
        yield self._piece(text, start, len(text))

    def _piece(self, text: str, start: int, stop: int) -> tuple[int, str]:
        if start and self.drop_space:
            start += 1
        return start, text[start:stop]


def cut_rule(content: Mapping[str, Any]) -> CutRule | None:
    """Return the rule for a tokenizer.json, or None where no cut is known to be sound."""
    model = content["model"]
    if model.get("dropout") or not _added_tokens_allow_cuts(content):
        return None
    steps = steps_of(content.get("pre_tokenizer"), "pretokenizers")
    normalizers = steps_of(content.get("normalizer"), "normalizers")
    if steps and all(map(_splits_after_words, steps)) and any(map(_splits, steps)):
        sound = all(step["type"] == "NFC" for step in normalizers)
        return CutRule(_AFTER_WORD) if sound else None
    return _rule_before_words(model, steps, normalizers)


def _rule_before_words(
    model: Mapping[str, Any], steps: list[dict[str, Any]], normalizers: list[dict[str, Any]]
) -> CutRule | None:
    """Return the rule of SentencePiece-style tokenizers, which write a space as a character of a word."""
    kinds = [step["type"] for step in (*normalizers, *steps)]
    prepends = any(step == {"type": "Prepend", "prepend": SPACE} for step in normalizers)
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE} in normalizers
    if model.get("type") == "BPE" and not model.get("ignore_merges") and not model.get("end_of_word_suffix"):
        if kinds[-1:] == ["Split"] and steps[0]["pattern"] == {"String": " "}:
            kinds = kinds[:-1]  # Gemma: splits at spaces, of which the normalizer has left none
        if kinds in (["Prepend", "Replace"], ["Replace"]) and replaces and prepends == ("Prepend" in kinds):
            # A merge makes an entry of the vocabulary, so where none holds such a pair, none crosses.
            whole = any(re.search(f"[^{SPACE}]{SPACE}", piece) for piece in model["vocab"])
            return None if whole else CutRule(_BEFORE_WORD, drop_space=prepends)
    if kinds == ["Metaspace"] and steps[0].get("split", True) and steps[0].get("replacement") == SPACE:
        return CutRule(_BEFORE_WORD)
    return None


def steps_of(step: Any, name: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer: none, one, or those of a sequence."""
    if step is None:
        return []
    return list(step[name]) if step["type"] == "Sequence" else [step]


def added_token(number: int, text: str, *, special: bool) -> dict[str, Any]:
    """Return an added token of a tokenizer.json that is matched as it is written."""
    fields = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **fields, "special": special}


def _splits(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Split" or (step["type"] == "ByteLevel" and step.get("use_regex", True))


def _splits_after_words(step: Mapping[str, Any]) -> bool:
    """Whether no cut after a word changes what this step does; ByteLevel's own expression is GPT-2's."""
    if step["type"] == "ByteLevel":
        return not step.get("add_prefix_space", True)
    if step["type"] == "Digits":
        return True
    if step["type"] != "Split" or step["behavior"] not in ("Isolated", "Removed"):
        return False
    if step["behavior"] == "Removed" and not step.get("invert"):
        return False
    pattern = step["pattern"].get("Regex")
    return pattern is not None and all(part in SOUND for part in alternatives(pattern))


def alternatives(pattern: str) -> list[str]:
    """Split an expression at the `|` outside of brackets: "a|(?:b|c)" is "a" and "(?:b|c)"."""
    if pattern.startswith("(") and pattern.endswith(")") and "?" not in pattern[:2]:
        pattern = pattern[1:-1]
    parts, depth, in_class, start, index = [], 0, False, 0, 0
    while index < len(pattern):
        character = pattern[index]
        if character == "\\":
            index += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and depth == 0:
            parts.append(pattern[start:index])
            start = index + 1
        index += 1
    return [*parts, pattern[start:]]


def _added_tokens_allow_cuts(content: Mapping[str, Any]) -> bool:
    """Whether no added token that is matched in texts stretches over a cut or looks beyond its ends."""
    for token in content.get("added_tokens") or []:
        if token.get("special"):
            continue
        looks = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        if looks or _AFTER_WORD.search(token["content"]) or SPACE in token["content"]:
            return False
    return True
