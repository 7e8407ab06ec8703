"""Needle in a haystack: a fact planted in unseen text at a given depth, asked back at the end of the context.

    ...haystack...
    The magic number of glacier is 48213.
    ...haystack...
    The magic number of glacier is| 48213        the model has to give what follows the bar

The whole, prompt and answer, has exactly the stated length in tokens, up to the stated tolerance. Facts are
planted into the text at a line or sentence border; text and answer are then tokenised together, and length
and depth are measured on the result and recorded. Each sample has a haystack, a key and a value of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic

from longspan.core.config import Config
from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.seeds import rng
from longspan.core.units import parse_length
from longspan.data.facts import Fact, collect_keys, draw_facts, insert_at_sentence, nearest_border
from longspan.data.tokenizer import Tokenizer
from longspan.eval.documents import HeldOutDocument
from longspan.eval.haystack import Haystack, Window

PROMPT_VERSION = 1
"""Raised whenever the same settings would compose another prompt."""

MIN_HAYSTACK_TOKENS = 16
DEPTH_TOLERANCE = 0.02
DISTRACTOR_GAP = 0.05
_MAX_FITS = 6
_CONTEXT_CHARS = 60


def length_tolerance(length: int) -> int:
    """Return by how many tokens a sample may fall short of its stated length: 8 or 1 %, whichever is more."""
    return max(8, length // 100)


def lengths_from(values: Any) -> Any:
    """Read context lengths as people write them (`4k` = 4096) before validation."""
    if not isinstance(values, list | tuple):
        return values
    try:
        return tuple(parse_length(value) if isinstance(value, str) else value for value in values)
    except ArgumentError as error:
        raise ValueError(str(error)) from None


def refuse_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values. Raises ValueError when there are none or one stands twice."""
    if not values:
        raise ValueError("at least one value is needed")
    if len(set(values)) < len(values):
        raise ValueError("a value stands twice")
    return values


class NeedleTask(Config):
    """Settings of a needle evaluation: every length with every depth is a cell of `samples` samples."""

    lengths: tuple[pydantic.PositiveInt, ...]
    """Context lengths in tokens, prompt and answer together; `4k` is read as 4096."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle stands: 0 is the start of the haystack, 1 its end."""
    samples: pydantic.PositiveInt = 10
    """Samples per cell."""
    num_distractors: pydantic.NonNegativeInt = 0
    """Facts about other keys, with other values, planted at other depths."""
    answer_digits: int = pydantic.Field(default=5, ge=1, le=18)
    """Digits of the value."""
    seed: int = 0
    """Seed of all random choices."""
    key_split: Literal["train", "validation", "test"] = "test"
    """Which share of the words may be keys; only `train` words are keys in training."""
    split: str = "test"
    """Name of the share of the documents that the haystacks are cut from."""

    _read_lengths = pydantic.field_validator("lengths", mode="before")(lengths_from)
    _no_repeats = pydantic.field_validator("lengths", "depths")(refuse_repeats)

    @pydantic.field_validator("depths")
    @classmethod
    def _depths_are_fractions(cls, depths: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.0 <= depth <= 1.0 for depth in depths):
            raise ValueError("a depth lies between 0 (start) and 1 (end of the haystack)")
        return depths

    @pydantic.model_validator(mode="after")
    def _enough_values(self) -> NeedleTask:
        # 9 of 10 numbers do not begin with 0; a tenth of them is plenty to find some that the text lacks.
        if (1 + self.num_distractors) * 10 > 9 * 10 ** (self.answer_digits - 1):
            raise ValueError(
                f"{self.num_distractors} distractors need values of more than {self.answer_digits} digits"
            )
        return self

    def cells(self) -> list[tuple[int, float, int]]:
        """Return (length, depth, sample number) of every sample."""
        return [
            (length, depth, sample)
            for length in self.lengths
            for depth in self.depths
            for sample in range(self.samples)
        ]


class NeedleSample(NamedTuple):
    """One composed prompt with its answer, and what was measured on it."""

    prompt_ids: np.ndarray
    answer_ids: np.ndarray
    """What follows `prompt_ids` when prompt and answer are tokenised together."""
    prompt: str
    question: str
    expected: str
    achieved_length: int
    """Tokens of prompt and answer together."""
    achieved_depth: float
    """Haystack tokens before the needle / haystack tokens before and after it."""
    needle_window: str
    """The needle with the text around it."""


class _Places(NamedTuple):
    depths: list[float]
    """Depth in the bare haystack of the needle and of each distractor."""
    order: list[int]
    """Indices of `depths` in the order of the text."""
    expected: float
    """Depth of the needle among all that surrounds it, were there a border at every token."""


class _Planted(NamedTuple):
    text: str
    start: int
    end: int


class NeedleBuilder:
    """Composes the samples of a task, each a pure function of task, documents, tokenizer and cell.

    Raises:
        ConfigError: a length has no room for the planted facts and the question.
        DataError: the documents hold no key, or fewer tokens than the longest length.
    """

    def __init__(self, task: NeedleTask, documents: Sequence[HeldOutDocument], tokenizer: Tokenizer) -> None:
        self.task = task
        self._tokenizer = tokenizer
        self._haystack = Haystack(documents, tokenizer)
        self._keys = collect_keys((document.text for document in documents), split=task.key_split)
        if len(self._keys) <= task.num_distractors:
            raise DataError(
                f"the documents hold too few words that may be keys ({task.key_split} split)",
                found=len(self._keys),
                allowed=f"more than {task.num_distractors}, one for the needle and one for each distractor",
                fix="give more held-out documents",
            )
        self._check_lengths()

    def build(self, length: int, depth: float, sample: int) -> NeedleSample:
        """Compose one sample.

        Raises:
            DataError: this sample cannot be built as asked; the message says why.
        """
        generator = rng(self.task.seed, "needle", length, depth, sample)
        window = self._haystack.window(generator, length)
        needle, *distractors = self._draw_facts(generator, window)
        other_depths = [_other_depth(generator, depth) for _ in distractors]
        sizes = [len(self._tokenizer.encode(f"{fact.sentence}\n")) for fact in distractors]
        haystack_tokens = length - self._num_planned_tokens([needle, *distractors])
        for _ in range(_MAX_FITS):
            places = _places(depth, other_depths, sizes, haystack_tokens)
            planted = _plant(window, haystack_tokens, [needle, *distractors], places)
            context = planted.text if planted.text.endswith("\n") else f"{planted.text}\n"
            prompt = f"{context}{needle.question}"
            ids = self._tokenizer.encode(f"{prompt} {needle.value}")
            excess = len(ids) - length
            if -length_tolerance(length) < excess <= 0:
                break
            haystack_tokens -= excess
            if haystack_tokens < MIN_HAYSTACK_TOKENS:
                raise DataError(
                    f"no room for a haystack in {length} tokens", found=f"{haystack_tokens} tokens"
                )
        else:
            raise DataError(f"the text could not be cut to {length} tokens", found=f"{len(ids)} tokens")
        before = len(self._tokenizer.encode(context[: planted.start]))
        after = len(self._tokenizer.encode(context[planted.end :].removeprefix("\n")))
        achieved = before / max(1, before + after)
        _check_depth(achieved, places, window=window, haystack_tokens=haystack_tokens)
        prompt_tokens = self._prompt_tokens(prompt, ids)
        around = slice(max(0, planted.start - _CONTEXT_CHARS), planted.end + _CONTEXT_CHARS)
        return NeedleSample(
            prompt_ids=ids[:prompt_tokens],
            answer_ids=ids[prompt_tokens:],
            prompt=prompt,
            question=needle.question,
            expected=needle.value,
            achieved_length=len(ids),
            achieved_depth=achieved,
            needle_window=context[around],
        )

    def _draw_facts(self, generator: np.random.Generator, window: Window) -> list[Fact]:
        """Draw needle and distractors; none of their keys and values occurs in the haystack."""
        words = set(re.findall(r"[a-z]+", window.text.lower()))
        keys = [key for key in self._keys if key not in words]
        count = 1 + self.task.num_distractors
        if len(keys) < count:
            raise DataError(
                "too few keys that do not occur in the haystack", found=len(keys), allowed=f">= {count}"
            )
        for _ in range(100):
            facts = draw_facts(generator, keys, count, digits=self.task.answer_digits)
            if not any(fact.value in window.text for fact in facts):
                return facts
        raise DataError(f"the haystack holds nearly every number of {self.task.answer_digits} digits")

    def _num_planned_tokens(self, facts: Sequence[Fact]) -> int:
        """Return about how many tokens stand beside the haystack: planted facts, question and answer."""
        planted = "".join(f"\n{fact.sentence}\n" for fact in facts)
        asked = f"\n{facts[0].question} {facts[0].value}"
        return len(self._tokenizer.encode(planted)) + len(self._tokenizer.encode(asked))

    def _prompt_tokens(self, prompt: str, ids: np.ndarray) -> int:
        """Return where the answer begins in the ids of prompt and answer; refuse a token that is in both."""
        prompt_ids = self._tokenizer.encode(prompt)
        count = len(prompt_ids)
        if count >= len(ids) or not np.array_equal(ids[:count], prompt_ids):
            raise DataError("this tokenizer joins the end of the question and the answer into one token")
        return count

    def _check_lengths(self) -> None:
        count = 1 + self.task.num_distractors
        longest_keys = sorted(self._keys, key=len)[-count:]
        facts = [Fact(key, "9" * self.task.answer_digits) for key in longest_keys]
        needed = self._num_planned_tokens(facts) + MIN_HAYSTACK_TOKENS
        if min(self.task.lengths) < needed:
            raise ConfigError(
                "a context length has no room for the planted facts and the question",
                found=f"{min(self.task.lengths)} tokens",
                allowed=f"at least {needed} tokens with {self.task.num_distractors} distractors",
                fix="leave out the shortest lengths or use fewer distractors",
            )
        self._haystack.window(rng(self.task.seed, "needle check"), max(self.task.lengths))


def _other_depth(generator: np.random.Generator, depth: float) -> float:
    """Draw a depth that is at least DISTRACTOR_GAP away from the needle's."""
    low, high = max(0.0, depth - DISTRACTOR_GAP), min(1.0, depth + DISTRACTOR_GAP)
    drawn = generator.random() * (1.0 - (high - low))
    return float(drawn if drawn < low else drawn + high - low)


def _places(
    depth: float, other_depths: Sequence[float], sizes: Sequence[int], haystack_tokens: int
) -> _Places:
    """Return where in the bare haystack to plant, so that the needle is at `depth` of all that surrounds it.

    Distractors take room: with 40 tokens of them before the needle in a haystack of 100 tokens, depth 0.5 of
    all 140 tokens is depth 0.3 of the haystack. They keep their side of the needle.
    """
    earlier = sum(size for other, size in zip(other_depths, sizes) if other < depth)
    total = haystack_tokens + sum(sizes)
    needle = min(1.0, max(0.0, (depth * total - earlier) / haystack_tokens))
    others = [
        other / depth * needle if other < depth else 1.0 - (1.0 - other) / (1.0 - depth) * (1.0 - needle)
        for other in other_depths
    ]
    order = sorted(range(1 + len(others)), key=lambda index: [depth, *other_depths][index])
    return _Places([needle, *others], order, (needle * haystack_tokens + earlier) / total)


def _plant(window: Window, haystack_tokens: int, facts: Sequence[Fact], places: _Places) -> _Planted:
    """Plant facts into the first tokens of the window; the first fact is the needle.

    Planted from the last to the first, so what is planted never moves a place that is still to come. The
    borders are those of the bare haystack: a planted line has ends of its own, which are nobody's place.
    """
    text = haystack = window.head(haystack_tokens)
    start = end = -1
    for index in reversed(places.order):
        before = len(text)
        border = nearest_border(haystack, window.char_at(places.depths[index], haystack_tokens))
        text, at, stop = insert_at_sentence(text, facts[index].sentence, border / before)
        if index == 0:
            start, end = at, stop
        elif at <= start:
            start, end = start + len(text) - before, end + len(text) - before
    assert text[start:end] == facts[0].sentence
    return _Planted(text, start, end)


def _check_depth(achieved: float, places: _Places, *, window: Window, haystack_tokens: int) -> None:
    """Raise DataError when the needle is farther off than the nearest line or sentence border explains."""
    target = window.char_at(places.depths[0], haystack_tokens)
    border = nearest_border(window.head(haystack_tokens), target)
    low, high = np.searchsorted(window.ends[:haystack_tokens], sorted([target, border]))
    tolerance = DEPTH_TOLERANCE + (int(high - low) + 1) / haystack_tokens
    if abs(achieved - places.expected) > tolerance:
        raise DataError(
            f"the needle stands at depth {achieved:.3f} instead of {places.expected:.3f}",
            allowed=f"{tolerance:.3f} off, by the nearest line or sentence border",
        )
