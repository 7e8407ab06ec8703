"""What a job of questions makes its samples of, and for whom."""

from __future__ import annotations

from typing import Any, NamedTuple

import pydantic

from longspan.api import ServerConfig
from longspan.core.config import Config
from longspan.data.chat import ChatFormat
from longspan.data.tokenizer import Tokenizer
from longspan.synth.config import ConversationConfig, QaConfig, SetConfig
from longspan.synth.selection import Inputs


class SynthConfig(Config):
    """What decides the output of a job, beside what the model says."""

    set: SetConfig
    """The questions."""
    inputs: tuple[str, ...]
    """Where the documents are."""
    text_field: str = "text"
    """Field of the text in records."""
    source_field: str | None = None
    """Field of the source in records."""
    tokenizer: str
    """Fingerprint of the student's tokenizer."""
    chat_template: str
    """Fingerprint of its chat template."""
    model: str | None = None
    """Who is asked, such as `openai:NAME`; None: nobody (`offline`). Its address may change while a job goes on."""
    extra: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Further fields of every request."""
    sample: ConversationConfig = ConversationConfig()
    """What a sample looks like."""
    leak_check: bool = True
    """Whether every question is also asked without its document."""
    seed: int = 0
    """Seed of every random choice."""

    @property
    def reads(self) -> Inputs:
        """Return what the job reads."""
        return Inputs(self.inputs, self.text_field, self.source_field)

    @classmethod
    def of(cls, asked: QaConfig, chosen: SetConfig, student: Student) -> SynthConfig:
        """Return the part of what was asked for that decides the output."""
        shared = ("inputs", "text_field", "source_field", "sample", "leak_check", "seed")
        server = asked.server or ServerConfig()
        return cls(
            set=chosen,
            tokenizer=student.tokenizer.fingerprint,
            chat_template=student.chat.fingerprint,
            model=asked.model,
            extra=server.extra,
            **{name: getattr(asked, name) for name in shared},
        )


class Student(NamedTuple):
    """Who will be trained: the tokenizer that counts and the chat template that writes."""

    tokenizer: Tokenizer
    chat: ChatFormat
