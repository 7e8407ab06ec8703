"""NeedleBench's Ancestral Trace Challenge: who is whose ancestor, over a chain of up to 512 relations in any order.

    DATA/names.json        {"English": "Ada Hill,Bo Lane,...", "Chinese": ...}, of `opencompass/NeedleBench`

Prompts, relations and what they count for are read from the released needlebench_v2/atc.py (`prompts`; parsed, not
run). Names and order are drawn as there, by a seed for each kind of question and sample, so questions are those of the
published runs (Li et al. 2024, arXiv 2407.11963, version 2 of the benchmark).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import pydantic

from longspan.core.config import Commas, Config
from longspan.core.errors import DataError
from longspan.core.files import read_json, sha256_bytes
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.released.literals import literals_in
from longspan.eval.released.row_task import files_of
from longspan.eval.task import Built, Planned, PromptTask

Kind = Literal["eldest_ancestor", "nth_ancestor", "nth_descendant", "relationship_distance"]
Language = Literal["English", "Chinese"]
_KINDS: dict[Kind, tuple[str, int]] = {
    "eldest_ancestor": ("shuffled_story_with_prompt", 0),
    "nth_ancestor": ("nth_ancestor_prompt", 10_000),
    "nth_descendant": ("nth_descendant_prompt", 20_000),
    "relationship_distance": ("relationship_distance_prompt", 30_000),
}
"""The name of its prompt, and where its seeds begin."""
_RELEASED = "the released opencompass/datasets/needlebench_v2/atc.py"
_ENDINGS: Mapping[Language, tuple[str, str]] = {"English": ("en", "en"), "Chinese": ("zh_CN", "zh")}
"""Of names in the released file: of prompts, and of the table of generations."""
TOKENS_PER_RELATION = 24


class Chain(NamedTuple):
    """Relations of persons, each of the one before."""

    names: list[str]
    """The eldest first."""
    terms: list[str]
    """What each is to the next."""
    relations: list[str]
    """As sentences, in any order."""


class Relations(NamedTuple):
    """How relations are put."""

    templates: Sequence[Any]
    terms: Sequence[str]

    def chain(self, draw: random.Random, names: Sequence[str], count: int) -> Chain:
        """Draw a chain of `count` relations, in the order in which the released code draws."""
        persons, terms, sentences = draw.sample(names, count + 1), [], []
        for elder, younger in pairwise(persons):
            template, term = draw.choice(self.templates), draw.choice(self.terms)
            terms.append(term)
            sentences.append(template.format(A=elder, B=younger, relationship=term))
        draw.shuffle(sentences)
        return Chain(persons, terms, sentences)


def relations_in(path: Path, language: Language) -> Relations:
    """Return how relations are put in the released atc.py. Raises DataError: it is none."""
    found = literals_in(path, _tables(language), allowed=_RELEASED)
    return Relations(*(found[name] for name in _tables(language)))


def _tables(language: Language) -> list[str]:
    return [f"relationship_{part}_{_ENDINGS[language][0]}" for part in ("templates", "terms")]


def names_of(files: Mapping[str, Path], language: Language, *, needed: int) -> list[str]:
    """Return the persons' names of a language, each once.

    Args:
        files: by name, names.json among them.

    Raises:
        DataError: there are none of that language, or fewer than needed.
    """
    found = [path for path in files.values() if path.name == "names.json"]
    if len(found) != 1:
        raise DataError("the names are read from one file", found=", ".join(files), allowed="names.json")
    content = read_json(found[0])
    names = content.get(language) if isinstance(content, dict) else None
    if not isinstance(names, str):
        raise DataError(f"{found[0]} holds no {language} names", allowed="the released names.json")
    if len(names.split(",")) < needed:
        raise DataError(
            f"a chain of {needed - 1} relations takes one person more", found=f"{len(names.split(','))} names"
        )
    return names.split(",")


class AncestralTraceConfig(Config):
    """Settings of the Ancestral Trace Challenge."""

    prompts: Path
    """The released opencompass/datasets/needlebench_v2/atc.py."""
    num_needles: Annotated[tuple[int, ...], Commas] = (2, 4, 8, 16, 32, 64, 128, 256, 512)
    """Relations in the chain."""
    kinds: Annotated[tuple[Kind, ...], Commas] = tuple(_KINDS)
    """Kinds of question."""
    language: Language = "English"
    """Of names and prompts."""
    samples: pydantic.PositiveInt = 10
    """Questions of each kind and number of relations."""

    @pydantic.field_validator("num_needles")
    @classmethod
    def _are_relations(cls, num_needles: tuple[int, ...]) -> tuple[int, ...]:
        if not num_needles or min(num_needles) < 1:
            raise ValueError("a chain has one relation or more")
        return num_needles


class AncestralTrace(PromptTask[AncestralTraceConfig]):
    """The task.

    Args:
        names: of persons, each once.

    Raises:
        DataError: the prompts are not those of the release, or there are too few names.
    """

    name, scorer = "ancestral_trace", "boxed_name"
    answer_tokens = 2048

    def __init__(self, settings: AncestralTraceConfig, form: PromptForm, names: Sequence[str]) -> None:
        super().__init__(settings, form)
        prompts, relations = _ENDINGS[settings.language]
        asked = {kind: f"{_KINDS[kind][0]}_{prompts}" for kind in settings.kinds}
        generations = f"relationship_generation_map_{relations}"
        tables = _tables(settings.language)
        found = literals_in(settings.prompts, [*asked.values(), *tables, generations], allowed=_RELEASED)
        self._prompts = {kind: found[name] for kind, name in asked.items()}
        self._relations = Relations(*(found[name] for name in tables))
        self._generations = found[generations]
        self._names = names
        self._sha256 = sha256_bytes(repr([names, found]).encode())

    @classmethod
    def from_config(cls, config: AncestralTraceConfig, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task with the released names. Raises DataError: there are none of that language."""
        files = files_of(data.named("names"), (".json",))
        return cls(config, form, names_of(files, config.language, needed=max(config.num_needles) + 1))

    def params(self) -> dict[str, Any]:
        """Return what determines the samples."""
        # Of the released file its texts count, not where it stands.
        return {**super().params(), "prompts": None, "data_sha256": self._sha256}

    def plan(self) -> list[Planned]:
        """Return a sample for each kind, number of relations and repetition."""
        return [
            Planned(
                (kind, count, sample),
                count * TOKENS_PER_RELATION + 512 + self._form.room(self.answer_tokens),
                fields={"question_type": kind, "num_needles": count, "sample": sample},
            )
            for count in self.settings.num_needles
            for kind in self.settings.kinds
            for sample in range(self.settings.samples)
        ]

    def build(self, planned: Planned) -> Built:
        """Compose one question."""
        kind, count, sample = planned.key
        _, seeds = _KINDS[kind]  # type: ignore[index]
        draw = random.Random(seeds + int(sample) + 1)
        names, terms, story = self._relations.chain(draw, self._names, int(count))
        generations = sum(self._generations.get(term, 1) for term in terms)
        ends = {"last_person": names[-1], "person_a": names[0], "person_b": names[-1], "n": generations}
        ends["person"] = names[0] if kind == "nth_descendant" else names[-1]
        prompt = self._prompts[kind].format(shuffled_story="".join(story), **ends)  # type: ignore[index]
        answers = {"nth_descendant": names[-1], "relationship_distance": str(generations)}
        request = self._form.request(prompt, max_new_tokens=self.answer_tokens)
        assert request.prompt_ids is not None
        fields = {
            "question": prompt.rstrip().rsplit("\n", 1)[-1],
            "generations": generations,
            "achieved_length": len(request.prompt_ids),
        }
        return Built(request, fields, answers.get(str(kind), names[0]))
