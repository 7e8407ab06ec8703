"""Released evaluation sets as one task of ours: each set says what it asks, this composes and cuts.

A set is a number of examples with a template. Where a prompt is longer than the benchmark or the model
allows, the middle of the prompt is taken out (LongBench, InfiniteBench) or the end of its context (HELMET).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from longspan.core.errors import DataError
from longspan.eval.prompts import PromptForm
from longspan.eval.summaries import mean_by, means_of_means
from longspan.eval.task import Built, Mode, Planned
from longspan.eval.truncation import cut_end, cut_middle
from longspan.infer.requests import Request

READER_VERSION = 1
"""Raised whenever the same files would be asked in another way."""
_MAX_FITS = 4


class Question(NamedTuple):
    """One example of a set."""

    template: str
    """Holds {context} and other names of `values`."""
    values: Mapping[str, str]
    expected: list[str]
    fields: Mapping[str, Any]
    """What else is recorded, and what the metric needs."""


class Rule(NamedTuple):
    """How the questions of a set are asked and scored."""

    metric: str
    """Name of a scorer."""
    max_new_tokens: int
    chat: bool = True
    """False: never put as a chat, because the benchmark does not."""
    max_length: int | None = None
    """Tokens of the prompt at most, chat template not counted."""
    cut: Literal["middle", "end of context"] = "middle"
    omitted: str = ""
    """What stands at the end of a context that was cut."""
    category: str | None = None
    counts_bos: bool = False
    """Whether a BOS counts among the tokens of a prompt that is cut."""
    newline_ends: bool = False
    """Whether the token of one new line ends an answer; one that is part of another token does not."""


class ReleasedSet(Protocol):
    """A released set on this machine."""

    dataset: str
    subtask: str
    rule: Rule

    def __len__(self) -> int: ...

    def size(self, number: int) -> int:
        """Return about how many bytes the question has."""
        ...

    def question(self, number: int, *, chat: bool) -> Question:
        """Return a question. Raises DataError."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what determines the questions, for the header."""
        ...


class ReleasedTask:
    """All questions of some sets.

    Args:
        sets: each with its own name.
        form: how text becomes ids; its chat template is used where the benchmark allows one.
        max_length: tokens of prompt and answer that the model reads; None: no limit.
        limit: the first so many questions of each set.
    """

    name = "harness"
    mode: Mode = "generate"
    scorer = "by_metric"

    def __init__(
        self,
        sets: Sequence[ReleasedSet],
        form: PromptForm,
        *,
        max_length: int | None = None,
        limit: int | None = None,
    ) -> None:
        self._sets = {(each.dataset, each.subtask): each for each in sets}
        self._form, self._plain = form, form.plain()
        self._chats = form.separator == ""
        self._max_length, self._limit = max_length, limit

    def params(self) -> dict[str, Any]:
        """Return the settings that determine the samples."""
        return {
            "sets": {"/".join(key): each.describe() for key, each in self._sets.items()},
            "limit": self._limit,
            "max_length": self._max_length,
            **self._form.params(),
            "reader_version": READER_VERSION,
        }

    def plan(self) -> list[Planned]:
        """Return all questions, set by set."""
        planned = []
        for (dataset, subtask), each in self._sets.items():
            fields = {"dataset": dataset, "subtask": subtask, "metric": each.rule.metric}
            if each.rule.category is not None:
                fields["category"] = each.rule.category
            count = len(each) if self._limit is None else min(len(each), self._limit)
            for number in range(count):
                longest = min(self._longest(each.rule), each.size(number) // 3 + 256)
                tokens = longest + self._form.room(each.rule.max_new_tokens)
                if self._max_length is not None:
                    tokens = min(tokens, self._max_length)
                planned.append(
                    Planned((dataset, subtask, number), tokens, fields={**fields, "sample": number})
                )
        return planned

    def build(self, planned: Planned) -> Built:
        """Compose one question."""
        dataset, subtask, number = planned.key
        found = self._sets[str(dataset), str(subtask)]
        chat = found.rule.chat and self._chats
        question = found.question(int(number), chat=chat)
        form = self._form if chat else self._plain
        request, removed = self._fit(form, found.rule, question)
        return Built(request, {**question.fields, "truncated": removed}, question.expected)

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return means by set, category and data set, and by number of topics where there are such.

        Those of a category and of a data set (`averages`) are means of its sets' means.
        """
        subtasks = mean_by(samples, "dataset", "subtask")
        categories: dict[str, list[float]] = {}
        for row in subtasks:
            category = self._sets[row["dataset"], row["subtask"]].rule.category
            if category is not None and row["mean"] is not None:
                categories.setdefault(category, []).append(row["mean"])
        topics = [sample for sample in samples if sample.get("num_topics") is not None]
        return {
            "by_subtask": subtasks,
            "averages": means_of_means(subtasks, by="dataset"),
            **({"by_topics": mean_by(topics, "num_topics")} if topics else {}),
            "by_category": {name: sum(means) / len(means) for name, means in sorted(categories.items())},
            "truncated": sum(bool(sample.get("truncated")) for sample in samples),
        }

    def _longest(self, rule: Rule) -> int:
        limits = [
            rule.max_length,
            None if self._max_length is None else self._max_length - self._form.room(rule.max_new_tokens),
        ]
        return min([limit for limit in limits if limit is not None], default=1 << 62)

    def _fit(self, form: PromptForm, rule: Rule, question: Question) -> tuple[Request, int]:
        """Return the request, cut to what benchmark and model allow, and how many tokens were taken out."""
        values = dict(question.values)
        text, removed = question.template.format_map(_PromptValues(values)), 0
        if rule.cut == "middle" and rule.max_length is not None:
            before = int(rule.counts_bos and form.tokenizer.adds_bos)
            text, removed = cut_middle(text, form.tokenizer, rule.max_length, before=before)
        longest = self._longest(rule)
        for _ in range(_MAX_FITS):
            request = form.request(text, max_new_tokens=rule.max_new_tokens)
            if rule.newline_ends:
                newline = int(form.tokenizer.encode("\n")[-1])
                request = request._replace(stop_ids=(*request.stop_ids, newline))
            assert request.prompt_ids is not None
            excess = len(request.prompt_ids) - longest
            if rule.cut == "middle" and self._max_length is None:
                excess = 0  # the published limit does not count the chat template
            if excess <= 0:
                return request, removed
            if rule.cut == "middle":
                keep = len(form.tokenizer.encode(text)) - excess
                if keep < 2:
                    break
                text, cut = cut_middle(text, form.tokenizer, keep)
            else:
                context = values["context"].removesuffix(rule.omitted)
                room = len(form.tokenizer.encode(rule.omitted)) if rule.omitted and not removed else 0
                context, cut = cut_end(context, form.tokenizer, excess + room)
                if not context:
                    break
                values["context"] = context + rule.omitted
                text = question.template.format_map(_PromptValues(values))
            removed += cut
        raise DataError(
            "the question could not be cut to what the model reads", found=f"{excess} tokens too many"
        )


class _PromptValues(dict[str, str]):
    def __missing__(self, name: str) -> str:
        raise DataError(f"the prompt's template asks for {name!r}, which the example does not have")
