"""Needle in a haystack: a fact planted in unseen text at a given depth, asked back at the end of the context.

    ...haystack...
    The magic number of glacier is 48213.
    ...haystack...
    The magic number of glacier is| 48213        the model has to give what follows the bar

The whole, prompt and answer, has exactly the stated length in tokens, up to the stated tolerance. Facts are
planted into the text at a sentence border; text and answer are then tokenised together, and length
and depth are measured on the result and recorded.

Samples of one number share a haystack: that of a shorter length is the head of that of the longest. What
stands before the needle is then the same text for every depth and length behind it, and a model reads it once
(`Planned.group`). Needle, key and value are drawn anew for each cell; other facts for each length.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from longspan.core.errors import ConfigError, DataError
from longspan.core.intervals import EFFECTIVE_THRESHOLD, effective_context
from longspan.core.seeds import rng
from longspan.data.texts.facts import collect_keys
from longspan.eval.haystack import Haystack, Window
from longspan.eval.held_out import HeldOutDocument, TaskDataConfig, describe_documents
from longspan.eval.needle_config import NeedleConfig, fill
from longspan.eval.needle_originals import OriginalHaystack, Parts
from longspan.eval.planting import Insertion, Planted, check_depth, plant
from longspan.eval.prompts import PromptForm
from longspan.eval.summaries import mean_by
from longspan.eval.task import Built, Mode, Planned

PROMPT_VERSION = 3
"""Raised whenever the same settings would compose another prompt."""

MIN_HAYSTACK_TOKENS = 16
MIN_ABSENT_KEYS = 20
DISTRACTOR_GAP = 0.05
_MAX_FITS = 6
_MAX_DRAWS = 100
_CONTEXT_CHARS = 60
_HIDDEN = {"answer_prefix": "answer_begun", "max_new_tokens": "answer_room"}
"""Settings whose names mean something else of the form of every task, and what they stand under in a header."""


def length_tolerance(length: int) -> int:
    """Return by how many tokens a sample may fall short of its stated length: 8 or 1 %, whichever is more."""
    return max(8, length // 100)


class Facts(NamedTuple):
    """What was drawn for the `{key}` and `{number}` of one planted sentence."""

    key: str
    number: str


class NeedleHaystack(NamedTuple):
    """The haystack of one sample number, as long as the longest context."""

    window: Window
    keys: list[str]
    """Words that may be keys: those that the window lacks, if there are some."""


class Context(NamedTuple):
    """A haystack with what is planted in it, cut to a length."""

    text: str
    planted: Planted


class NeedleComposer:
    """Composes contexts: what all needle evaluations share.

    Raises:
        ConfigError: a length has no room for the planted facts and the question, or keys are too few.
        DataError: the documents hold too few keys, or fewer tokens than the longest length.
    """

    def __init__(
        self,
        settings: NeedleConfig,
        documents: Sequence[HeldOutDocument],
        form: PromptForm,
        *,
        num_needles: int,
    ) -> None:
        self.settings = settings
        self.form = form
        self.documents = describe_documents(documents)
        self._num_needles = num_needles
        self._haystack = Haystack(documents, form.tokenizer, repeat=settings.repeat)
        self._samples: dict[int, NeedleHaystack] = {}
        fields = settings.planted_fields()
        self._needle_fields, self._distractor_fields = fields[0], fields[1:]
        num_keys = num_needles * ("key" in self._needle_fields)
        needed = num_keys + sum("key" in each for each in self._distractor_fields)
        self._num_keys = needed
        self._keys: list[str] = list(settings.keys)
        if self._keys:
            if len(self._keys) < num_keys:
                raise ConfigError(
                    "there are fewer keys than needles", found=len(self._keys), allowed=f"at least {num_keys}"
                )
        elif needed:
            self._keys = collect_keys((document.text for document in documents), split=settings.key_split)
            if len(self._keys) < needed:
                raise DataError(
                    f"the documents hold too few words that may be keys ({settings.key_split} split)",
                    found=len(self._keys),
                    allowed=f"at least {needed}, one for each needle and each distractor",
                    fix="give more held-out documents, or name the keys (--key)",
                )
        self._check_lengths()

    def sample(self, number: int) -> NeedleHaystack:
        """Return the haystack of a sample number; the last one is kept."""
        if number not in self._samples:
            longest = max(self.settings.lengths)
            if self.settings.order == "given":
                window = self._haystack.first(longest)
            else:
                generator = rng(self.settings.seed, "needle haystack", number)
                window = self._haystack.window(generator, longest)
            keys = self._keys
            if not self.settings.keys:
                words = set(re.findall(r"[a-z]+", window.text.lower()))
                absent = [key for key in self._keys if key not in words]
                # A context as long as all documents holds every word; "of iron is" still stands there once.
                keys = absent if len(absent) >= max(MIN_ABSENT_KEYS, self._num_keys) else self._keys
            self._samples = {number: NeedleHaystack(window, keys)}
        return self._samples[number]

    def draw_needles(
        self, generator: np.random.Generator, sample: NeedleHaystack, count: int, taken: Sequence[Facts] = ()
    ) -> list[Facts]:
        """Draw keys and numbers of `count` needles: none is in `taken`, and no number in the haystack."""
        return self._draw(generator, sample, ["key" in self._needle_fields] * count, taken)

    def draw_distractors(
        self, generator: np.random.Generator, sample: NeedleHaystack, taken: Sequence[Facts] = ()
    ) -> list[Facts]:
        """Draw keys and numbers of the distractors."""
        return self._draw(generator, sample, ["key" in each for each in self._distractor_fields], taken)

    def needle(self, facts: Facts, depth: float) -> Insertion:
        """Return a needle to be planted."""
        return self._insertion(fill(self.settings.needle, **facts._asdict()), depth)

    def distractors(self, facts: Sequence[Facts], depths: Sequence[float]) -> list[Insertion]:
        """Return distractors to be planted, of the given texts in turn."""
        texts = itertools.cycle(self.settings.distractors or (self.settings.needle,))
        return [
            self._insertion(fill(text, **each._asdict()), depth)
            for each, depth, text in zip(facts, depths, texts)
        ]

    def question(self, facts: Sequence[Facts]) -> str:
        """Return the question for some needles: `{key}` is "iron, coal and tin"."""
        return _filled_for(self.settings.question, facts)

    def answer_prefix(self, facts: Sequence[Facts]) -> str:
        """Return how the answer to the question for some needles begins; empty: with itself."""
        text = _filled_for(self.settings.answer_prefix, facts)
        return text and f" {text}"

    def answer(self, facts: Facts) -> str:
        """Return the right answer for a needle."""
        return fill(self.settings.answer, **facts._asdict())

    def prompt(self, context: str, question: str) -> str:
        """Return the whole prompt."""
        # One pass: a context that holds "{question}" stays as it is.
        return fill(self.settings.prompt, context=context, question=question)

    def count(self, context: str, asked: Sequence[Facts]) -> int:
        """Return the tokens of prompt and answer, or of prompt and the room for a generated one."""
        prompt = self.prompt(context, self.question(asked))
        if self.settings.mode == "teacher_forced":
            return self.form.count(prompt, answer=self.answer(asked[0]))
        begun = self.form.count(prompt, answer_prefix=self.answer_prefix(asked))
        return begun + self.form.within(self.settings.max_new_tokens)

    def context(
        self,
        sample: NeedleHaystack,
        length: int,
        insertions: Sequence[Insertion],
        *,
        asked: Sequence[Facts],
        exact: int | None,
    ) -> Context:
        """Cut and plant a haystack so that with the question for some needles and its answer it has `length` tokens.

        Raises:
            DataError: it cannot be done; the message says why.
        """
        planned = self.count("", asked) + sum(each.tokens for each in insertions)
        # A little less than fits: what is planted at a border may cost a token more than on its own.
        haystack_tokens = length - planned - 2
        for _ in range(_MAX_FITS):
            if haystack_tokens < MIN_HAYSTACK_TOKENS:
                raise DataError(
                    f"no room for a haystack in {length} tokens", found=f"{haystack_tokens} tokens"
                )
            planted = plant(sample.window, haystack_tokens, insertions, exact=exact)
            text = planted.text.removesuffix("\n")
            tokens = self.count(text, asked)
            excess = tokens - length
            if -length_tolerance(length) < excess <= 0:
                return Context(text, planted)
            haystack_tokens -= excess
        raise DataError(f"the text could not be cut to {length} tokens", found=f"{tokens} tokens")

    def measured_depth(self, context: Context, index: int) -> float:
        """Return the share of the tokens around an insertion that stand before it.

        Raises:
            DataError: it is not where it should be.
        """
        start, end = context.planted.spans[index]
        encode = self.form.tokenizer.encode
        before = len(encode(context.text[:start]))
        after = len(encode(context.text[end:].removeprefix("\n")))
        achieved = before / max(1, before + after)
        check_depth(achieved, context.planted, index)
        return achieved

    def built(self, context: Context, index: int, facts: Sequence[Facts], **fields: Any) -> Built:
        """Return the request for some needles of a context; the insertion `index` is the one measured."""
        question = self.question(facts)
        answers = [self.answer(each) for each in facts]
        depth = self.measured_depth(context, index)
        prompt = self.prompt(context.text, question)
        if self.settings.mode == "teacher_forced":
            request = self.form.request(prompt, answer=answers[0])
        else:
            request = self.form.request(
                prompt, answer_prefix=self.answer_prefix(facts), max_new_tokens=self.settings.max_new_tokens
            )
        assert request.prompt_ids is not None
        generated = self.form.within(self.settings.max_new_tokens)
        room = generated if request.answer_ids is None else len(request.answer_ids)
        start, end = context.planted.spans[index]
        return Built(
            request,
            {
                "question": question,
                "achieved_length": len(request.prompt_ids) + room,
                "achieved_depth": round(depth, 6),
                "needle_window": context.text[max(0, start - _CONTEXT_CHARS) : end + _CONTEXT_CHARS],
                **fields,
            },
            answers[0] if len(answers) == 1 else answers,
        )

    def params(self) -> dict[str, Any]:
        """Return what determines the prompts, for the header."""
        own, form = self.settings.identity(), self.form.params()
        usual = NeedleConfig.model_fields
        return {
            **own,
            **form,
            **{_HIDDEN[name]: own[name] for name in own if name in form and own[name] != usual[name].default},
            "documents": self.documents,
            "prompt_version": PROMPT_VERSION,
        }

    def _insertion(self, text: str, depth: float) -> Insertion:
        return Insertion(text, depth, len(self.form.tokenizer.encode(f"{text}\n")))

    def _draw(
        self,
        generator: np.random.Generator,
        sample: NeedleHaystack,
        wants_key: Sequence[bool],
        taken: Sequence[Facts],
    ) -> list[Facts]:
        used = {each.key for each in taken}
        pool = [key for key in sample.keys if key not in used]
        count = sum(wants_key)
        # Given keys may serve several distractors, each with a number of its own.
        if count > len(pool) and not (self.settings.keys and pool):
            raise DataError("too few keys for so many facts", found=len(pool), allowed=f">= {count}")
        order = generator.permutation(len(pool)) if count > len(pool) else ()
        chosen = order if count > len(pool) else generator.choice(len(pool), size=count, replace=False)
        keys = iter([pool[int(chosen[number % len(chosen)])] for number in range(count)])
        numbers = {each.number for each in taken}
        facts = []
        for wanted in wants_key:
            number = self._draw_number(generator, sample.window.text, numbers)
            numbers.add(number)
            facts.append(Facts(next(keys) if wanted else "", number))
        return facts

    def _draw_number(self, generator: np.random.Generator, text: str, taken: set[str]) -> str:
        digits = self.settings.answer_digits
        for _ in range(_MAX_DRAWS):
            number = str(generator.integers(10 ** (digits - 1), 10**digits))
            if number not in taken and number not in text:
                return number
        raise DataError(f"the haystack holds nearly every number of {digits} digits")

    def _check_lengths(self) -> None:
        longest = sorted(self._keys, key=len)[-1:] or [""]
        facts = Facts(longest[0], "9" * self.settings.answer_digits)
        planted = [self.needle(facts, 0.0).tokens] * self._num_needles
        count = len(self._distractor_fields)
        planted += [each.tokens for each in self.distractors([facts] * count, [0.0] * count)]
        asked = [facts] * self.settings.num_needles
        needed = self.count("", asked) + sum(planted) + MIN_HAYSTACK_TOKENS + 2
        if min(self.settings.lengths) < needed:
            raise ConfigError(
                "a context length has no room for the planted facts and the question",
                found=f"{min(self.settings.lengths)} tokens",
                allowed=f"at least {needed} tokens with {self._num_needles} needles and "
                f"{self.settings.num_distractors} distractors",
                fix="leave out the shortest lengths or plant fewer facts",
            )
        self.sample(0)


def _filled_for(text: str, facts: Sequence[Facts]) -> str:
    """Fill a text about some needles: `{key}` is "iron, coal and tin"."""
    keys = [each.key for each in facts]
    joined = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    return fill(text, key=joined, number=facts[0].number)


class NeedleTask:
    """The needle evaluation: one needle asked for in each context, or several at once.

    Arguments are the settings, the documents that haystacks are cut from, and how prompts become ids.
    """

    def __init__(
        self, settings: NeedleConfig, documents: Sequence[HeldOutDocument], form: PromptForm
    ) -> None:
        self._prepare(settings, documents, form, settings.num_needles)
        self.name = "needle"
        if settings.num_needles > 1:
            self.name = "needle_multi"
        elif settings.num_distractors:
            self.name = "needle_distractors"
        self._original: OriginalHaystack | None = None
        if settings.original is not None:
            self._original = OriginalHaystack(documents, form.tokenizer, max(settings.lengths))

    def _prepare(
        self, settings: NeedleConfig, documents: Sequence[HeldOutDocument], form: PromptForm, num_needles: int
    ) -> None:
        if settings.mode == "teacher_forced":
            form.refuse_room("mode teacher_forced")
        self.settings = settings
        self.mode: Mode = settings.mode
        self.scorer = settings.scorer_name
        self._composer = NeedleComposer(settings, documents, form, num_needles=num_needles)

    @classmethod
    def from_config(cls, config: NeedleConfig, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task on some texts; those that come with Python are repeated as often as needed."""
        if not data.paths:
            config = config.model_copy(update={"repeat": True})
        return cls(config, data.documents(), form)

    def params(self) -> dict[str, Any]:
        """Return the settings that determine the samples, for the header."""
        return self._composer.params()

    def plan(self) -> list[Planned]:
        """Return all samples; those of one number share a haystack and stand together."""
        settings, form = self.settings, self._composer.form
        beyond = form.beyond(settings.max_new_tokens) if settings.mode == "generate" else 0
        if settings.original == "longllm":  # whose length is that of the bare prompt
            beyond += form.count("") + form.within(settings.max_new_tokens)
        counts: dict[str, Any] = {"num_distractors": settings.num_distractors}
        if settings.num_needles > 1:
            counts["num_needles"] = settings.num_needles
        return [
            Planned(
                (length, depth, number),
                length + beyond,
                group=f"haystack {number}",
                fields={"length": length, "depth": depth, "sample": number, **counts},
            )
            for number in range(settings.samples)
            for length, depth in settings.cells()
        ]

    def build(self, planned: Planned) -> Built:
        """Compose one sample, a pure function of the settings and its key. Raises DataError."""
        length, depth, number = int(planned.key[0]), float(planned.key[1]), int(planned.key[2])
        settings, composer = self.settings, self._composer
        sample = composer.sample(number)
        shared = rng(settings.seed, "needle others", length, number)
        others = composer.draw_needles(shared, sample, settings.num_needles - 1)
        distractors = composer.draw_distractors(shared, sample, others)
        depths = [_away_from(depth, float(place)) for place in shared.random(len(others) + len(distractors))]
        own = rng(settings.seed, "needle", length, depth, number)
        (needle,) = composer.draw_needles(own, sample, 1, [*others, *distractors])
        if self._original is not None:
            return composer.built(self._to_the_letter(needle, length, depth), 0, [needle])
        insertions = [composer.needle(needle, depth)]
        insertions += [composer.needle(each, place) for each, place in zip(others, depths)]
        insertions += composer.distractors(distractors, depths[len(others) :])
        asked = [needle, *others]
        context = composer.context(sample, length, insertions, asked=asked, exact=0)
        return composer.built(context, 0, asked)

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return means by cell and by length, and the effective context."""
        by_length = mean_by(samples, "length")
        cells = mean_by(samples, "length", "depth")
        return {"cells": cells, "by_length": by_length, **effective_of(by_length)}

    def _to_the_letter(self, needle: Facts, length: int, depth: float) -> Context:
        assert self._original is not None and self.settings.original is not None
        composer = self._composer
        before, after = self.settings.prompt.split("{context}")
        after = fill(after, question=composer.question([needle]))
        parts = Parts(before, composer.needle(needle, depth).text, after)
        planted = self._original.planted(self.settings.original, parts, length, depth)
        return Context(planted.text, planted)


def effective_of(
    by_length: Sequence[Mapping[str, Any]], *, threshold: float = EFFECTIVE_THRESHOLD
) -> dict[str, Any]:
    """Return the effective context of rows by length (see `core.intervals`), what to say of it, and the threshold."""
    rows = {row["length"]: (row["interval"], row["scored"]) for row in by_length}
    effective = effective_context(rows, threshold=threshold)
    return {
        "effective_context": effective.length,
        "effective_text": effective.text,
        "effective_note": effective.note,
        "effective_threshold": threshold,
    }


def _away_from(depth: float, place: float) -> float:
    """Move a place that is nearer to the needle's depth than DISTRACTOR_GAP to its other side of the gap."""
    if abs(place - depth) >= DISTRACTOR_GAP:
        return place
    before, after = depth - DISTRACTOR_GAP, depth + DISTRACTOR_GAP
    if before < 0.0 or after > 1.0:
        return after if before < 0.0 else before
    return before if place < depth else after
