"""Settings of the needle evaluations: the grid, the texts, and how an answer is got and scored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import pydantic

from longspan.core.config import Length
from longspan.eval.grid import GridConfig
from longspan.eval.scorers import SCORERS
from longspan.eval.task import Mode

Order = Literal["random", "given"]
Original = Literal["fu-2024", "longllm"]

_FIELD = re.compile(r"\{(\w+)\}")
_FACT_FIELDS = ("key", "number")
CHAT: Mapping[str, str] = MappingProxyType(
    {
        "mode": "generate",
        "question": "What is the magic number of {key}?",
        "answer_prefix": "The magic number of {key} is",
    }
)
"""Settings for a chat, where nothing is said: a model that chats answers in a sentence, not with a bare number."""


class NeedleConfig(GridConfig):
    """Settings of a needle evaluation; samples of one number share a haystack across all cells."""

    num_needles: pydantic.PositiveInt = 1
    """Needles in one context, all asked for; the first stands at the cell's depth, others anywhere."""
    num_distractors: pydantic.NonNegativeInt = 0
    """Other planted facts in the same text, not asked for, at other depths."""
    needle: str = "The magic number of {key} is {number}."
    """Planted text; {key}, a word, and {number} are drawn for each sample."""
    question: str = "The magic number of {key} is"
    """What is asked at the end; with several needles {key} is all their keys."""
    answer: str = "{number}"
    """The right answer."""
    answer_prefix: str = ""
    """How a generated answer begins: words of the assistant in a chat, else the end of the prompt; no part of the
    answer, and left out for a model that thinks. Default: none; in a chat a sentence."""
    distractors: tuple[str, ...] = ()
    """Texts of the planted facts that are not asked for, in turn; many times. Default: the needle with another key and
    number."""
    keys: tuple[str, ...] = ()
    """Words that may be {key}; many times. Default: words of the documents, those that the haystack lacks where it
    lacks some."""
    answer_digits: int = pydantic.Field(default=5, ge=1, le=18)
    """Digits of {number}; it does not begin with 0."""
    prompt: str = "{context}\n{question}"
    """The whole, with {context} and {question}."""
    mode: Mode = "teacher_forced"
    """The most likely tokens along the right answer, or what the model writes. In a chat, and behind a server, the
    latter is usual."""
    scorer: str | None = None
    """Scoring rule; see `eval list`. None: teacher_forced, or of generated answers contains, string_match_all for
    several."""
    max_new_tokens: Length = pydantic.Field(32, ge=1)
    """Tokens that a generated answer may have; the stated length holds room for them."""
    order: Order = "random"
    """Order of the documents in a haystack: cut out of them at random, or as they are given."""
    repeat: bool = False
    """Repeat documents that are shorter than the longest context."""
    original: Original | None = None
    """Whose code's way of cutting the haystack and placing the needle is followed to the letter; None: ours."""
    key_split: Literal["train", "validation", "test"] = "test"
    """Which share of the words may be keys; only `train` words are keys in training."""
    split: str = "test"
    """Name of the share of the documents that the haystacks are cut from."""

    @property
    def scorer_name(self) -> str:
        """The scoring rule in effect."""
        if self.scorer is not None:
            return self.scorer
        if self.mode == "teacher_forced":
            return "teacher_forced"
        return "contains" if self.num_needles == 1 else "string_match_all"

    def template(self, text: str) -> set[str]:
        """Return the fields in a text."""
        return set(_FIELD.findall(text))

    def planted_fields(self) -> list[set[str]]:
        """Return the fields in the needle's text and in that of each distractor."""
        others = self.distractors or (self.needle,)
        return [
            self.template(self.needle),
            *(self.template(others[number % len(others)]) for number in range(self.num_distractors)),
        ]

    @pydantic.model_validator(mode="after")
    def _texts_fit_together(self) -> NeedleConfig:
        if self.answer_prefix and self.mode == "teacher_forced":
            raise ValueError("answer_prefix begins an answer that is generated; a given one needs none")
        for name in ("needle", "question", "answer", "answer_prefix"):
            if name in ("needle", "answer") and not getattr(self, name).strip():
                raise ValueError(f"{name} is empty")
            _refuse_unknown(name, getattr(self, name), _FACT_FIELDS)
            missing = self.template(getattr(self, name)) - self.template(self.needle)
            if missing:
                raise ValueError(f"{name} holds {{{min(missing)}}}, which the needle does not say")
        for text in self.distractors:
            _refuse_unknown("distractors", text, _FACT_FIELDS)
        _refuse_unknown("prompt", self.prompt, ("context", "question"))
        for field in ("context", "question"):
            if self.prompt.count(f"{{{field}}}") != 1:
                raise ValueError(
                    f"prompt holds {{{field}}} {self.prompt.count(f'{{{field}}}')} times, not once"
                )
        if self.prompt.index("{context}") > self.prompt.index("{question}"):
            raise ValueError(
                "prompt asks before the context: what stands before a haystack is shared by all cells"
            )
        if self.scorer is not None and self.scorer not in SCORERS:
            raise ValueError(f"there is no scorer {self.scorer!r}, only {', '.join(sorted(SCORERS))}")
        return self

    @pydantic.model_validator(mode="after")
    def _facts_differ(self) -> NeedleConfig:
        if self.num_needles > 1:
            if "key" not in self.template(self.needle) or "key" not in self.template(self.question):
                raise ValueError("several needles need a {key} in needle and question, to tell them apart")
            if self.mode == "teacher_forced":
                raise ValueError("several needles in one question are answered by `mode: generate`")
        if self.num_distractors and not self.distractors and not self.template(self.needle):
            raise ValueError(
                "a needle without {key} or {number} needs `distractors`: its copy would give the answer"
            )
        # 9 of 10 numbers do not begin with 0; a tenth of them is plenty to find some that the text lacks.
        if (self.num_needles + self.num_distractors) * 10 > 9 * 10 ** (self.answer_digits - 1):
            raise ValueError(
                f"{self.num_distractors} distractors need values of more than {self.answer_digits} digits"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _original_has_one_needle(self) -> NeedleConfig:
        if self.original is None:
            return self
        if self.num_needles > 1 or self.num_distractors:
            raise ValueError("a test to the letter of its original has one needle and no distractors")
        if self.order != "given":
            raise ValueError("a test to the letter of its original reads documents in `order: given`")
        if self.mode != "generate":
            raise ValueError("a test to the letter of its original has answers generated (`mode: generate`)")
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine prompts, for the header; mode and scorer stand there by themselves."""
        values = self.to_dict()
        del values["mode"], values["scorer"]
        if self.original is None:
            del values["original"]
        if self.mode == "teacher_forced":
            del values["max_new_tokens"]
        return values


def fill(text: str, **fields: str) -> str:
    """Put fields into a text: `fill("of {key} is", key="iron")`; braces that are no field stay."""
    return _FIELD.sub(lambda match: fields.get(match[1], match[0]), text)


def _refuse_unknown(name: str, text: str, known: tuple[str, ...]) -> None:
    unknown = set(_FIELD.findall(text)) - set(known)
    if unknown:
        allowed = ", ".join(f"{{{field}}}" for field in known)
        raise ValueError(f"{name} holds {{{min(unknown)}}}; fields are {allowed}")
