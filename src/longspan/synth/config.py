"""What a set of questions is: which documents, how they are cut, what is asked, which answers are kept.

The shipped sets are those of "Extending Llama-3's Context Ten-Fold Overnight" (arXiv:2404.19553), with its numbers
of documents and its limits in tokens; the prompts are our own. `paper_questions` is its fixed list on long papers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import pydantic

from longspan.core.config import Config
from longspan.core.errors import ConfigError
from longspan.synth.language import PROFILES
from longspan.synth.templates import PromptTemplate, load_prompt, shipped, shipped_names

Kind = Literal["one_detail", "multi_detail", "biography", "research_questions", "offline"]

FIELDS_OF_KIND: dict[str, set[str]] = {
    "one_detail": {"about", "text", "count"},
    "multi_detail": {"about", "text", "count", "sections"},
    "biography": {"about", "text", "count"},
    "research_questions": {"about", "text", "count", "questions"},
}
"""Fields that the prompt of each kind is given."""


class SetConfig(Config):
    """One set of questions.

    one_detail            every section is asked for details
    multi_detail          some sections, far apart, are compared
    biography             the whole document is asked for its people
    research_questions    the whole document is asked a fixed list of questions
    offline               nothing is asked: facts, names and headings are taken from the document itself
    """

    name: str = pydantic.Field(pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*")
    kind: Kind
    prompt: str | None = None
    """Shipped name or YAML file; None for `offline`."""
    about: str = "a document"
    """What the prompt calls the document."""
    language: str | None = "en"
    """Language that a document must be in (see `language`); None: any."""
    min_tokens: pydantic.PositiveInt = 1
    max_tokens: pydantic.PositiveInt | None = None
    """Length of a document by the student's tokenizer, both ends included."""
    documents: pydantic.PositiveInt | None = None
    """Documents to draw; None: all."""
    section_tokens: pydantic.PositiveInt = 4096
    """Longest section of a document."""
    questions: pydantic.PositiveInt = 4
    """Asked for in one request; of `offline`, made of one document."""
    sections_per_request: pydantic.PositiveInt = 1
    requests_per_document: pydantic.PositiveInt | None = None
    """Of `multi_detail`: groups of sections that are asked about."""
    fixed_questions: tuple[str, ...] = ()
    answer_tokens: pydantic.PositiveInt = 4096
    """Most tokens of one reply."""
    evidence_recall: float = pydantic.Field(default=0.6, ge=0, le=1)
    """Share of an answer's words that have to stand in its evidence."""
    duplicates: Literal["set", "document"] = "set"
    """Where no two questions may be nearly the same; in one conversation they never are."""
    min_answer_words: pydantic.PositiveInt = 1
    max_answer_words: pydantic.PositiveInt = 200

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.prompt is None) != (self.kind == "offline"):
            raise ConfigError(f"a set of kind {self.kind} needs {'no' if self.prompt else 'a'} prompt")
        if self.language is not None and self.language not in PROFILES:
            raise ConfigError(
                "there is no such language", found=self.language, allowed=[*sorted(PROFILES), "null (any)"]
            )
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ConfigError(
                "no document can be that long",
                found=f"min_tokens {self.min_tokens}, max_tokens {self.max_tokens}",
            )
        if self.kind == "multi_detail" and (self.sections_per_request < 2 or not self.requests_per_document):
            raise ConfigError("multi_detail needs sections_per_request >= 2 and requests_per_document")
        if (self.kind == "research_questions") != bool(self.fixed_questions):
            raise ConfigError("research_questions, and they alone, need fixed_questions")
        return self

    def template(self) -> PromptTemplate:
        """Return the prompt. Raises ConfigError: it does not exist or wants other fields than this kind has."""
        assert self.prompt is not None, "an offline set asks nothing"
        template = load_prompt(self.prompt)
        if set(template.fields) != FIELDS_OF_KIND[self.kind]:
            raise ConfigError(
                f"the prompt {template.name} does not fit a set of kind {self.kind}",
                found=f"fields {sorted(template.fields)}",
                allowed=sorted(FIELDS_OF_KIND[self.kind]),
            )
        return template


def load_set(name: str) -> SetConfig:
    """Return a set by its shipped name or from a YAML file. Raises ConfigError."""
    if Path(name).suffix in (".yaml", ".yml"):
        return SetConfig.from_yaml(name)
    return SetConfig.from_yaml(shipped("sets", name))


def shipped_sets() -> list[SetConfig]:
    """Return all shipped sets in alphabetical order."""
    return [load_set(name) for name in shipped_names("sets")]
