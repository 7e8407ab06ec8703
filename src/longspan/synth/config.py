"""What a set of questions is: which documents, how they are cut, what is asked, which answers are kept.

The shipped sets are those of "Extending Llama-3's Context Ten-Fold Overnight" (arXiv:2404.19553), with its numbers
of documents and its limits in tokens; the prompts are our own. `paper_questions` is its fixed list on long papers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic

from longspan.api import RemoteModel, ServerConfig, chat_model
from longspan.core.config import Commas, Config, Length
from longspan.core.errors import ArgumentError, ConfigError
from longspan.synth.language import PROFILES
from longspan.synth.templates import PromptTemplate, load_prompt, shipped, shipped_names

Kind = Literal["one_detail", "multi_detail", "biography", "research_questions", "offline"]

OFFLINE = "offline"
"""The kind that asks no model, and the set of it that is shipped."""
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
    min_tokens: Length = pydantic.Field(1, ge=1)
    max_tokens: Length | None = pydantic.Field(None, ge=1)
    """Length of a document by the student's tokenizer, both ends included."""
    documents: pydantic.PositiveInt | None = None
    """Documents to draw; None: all."""
    section_tokens: Length = pydantic.Field(4096, ge=1)
    """Longest section of a document."""
    questions: pydantic.PositiveInt = 4
    """Asked for in one request; of `offline`, made of one document."""
    in_sentences: bool = False
    """Of `offline`: a planted fact is answered in the sentence that says it, as models that chat do, and not with its
    bare number."""
    chains: bool = False
    """Of `offline`: one question in four asks for all names that a number is handed on to, over the whole text."""
    sections_per_request: pydantic.PositiveInt = 1
    requests_per_document: pydantic.PositiveInt | None = None
    """Of `multi_detail`: groups of sections that are asked about."""
    fixed_questions: tuple[str, ...] = ()
    answer_tokens: Length = pydantic.Field(4096, ge=1)
    """Most tokens of one reply."""
    evidence_recall: float = pydantic.Field(default=0.6, ge=0, le=1)
    """Share of an answer's words that have to stand in its evidence."""
    duplicates: Literal["set", "document"] = "set"
    """Where no two questions may be nearly the same; in one conversation they never are."""
    min_answer_words: pydantic.PositiveInt = 1
    max_answer_words: pydantic.PositiveInt = 200

    ADDED_LATER = frozenset({"chains"})

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
        for name in ("in_sentences", "chains"):
            if getattr(self, name) and self.kind != "offline":
                raise ConfigError(f"{name} has no effect on a set of kind {self.kind}", allowed="offline")
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


class ConversationConfig(Config):
    """What a sample looks like."""

    length: Length = pydantic.Field(81920, ge=1)
    """Tokens of a sample at most, such as 64k, the chat template counted."""
    distractors: pydantic.NonNegativeInt = 0
    """Other documents around one that is shorter than `length`."""
    max_questions: pydantic.PositiveInt | None = None
    """Questions of a sample. None: all of its document."""
    first_turns: Annotated[tuple[str, ...], Commas] = pydantic.Field(("conversation_v1",), min_length=1)
    """First turns, of which each sample has one: shipped names (conversation_v1, conversation_bare_v1,
    conversation_below_v1) or YAML files with the fields context and question. With one alone a model learns to answer
    it alone."""
    apart: bool = False
    """Ask each question on its own behind the text, as branches of one sample, which holds the text once, and not one
    after another: else all but the first are asked with answers before them. First turns have the question at their
    end then. Rows of such samples train on attention alone, not on layers with a state."""

    ADDED_LATER = frozenset({"first_turns", "apart"})

    @pydantic.model_validator(mode="after")
    def _ends_with_the_question(self) -> Self:
        for name in self.first_turns if self.apart else ():
            text = load_prompt(name).text
            if text.count("{{question}}") != 1 or not text.endswith("{{question}}"):
                raise ConfigError(
                    f"questions are asked apart behind the text, and the first turn {name} has them elsewhere",
                    allowed="first turns that end with {{question}}, and name it once",
                    fix="name others (conversation_v1, conversation_bare_v1), or leave apart out",
                )
        return self


class QaConfig(Config):
    """A job as it is asked for: documents, questions, who writes them, and what the samples look like."""

    inputs: tuple[str, ...]
    """Documents: files, folders, patterns, addresses."""
    tokenizer: str
    """Tokenizer of the model that will be trained."""
    chat_template: str | None = None
    """Chat template of the model that will be trained. None: the tokenizer's own; else a shipped name
    (docs/inputs.md) or a Jinja file."""
    question_set: str | None = None
    """Which questions: a name of `synth list`, or a YAML file like those."""
    offline_templates: bool = False
    """Ask no model: planted facts, repeated names, section titles."""
    model: str | None = None
    """Who writes the questions: openai:NAME or anthropic:NAME."""
    server: ServerConfig | None = None
    """How its server is asked, as YAML, a YAML file or its address: base_url, key_variable, max_length, limits
    (concurrency, requests_per_minute, tokens_per_minute ...), budget (max_requests, max_cost, prices), cache, extra."""
    sample: ConversationConfig = ConversationConfig()
    """What a sample looks like."""
    documents: pydantic.PositiveInt | None = None
    """Documents to draw. None: as the set says."""
    min_tokens: Length | None = None
    """Shortest document, such as 32000. None: as the set says."""
    max_tokens: Length | None = None
    """Longest document. None: as the set says."""
    language: str | None = None
    """Language of the documents, such as en, or any. None: the set's."""
    questions: pydantic.PositiveInt | None = None
    """Questions of a request (offline: of a document). None: as the set says."""
    leak_check: bool = True
    """Ask every question without its document too, and drop it where that is enough."""
    used: str | None = None
    """File of documents in use. None: used.sqlite beside the output, for all sets there."""
    text_field: str = "text"
    """Field of the text in records."""
    source_field: str | None = None
    """Field of the source in records."""
    seed: int = 0
    """Seed of every random choice."""

    def chosen_set(self) -> SetConfig:
        """Return the set of questions, with what is changed about it. Raises ArgumentError, ConfigError."""
        name = self.question_set or (OFFLINE if self.offline_templates else None)
        if name is None:
            raise ArgumentError(
                "which questions is not said",
                allowed=shipped_names("sets"),
                fix="name a set with --question-set, or give --offline-templates",
            )
        found = load_set(name)
        if self.offline_templates and found.kind != OFFLINE:
            raise ArgumentError(f"--offline-templates asks no model, and the set {found.name} has to")
        names = ("documents", "min_tokens", "max_tokens", "questions", "language")
        values: dict[str, Any] = {key: getattr(self, key) for key in names if getattr(self, key) is not None}
        if "questions" in values and found.fixed_questions:
            raise ArgumentError(f"--questions does not apply: the set {found.name} has a fixed list")
        if values.get("language") == "any":
            values["language"] = None
        if "min_tokens" in values and "max_tokens" not in values and found.max_tokens is not None:
            # A lower bound above the set's upper one is meant as a change of both ends.
            values["max_tokens"] = found.max_tokens if values["min_tokens"] <= found.max_tokens else None
        return SetConfig.from_dict({**found.to_dict(), **values}, where=f"the set {found.name}")

    def writer(self, chosen: SetConfig) -> RemoteModel | None:
        """Return who is asked; None for a set that asks nobody. Raises ArgumentError."""
        if chosen.kind != OFFLINE:
            fix = None if self.model else "or give --offline-templates, which asks nobody"
            return chat_model(self.model, option="--model", fix=fix)
        given = {"--model": self.model, "--server": self.server}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ArgumentError(
                f"{', '.join(unused)} has no effect: no model is asked for the set {chosen.name}"
            )
        return None


def load_set(name: str) -> SetConfig:
    """Return a set by its shipped name or from a YAML file. Raises ConfigError."""
    if Path(name).suffix in (".yaml", ".yml"):
        return SetConfig.from_yaml(name)
    return SetConfig.from_yaml(shipped("sets", name))


def shipped_sets() -> list[SetConfig]:
    """Return all shipped sets in alphabetical order."""
    return [load_set(name) for name in shipped_names("sets")]
