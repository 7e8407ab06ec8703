"""Retrieval from a long record of many parts, as in LongChat (Li et al. 2023): topics of a talk, numbered lines.

    topics   a talk in which 5 to 70 topics come one after the other; asked is the first topic that was discussed
    lines    200 to 680 lines `line brisk-lantern: REGISTER_CONTENT is <24169>`; asked is the number of one line

Both are composed here, from shipped lists and templates. Samples are known by how many topics or lines they
have, never by their tokens, which differ from sample to sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pydantic

from longspan.core.config import Config
from longspan.core.seeds import rng
from longspan.eval.grid import refuse_repeats
from longspan.eval.prompts import PromptForm
from longspan.eval.summaries import mean_by
from longspan.eval.task import Built, Planned, PromptTask
from longspan.eval.word_lists import draw_compounds, lists_fingerprint, word_list

ANSWER_TOKENS = 50
NUM_TOPICS = (5, 10, 15, 20, 25, 30, 40, 50, 60, 70)
NUM_LINES = (200, 300, 400, 500, 600, 680)
_MEASURED_PARTS = 5

_TOPICS_BEGIN = (
    "Below is a record of our previous conversation on {count} different topics. You are the ASSISTANT, and I am "
    "the USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. "
    "Memorize each <TOPIC>. At the end of the record, I will ask you to retrieve one topic. Now the record "
    "starts.\n"
)
_TOPICS_ASK = (
    "Now the record ends. What is the {ordinal} topic we discussed? Only give me the topic name. Do not "
    "summarize yourself.\nASSISTANT: The {ordinal} topic is"
)
_LINES_BEGIN = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record starts:\n"
)
_LINES_ASK = (
    "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number.\n"
    "The <REGISTER_CONTENT> in line {key} is"
)
_USER_TURNS = (
    "What should I know first about it?",
    "Why do people still {verb} the {adjective} {noun}?",
    "I have heard that a {adjective} {noun} is part of it. Is that so?",
    "Which {noun} would you choose, the {adjective} one or the {other} one?",
    "How long does it take until one can {verb} it well?",
    "Where does the {adjective} {noun} come from?",
    "Is there anything in it that beginners get wrong?",
    "And what has the {noun} to do with the {adjective} {second}?",
)
_ASSISTANT_TURNS = (
    "Most people begin with the {adjective} {noun}. They {verb} it for a while, and then turn to the {second}.",
    "That is a fair question. A {adjective} {noun} is easier to {verb} than the {other} {second}, so it stays.",
    "In part. The {noun} came later; at first there was only a {adjective} {second}, which few could {verb}.",
    "It depends on the {noun}. If it is {adjective}, you {verb} it slowly; if it is {other}, you need a {second}.",
    "Some books name the {adjective} {noun}, others the {second}. Nobody has been able to {verb} the two apart.",
    "Not long, if a {adjective} {noun} is at hand. The {second} takes more time, and one has to {verb} it again.",
    "Many forget to {verb} the {noun}. Then the {second} turns {adjective}, and the {other} part is lost.",
    "They share a {adjective} {noun}. Whoever can {verb} the one will soon understand the {other} {second}.",
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")

Kind = Literal["topics", "lines"]


class TopicsConfig(Config):
    """Settings of topic or line retrieval."""

    kind: Kind = "topics"
    """Topics of a talk, or numbered lines."""
    counts: tuple[pydantic.PositiveInt, ...] = ()
    """Topics (at most 100) or lines in a record. Default: LongChat's 5 to 70; 200 to 680."""
    samples: pydantic.PositiveInt = 10
    """Records of each count."""
    questions: int = pydantic.Field(default=1, ge=1, le=len(_ORDINALS))
    """Questions on one record: the first topic, the second, ...; or so many lines."""
    turns: pydantic.PositiveInt = 8
    """Questions and answers on one topic; 8 make about 400 tokens."""
    seed: int = 0
    """Seed of every random choice."""

    @pydantic.field_validator("counts", mode="before")
    @classmethod
    def _read_counts(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise ValueError("these are not counts, such as 5,10,20")
        return [int(part) for part in parts]

    @pydantic.model_validator(mode="after")
    def _counts_are_possible(self) -> TopicsConfig:
        refuse_repeats(self.in_effect)
        least, most = min(self.in_effect), max(self.in_effect)
        if self.kind == "topics" and most > len(word_list("topics")):
            raise ValueError(f"there are {len(word_list('topics'))} topics, not {most}")
        if least < self.questions:
            raise ValueError(f"{self.questions} questions need as many {self.kind}, not {least}")
        return self

    @property
    def in_effect(self) -> tuple[int, ...]:
        """The counts, LongChat's where none are given."""
        return self.counts or (NUM_TOPICS if self.kind == "topics" else NUM_LINES)


class Topics(PromptTask[TopicsConfig]):
    """The task."""

    answer_tokens = ANSWER_TOKENS

    def __init__(self, settings: TopicsConfig, form: PromptForm) -> None:
        super().__init__(settings, form)
        self.name = settings.kind
        self.scorer = "contains" if settings.kind == "topics" else "first_number"
        self._counted = f"num_{settings.kind}"

    def params(self) -> dict[str, Any]:
        """Return what determines the samples."""
        return {**super().params(), "counts": list(self.settings.in_effect), "lists": lists_fingerprint()}

    def plan(self) -> list[Planned]:
        """Return all samples; the questions on one record share all before the question."""
        asked = self._record(_MEASURED_PARTS, 0)[1][0][0] if self.settings.kind == "topics" else ""
        some, more = (self._form.count(self._record(_MEASURED_PARTS * n, 0)[0] + asked) for n in (1, 2))
        per_part = (more - some) / _MEASURED_PARTS
        return [
            Planned(
                (count, sample, question),
                int(some + per_part * (count - _MEASURED_PARTS)) + self._form.room(ANSWER_TOKENS),
                f"{self.name}-{count}-{sample}",
                {self._counted: count, "sample": sample, "question_number": question},
            )
            for count in self.settings.in_effect
            for sample in range(self.settings.samples)
            for question in range(self.settings.questions)
        ]

    def build(self, planned: Planned) -> Built:
        """Compose one sample."""
        count, sample, number = (int(part) for part in planned.key)
        record, questions = self._record(count, sample)
        question, expected = questions[number]
        request = self._form.request(record + question, max_new_tokens=ANSWER_TOKENS)
        assert request.prompt_ids is not None
        fields = {"question": question, "length": len(request.prompt_ids) + ANSWER_TOKENS}
        return Built(request, fields, expected)

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `by_count`: the mean score of each number of topics or lines."""
        return {"by_count": mean_by(samples, self._counted)}

    def _record(self, count: int, sample: int) -> tuple[str, list[tuple[str, str]]]:
        settings = self.settings
        if settings.kind == "topics":
            return _talk(settings.seed, count, sample, turns=settings.turns, questions=settings.questions)
        return _lines(settings.seed, count, sample, questions=settings.questions)


@lru_cache(maxsize=4)
def _talk(
    seed: int, count: int, sample: int, *, turns: int, questions: int
) -> tuple[str, list[tuple[str, str]]]:
    """Return the record of a talk, and questions with their answers."""
    generator = rng(seed, "topics", count, sample)
    names = word_list("topics")
    topics = [names[index] for index in generator.choice(len(names), size=count, replace=False)]
    parts = [_TOPICS_BEGIN.format(count=count)]
    for topic in topics:
        parts.append(f"USER: I would like to discuss the topic of {topic}.\n")
        parts.append(f"ASSISTANT: Sure! What about {topic} are you curious about?\n")
        for _ in range(turns):
            parts.append(f"USER: {_sentence(generator, _USER_TURNS)}\n")
            parts.append(f"ASSISTANT: {_sentence(generator, _ASSISTANT_TURNS)}\n")
    asked = [
        (_TOPICS_ASK.format(ordinal=ordinal), topic) for ordinal, topic in zip(_ORDINALS[:questions], topics)
    ]
    return "".join(parts), asked


@lru_cache(maxsize=4)
def _lines(seed: int, count: int, sample: int, *, questions: int) -> tuple[str, list[tuple[str, str]]]:
    """Return a record of lines, and questions with their answers."""
    generator = rng(seed, "lines", count, sample)
    keys = draw_compounds(generator, count)
    values = generator.integers(1, 50_000, size=count).tolist()
    lines = [f"line {key}: REGISTER_CONTENT is <{value}>\n" for key, value in zip(keys, values)]
    chosen = generator.choice(count, size=min(questions, count), replace=False).tolist()
    asked = [(_LINES_ASK.format(key=keys[index]), str(values[index])) for index in chosen]
    return _LINES_BEGIN + "".join(lines), asked


def _sentence(generator: np.random.Generator, templates: Sequence[str]) -> str:
    template, first, other, noun, second, verb = generator.random(6)

    def pick(words: Sequence[str], share: float) -> str:
        return words[int(share * len(words))]

    return pick(templates, template).format(
        adjective=pick(word_list("adjectives"), first),
        other=pick(word_list("adjectives"), other),
        noun=pick(word_list("nouns"), noun),
        second=pick(word_list("nouns"), second),
        verb=pick(word_list("verbs"), verb),
    )
