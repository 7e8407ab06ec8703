"""What every evaluation has in common: samples are planned at once and composed when their turn comes.

plan()          all samples by key, nothing composed: what is recorded already is left out by key
build(planned)  one prompt, with what is recorded of it; DataError: this sample is unscored, with that reason
summary(...)    the numbers to print, from the records alone
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, Protocol, Self, TypeVar

from longspan.core.config import Config
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.registry import entry_of
from longspan.eval.summaries import mean_by
from longspan.infer.requests import Request

Mode = Literal["generate", "teacher_forced"]


class Planned(NamedTuple):
    """A sample before it is composed."""

    key: tuple[str | int | float, ...]
    """Names it among the samples of its task, in JSON values."""
    tokens: int
    """About how long it will be."""
    group: str = ""
    """Samples of one group share a long prefix and are given to the model together."""
    fields: Mapping[str, Any] = MappingProxyType({})
    """What is recorded even of a sample that cannot be composed: length, depth, sample number, ..."""


class Built(NamedTuple):
    """A composed sample."""

    request: Request
    fields: Mapping[str, Any]
    """What is recorded of it beside what was planned, output and score: question, achieved_length, ..."""
    expected: str | list[str]
    """The right answer, or several of which scorers take the best, or which `parts` scorers count."""
    then: Callable[[str], Request] | None = None
    """Makes a second request of the first answer, which is recorded as `reasoning`; the second is scored."""


class Task(Protocol):
    """An evaluation of one kind with its settings."""

    name: str
    """Stands in the header and the name of the records file: needle, passkey, ruler, ..."""
    mode: Mode
    scorer: str
    """Name of the scorer (`eval.scorers`) whose result is the sample's `score`."""

    def params(self) -> dict[str, Any]:
        """Return the settings that determine the samples, for the header."""
        ...

    def plan(self) -> list[Planned]:
        """Return all samples; those of one group stand together."""
        ...

    def build(self, planned: Planned) -> Built:
        """Compose one sample, a pure function of the settings and its key. Raises DataError."""
        ...

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the task's own numbers from recorded samples."""
        ...


class FromConfig(Task, Protocol):
    """A task that a command makes: one way for all of them (`eval.registry`)."""

    @classmethod
    def from_config(cls, config: Any, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task with its settings, a `config` of the entry's class.

        Raises:
            ConfigError, DataError: settings and data do not go together.
        """
        ...


ConfigT = TypeVar("ConfigT", bound=Config)


class PromptTask(Generic[ConfigT]):
    """What tasks have in common that compose their prompts from settings alone, and let answers be written.

    One of them says its name, scorer and room for an answer, and has `plan` and `build`: each sample is a pure function
    of settings, tokenizer and its key.
    """

    name: str
    mode: Mode = "generate"
    scorer: str
    answer_tokens: int
    prompt_version = 1
    """Raised whenever the same settings would compose another prompt."""

    def __init__(self, settings: ConfigT, form: PromptForm) -> None:
        self.settings = settings
        self._form = form

    @classmethod
    def from_config(cls, config: ConfigT, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task; it reads nothing."""
        return cls(config, form)

    def params(self) -> dict[str, Any]:
        """Return what determines the samples."""
        return {
            **self.settings.to_dict(),
            **self._form.params(),
            "prompt_version": self.prompt_version,
            "max_new_tokens": self._form.room(self.answer_tokens),
        }

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `cells`: the mean score of each place on the axes of the registry's entry."""
        entry = entry_of(self.name)
        axes = None if entry is None else entry.axes
        return {} if axes is None else {"cells": mean_by(samples, axes.columns, *filter(None, [axes.rows]))}
