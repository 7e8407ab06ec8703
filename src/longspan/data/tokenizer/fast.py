"""gigatoken, for the tokenizers that it gives the ids of the Hugging Face library for.

gigatoken passes over what it does not know of a tokenizer.json: a `Digits` step before a known expression, how
a `Split` behaves, `single_word` of an added token. So a tokenizer is offered to it only if all of its steps are
on a list, each with the same meaning on both sides, and is then still compared on awkward text.

What gigatoken does not do is made from what it does. *Marks* are ids behind the vocabulary that no
token has:

- `Digits` splits every digit off, of any script, before the other steps. Added tokens do the same: each digit
  becomes one, with its own id or, where it is several tokens, a mark that is replaced by them.
- A byte that the vocabulary lacks becomes a mark. The Hugging Face library drops such a byte, and its neighbours
  may then join, so a piece of text with a mark of this kind is encoded by that library.
- So is a piece with a character so young that the two treat it differently (see `young`).
- Special tokens are text to longspan, so gigatoken does not hear of them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import orjson
import tokenizers
from numpy.typing import NDArray

from longspan.data.tokenizer.safe_cuts import SPACE, added_token, alternatives, steps_of
from longspan.data.tokenizer.tiktoken import byte_letters
from longspan.data.tokenizer.young import Watch

FAST_ENGINE_BYTES = 1 << 28

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SMALL, _CAPITAL = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"

# The expressions that gigatoken knows, spelled as it knows them.
KNOWN: frozenset[str] = frozenset([
    _WORDS + r"\p{N}" + _SIGNS + _SPACES,
    _WORDS + r"\p{N}{1,3}" + _SIGNS + _SPACES,
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    + _SPACES,
    f"{_SMALL}{_CONTRACTIONS}?|{_CAPITAL}{_CONTRACTIONS}?" + r"|\p{N}{1,3}" + _PATHS + _SPACES,
    f"{_SMALL}|{_CAPITAL}" + r"|\p{N}" + _PATHS + _SPACES,
])  # fmt: skip

# Three steps, one after another; the line ends in the third are characters, not escapes.
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

# Other spellings of the same alternatives. What follows a possessive `+` can never match what it keeps; `\s*`
# reaches the last line end by itself. (`{1,3}+` is not possessive to the library: it means whole runs of digits.)
_SAME: dict[str, str] = {
    "'(?i:[sdmt]|ll|ve|re)": _CONTRACTIONS,
    "'(?:[sdmt]|ll|ve|re)": "'s|'t|'re|'ve|'m|'ll|'d",
    r"[^\r\n\p{L}\p{N}]?+\p{L}+": r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}++": r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*": r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+": r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]": r"\s*[\r\n]+",
}


class NotFastError(Exception):
    """Why gigatoken is not taken for a tokenizer."""


class Recipe(NamedTuple):
    """What gigatoken is given, and what its marks stand for."""

    content: bytes
    """A tokenizer.json."""
    first_mark: int
    parts: tuple[tuple[int, ...] | None, ...]
    """For each mark the ids it stands for; None: the text is for the Hugging Face library."""
    watch: Watch | None
    """Finds characters that make a text one for the Hugging Face library."""


class FastEngine:
    """gigatoken, made anew every 268 MB of text.

    It remembers every word it has met: text without a repeated word costs 6 bytes of memory a byte, and
    would fill any machine in time. Making it anew takes 0.1 s for 32 thousand ids.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._start()

    def __call__(self, text: bytes) -> NDArray[np.uint32] | None:
        """Return the ids of a text in UTF-8; None: it holds what only the Hugging Face library can encode."""
        if self._recipe.watch is not None and self._recipe.watch(text):
            return None
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            self._start()
        ids: NDArray[np.uint32] = self._encode(text)
        return self._replaced(ids) if self._recipe.parts and len(ids) else ids

    def _start(self) -> None:
        import gigatoken

        self._encode = gigatoken.Tokenizer.from_json(self._recipe.content).encode
        self._bytes_left = FAST_ENGINE_BYTES

    def _replaced(self, ids: NDArray[np.uint32]) -> NDArray[np.uint32] | None:
        """Return ids with the ids that marks stand for in the place of marks."""
        first, parts = self._recipe.first_mark, self._recipe.parts
        places = np.flatnonzero(ids >= first)
        if not len(places):
            return ids
        found, which = np.unique(ids[places], return_inverse=True)
        wanted = [parts[mark - first] for mark in found.tolist()]
        if None in wanted:
            return None
        sizes = np.ones(len(ids), np.int64)
        sizes[places] = np.array([len(part or ()) for part in wanted])[which]
        starts = np.cumsum(sizes) - sizes
        out = np.empty(int(sizes.sum()), np.uint32)
        out[starts[ids < first]] = ids[ids < first]
        for number, part in enumerate(wanted):
            at = starts[places[which == number]]
            for step, id_ in enumerate(part or ()):
                out[at + step] = id_
        return out


def make_recipe(
    content: Mapping[str, Any], *, first_mark: int, reference: Callable[[], tokenizers.Tokenizer]
) -> Recipe:
    """Return what to give gigatoken for a tokenizer.json.

    Args:
        first_mark: an id above all others.
        reference: returns the Hugging Face library's tokenizer; called if digits are split off.

    Raises:
        NotFastError: a part of it is not known to mean the same to both.
    """
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise NotFastError(f"it is a {model['type']} model")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise NotFastError(f"the model has a {name}")
    added = plain_tokens(content)
    plain = {**content, "truncation": None, "padding": None, "post_processor": None, "added_tokens": added}
    if model.get("byte_fallback"):
        _check_fallback(content)
        return Recipe(orjson.dumps(plain), first_mark, (), None)
    digits, plain["pre_tokenizer"] = _byte_level_steps(content)
    parts: list[tuple[int, ...] | None] = []
    missing: dict[str, int] = {}
    for letter in byte_letters():
        if letter not in model["vocab"]:
            missing[letter] = first_mark + len(parts)
            parts.append(None)
    plain["model"] = {**model, "vocab": {**model["vocab"], **missing}} if missing else model
    taken = {token["content"] for token in added}
    for digit in numerics() if digits else "":
        if digit in taken:
            continue
        ids = tuple(reference().encode(digit, add_special_tokens=False).ids)
        if len(ids) != 1:
            parts.append(ids)
        number = ids[0] if len(ids) == 1 else first_mark + len(parts) - 1
        added.append(added_token(number, digit, special=False))
    watch = Watch(normalizes=bool(content.get("normalizer")))
    return Recipe(orjson.dumps(plain), first_mark, tuple(parts), watch)


@cache
def numerics() -> str:
    """Return the characters that `Digits` splits off, as the library itself finds them: 1,929 of Unicode 16."""
    # Those that Python does not know yet may be digits to the library; no digit stands beyond these planes.
    kinds = ((chr(code), unicodedata.category(chr(code))) for code in range(0x20000))
    text = "a".join(letter for letter, kind in kinds if kind[0] == "N" or kind == "Cn")
    split = tokenizers.pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(text)
    return "".join(part for part, _ in split if len(part) == 1 and part != "a")


def _byte_level_steps(content: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Return whether digits are split off first, and the other pre-tokenizers as gigatoken knows them."""
    for step in steps_of(content.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise NotFastError(f"its texts are normalized with {step['type']}")
    steps = steps_of(content.get("pre_tokenizer"), "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise NotFastError("its texts are not split into bytes at the end")
    digits = steps[0]["type"] == "Digits"
    if digits and not steps[0].get("individual_digits"):
        raise NotFastError("it splits off runs of digits")
    *splits, level = steps[digits:]
    if level.get("add_prefix_space", True) and (digits or splits):
        raise NotFastError("it puts a space before every part of a text")
    if level.get("use_regex", True) == bool(splits):
        raise NotFastError("it splits texts twice" if splits else "it does not split texts into words")
    if not splits:
        return digits, level
    expressions = [_expression(step) for step in splits]
    if expressions == [_GPT2]:
        return digits, {**level, "use_regex": True}
    if tuple(expressions) != _DEEPSEEK and not (len(expressions) == 1 and expressions[0] in KNOWN):
        raise NotFastError(f"it splits texts with {' and then '.join(expressions)}")
    made = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in expressions
    ]
    return digits, {"type": "Sequence", "pretokenizers": [*made, level]}


def _expression(step: Mapping[str, Any]) -> str:
    """Return the expression of a step that keeps all of the text, as gigatoken spells it."""
    if step["type"] != "Split":
        raise NotFastError(f"it splits texts with {step['type']}")
    found = step["pattern"].get("Regex")
    if found is None:
        raise NotFastError(f"it splits texts at {step['pattern'].get('String')!r}")
    spelled = "|".join(_SAME.get(part, part) for part in alternatives(found))
    # What matches is kept and what lies between is removed: all is kept, by expressions that match everything.
    keeps = (step["behavior"], bool(step.get("invert")))
    if keeps != ("Isolated", False) and (keeps != ("Removed", True) or spelled not in KNOWN | {_GPT2}):
        raise NotFastError(f"what it splits off is {step['behavior']}")
    return found if found in _DEEPSEEK else spelled


def _check_fallback(content: Mapping[str, Any]) -> None:
    """Check a model of characters, where bytes stand in for those that the vocabulary lacks."""
    model = content["model"]
    if model.get("ignore_merges"):
        raise NotFastError("it looks up whole words before it merges")
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
    if any(byte > 0x7F or chr(byte) not in model["vocab"] for byte in missing):
        raise NotFastError("its vocabulary has neither a character nor its bytes")
    kinds = ("Prepend", "Replace", "Strip", "Precompiled")
    for step in steps_of(content.get("normalizer"), "normalizers"):
        if step["type"] not in kinds:
            raise NotFastError(f"its texts are normalized with {step['type']}")
    steps = steps_of(content.get("pre_tokenizer"), "pretokenizers")
    gemma = {"pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    for step in steps:
        metaspace = step["type"] == "Metaspace" and step.get("replacement", SPACE) == SPACE
        splits = step["type"] == "Split" and not step.get("invert") and gemma.items() <= step.items()
        if len(steps) > 1 or not (metaspace or splits):
            raise NotFastError(f"it splits texts with {step['type']}")


def check_merges(model: Mapping[str, Any]) -> None:
    """Check that no merge makes or takes what spells a byte, `<0x0A>`: gigatoken takes such text for the byte.

    Raises:
        NotFastError: one does.
    """
    spelled = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    for pair in model.get("merges") or [] if spelled else ():
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        if left in spelled or right in spelled or left + right in spelled:
            raise NotFastError(f"it merges {left!r} and {right!r}")


def plain_tokens(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the added tokens that are matched in texts.

    The library looks for all added tokens, special ones too, first for those that are not normalized; one that
    it finds keeps others from being found in the same place. So none may overlap with one of another kind.
    """
    kinds: dict[str, list[str]] = {"special": [], "plain": [], "normalized": []}
    plain = []
    for token in content.get("added_tokens") or []:
        if token.get("special"):
            kinds["special"].append(token["content"])
            continue
        kinds["normalized" if token.get("normalized") else "plain"].append(token["content"])
        if token.get("single_word"):
            raise NotFastError(f"the added token {token['content']!r} is matched as a whole word")
        plain.append(dict(token))
    if kinds["normalized"] and content.get("normalizer"):
        raise NotFastError(f"the added token {kinds['normalized'][0]!r} is matched in normalized text")
    for one, other in (("special", "plain"), ("special", "normalized"), ("plain", "normalized")):
        if (pair := overlap(kinds[one], kinds[other])) is not None:
            raise NotFastError(f"the added tokens {pair[0]!r} and {pair[1]!r} may overlap")
    return plain


def overlap(some: Sequence[str], others: Sequence[str]) -> tuple[str, str] | None:
    """Return one of each whose places in a text may overlap: "<a>" and ">b", or one that is in the other."""
    heads = {text[:size]: text for text in others for size in range(1, len(text) + 1)}
    tails = {text[-size:]: text for text in others for size in range(1, len(text) + 1)}
    joined = "\n\0\n".join(others)
    for text in some if others else ():
        for cut in range(len(text)):
            found = heads.get(text[cut:]) or tails.get(text[: cut + 1])
            if found is not None:
                return text, found
        inside = text in joined
        found = next((other for other in others if other in text or (inside and text in other)), None)
        if found is not None:
            return text, found
    return None
