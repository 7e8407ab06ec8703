"""The released `long-llm` evaluation files: LongBench, InfiniteBench and topic retrieval.

    ROOT/longbench/narrativeqa.jsonl        input, context, answers, all_classes, length, ...
    ROOT/infbench/longbook_qa_eng.jsonl     id, context, input, answer (a text, or a list), options
    ROOT/longeval/topic_retrieval.json      context, question, topics, num_topics; a JSON line each

Templates, limits and metrics are data (longllm.yaml, and ../longbench.yaml). From FlagEmbedding's Long_LLM are
the layout of the files, the prompts' longest lengths, what ends an answer, and the metrics' names. Scores do
not depend on token counts of a group here (there, two sizes of the same mean length overwrote each other), an
empty summary scores 0 instead of ending the run, and texts are cut at characters, not by decoding halves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from longspan.core.config import parse_yaml
from longspan.core.errors import ArgumentError, DataError
from longspan.eval.longqa import longbench_names, rule_for
from longspan.eval.released.rows import Rows, find_rows, texts_of
from longspan.eval.released.sets import Question, Rule

DATASETS = {
    "longbench": "longbench",
    "infbench": "infinitebench",
    "longeval": "longeval",
    "fu-2024": "infinitebench-fu-2024",
}
"""Section of the settings, which is the folder in the release where it names none, and the data set in records."""
DEFAULT_SUBTASKS = {
    "longbench": (
        "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum",
        "multi_news", "trec", "triviaqa", "samsum", "lcc", "repobench-p",
    ),
    "infbench": ("longbook_qa_eng", "longbook_sum_eng"),
    "longeval": ("topic_retrieval",),
    "fu-2024": ("longbook_qa_eng", "longdialogue_qa_eng", "longbook_choice_eng"),
}  # fmt: skip
"""What `long-llm` runs where nothing is chosen."""
NUM_TOPICS = (5, 10, 15, 20, 25, 30, 40, 50, 60, 70)
_LETTERS = "ABCD"


def open_sets(
    root: Path,
    folder: str,
    subtasks: Sequence[str] = (),
    *,
    max_length: int | None = None,
    exact: bool = False,
) -> list[LongLLMSet]:
    """Open the sets of one folder of the release, or by the prompts of `fu-2024`.

    Args:
        folder: longbench, infbench or longeval; fu-2024 asks those of infbench otherwise.
        subtasks: names of sets; none: those that `long-llm` runs; `all`: every one.
        max_length: tokens of a prompt at most, in place of the published limit.
        exact: of longbench, answers to questions end at the token of a new line, and all that is written counts; else
            their first line does; and BOS counts among the tokens of a prompt that is cut.

    Raises:
        ArgumentError: there is no such set, or no exact form of the folder.
        DataError: a file is missing.
    """
    settings = read_settings("longllm.yaml")[folder]
    if exact and folder != "longbench":
        raise ArgumentError("there is no exact form of these sets", found=folder, allowed="longbench")
    known = _longbench_rules(settings, exact=exact) if folder == "longbench" else settings["datasets"]
    names = list(known) if list(subtasks) == ["all"] else list(subtasks or DEFAULT_SUBTASKS[folder])
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ArgumentError(f"{folder} has no such set", found=", ".join(unknown), allowed=[*known, "all"])
    return [
        LongLLMSet(
            root,
            settings.get("folder", folder),
            name,
            known[name],
            max_length or settings["max_length"],
            dataset=DATASETS[folder],
        )
        for name in names
    ]


def _longbench_rules(settings: dict[str, Any], *, exact: bool) -> dict[str, Any]:
    """Return LongBench's data sets as its own settings have them, and what `long-llm` adds."""
    rules = {}
    for name in longbench_names():
        rule = rule_for(name)
        ends = name in settings["first_line"]
        rules[name] = {
            "prompt": rule.prompt,
            "metric": settings["metrics"].get(name, rule.metric),
            "max_new_tokens": rule.max_new_tokens,
            "chat": rule.chat,
            "postprocess": "first_line" if rule.first_line or (ends and not exact) else None,
            "newline_ends": ends and exact,
            "counts_bos": exact,
            "category": rule.kind,
        }
    return rules


def read_settings(name: str) -> dict[str, Any]:
    """Return a data file of this folder."""
    content = parse_yaml(resources.files(__package__).joinpath(name).read_text("utf-8"), where=name)
    assert isinstance(content, dict)
    return content


class LongLLMSet:
    """One file of the release."""

    def __init__(
        self,
        root: Path,
        folder: str,
        name: str,
        settings: dict[str, Any],
        max_length: int | None,
        *,
        dataset: str,
    ) -> None:
        self.dataset, self.subtask = dataset, name
        self._first_answer = settings.get("first_answer", False)
        self._folder, self._template = folder, settings["prompt"]
        self._postprocess = settings.get("postprocess")
        self.rule = Rule(
            settings["metric"],
            settings["max_new_tokens"],
            settings.get("chat", True),
            max_length,
            category=settings.get("category"),
            counts_bos=settings.get("counts_bos", False),
            newline_ends=settings.get("newline_ends", False),
        )
        places = [f"{folder}/{name}.jsonl", f"{folder}/{name}.json", f"{name}.jsonl", f"{name}.json"]
        self._rows = find_rows(root, places, what=f"{folder}/{name}")
        self._numbers = list(range(len(self._rows)))
        if folder == "longeval":
            self._numbers = [n for n, row in enumerate(self._rows) if row.get("num_topics") in NUM_TOPICS]

    def __len__(self) -> int:
        return len(self._numbers)

    def size(self, number: int) -> int:
        """Return about how many bytes the question has."""
        return self._rows.size(self._numbers[number])

    def describe(self) -> dict[str, Any]:
        """Return what determines the questions."""
        described = {
            "file": self._rows.path.name,
            "sha256": self._rows.sha256,
            "max_length": self.rule.max_length,
        }
        letters = {"counts_bos": self.rule.counts_bos, "newline_ends": self.rule.newline_ends}
        return described | {name: True for name, holds in letters.items() if holds}

    def question(self, number: int, *, chat: bool) -> Question:
        """Return a question."""
        place = self._numbers[number]
        if self._folder == "longeval":
            return self._topic(place)
        return self._infinitebench(place) if self._folder == "infbench" else self._longbench(place)

    def _longbench(self, place: int) -> Question:
        fields = {"length_words": self._rows[place].get("length")}
        if self._postprocess is not None:
            fields["postprocess"] = self._postprocess
        if self.rule.metric.startswith("classification"):
            fields["all_classes"] = self._rows.field(place, "all_classes")
        answers = texts_of(self._rows.field(place, "answers"))
        return Question(self._template, self._values(place, "input", "context"), answers, fields)

    def _topic(self, place: int) -> Question:
        topics = self._rows.field(place, "topics")
        if not topics:
            raise DataError(f"{self._rows.path}: row {place + 1} has no topics")
        values = self._values(place, "context", "question")
        return Question(self._template, values, [topics[0]], {"num_topics": self._rows[place]["num_topics"]})

    def _infinitebench(self, place: int) -> Question:
        values = self._values(place, "context", "input")
        values |= _drawn_out(self.subtask, values["input"])
        answers, fields = texts_of(self._rows.field(place, "answer")), {}
        if "{A}" in self._template:
            options = texts_of(self._rows.field(place, "options"))
            values |= dict(zip(_LETTERS, options))
            answers = _with_letter(answers, options, self._rows, place)
            if self.rule.metric == "word_recall_choice":
                fields = {"options": options}
        return Question(self._template, values, answers[:1] if self._first_answer else answers, fields)

    def _values(self, place: int, *names: str) -> dict[str, str]:
        return {name: str(self._rows.field(place, name)) for name in names}


def _with_letter(answers: list[str], options: list[str], rows: Rows, place: int) -> list[str]:
    """Return the right option and its letter."""
    if len(answers) == 2 and answers[1] in _LETTERS:
        return answers
    if len(answers) != 1 or answers[0] not in options[: len(_LETTERS)]:
        raise DataError(
            f"{rows.path}: the answer of row {place + 1} is not one of its options",
            found=answers,
            allowed=options,
        )
    return [answers[0], _LETTERS[options.index(answers[0])]]


def _drawn_out(subtask: str, question: str) -> dict[str, str]:
    """Return what two tasks' prompts say of the question: the function that is called, the number sought."""
    if subtask == "code_run":
        call = re.search(r"(func_[0-9]+)\(-?[0-9]+\)", question)
        if call is None:
            raise DataError("the question calls no function", found=repr(question[:80]))
        return {"func": call.group(1), "func_call": call.group()}
    if subtask == "math_find":
        sought = re.search(r"The .+ of", question)
        if sought is None:
            raise DataError("the question does not say which number is sought", found=repr(question[:80]))
        # "The largest number of the list" asks for "the largest number".
        return {"prefix": f"What is {sought.group().lower()[:-3]} in the following list?"}
    return {}
