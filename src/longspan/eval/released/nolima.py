"""NoLiMa: a needle that shares no word with its question lies in a book; what they have in common is to be inferred.

    DATA/needlesets/needle_set.json        needle, questions, tests, character_set or gold_answers, ...
    DATA/haystack/rand_shuffle/*.txt       books of shuffled snippets

Files are as in the data set `amodaresi/NoLiMa`. A needle stands at the first line break at or behind its depth, in a
haystack of so many tokens by the model's own tokenizer; names are drawn as the released code does (a seed for each
needle and book). Different here: books are taken in the order of their names, where theirs is that of the folder, and a
haystack is cut at characters, where theirs decodes halves of some.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import pydantic

from longspan.core.config import Commas, Config
from longspan.core.errors import DataError
from longspan.core.files import sha256_bytes
from longspan.data.tokenizer import Tokenizer
from longspan.eval.grid import Lengths
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.released.row_task import files_of
from longspan.eval.task import Built, Planned, PromptTask

_SYSTEM = "You are a helpful assistant"
_SEED = 42
_NAME = "{CHAR}"
_FREE_ZONE = 0.2
"""Part of the haystack, before and behind a needle, that holds no distractor."""
_SHORT = 500


class NolimaConfig(Config):
    """Settings of NoLiMa."""

    lengths: Lengths = pydantic.Field("250,500,1000,2000,4000,8000,16000,32000", validate_default=True)
    """Tokens of the haystack, needle and question not counted."""
    num_depths: pydantic.PositiveInt = 26
    """Depths from 0 to 1, at equal distances."""
    questions: Annotated[tuple[str, ...], Commas] = ("onehop", "twohop")
    """Kinds of question; those of a literal match (direct) are not part of the published means."""
    metric: Literal["contains_exactly", "last_line_contains", "exact_match"] = "contains_exactly"
    """How answers are scored; the sets that ask for reasoning first by their last line."""
    template: str | None = None
    """File with the prompt of needle sets that have none of their own, `{haystack}` and `{question}` in it: that of the
    released configuration makes the published prompts. None: such sets are refused."""
    samples: pydantic.PositiveInt | None = None
    """The first so many depths of each needle, question and book, for a trial. Default: all."""


class _Test(NamedTuple):
    """A needle with its question, for one book."""

    key: tuple[str, str, str]
    """Needle, test, book."""
    kind: str
    needle: str
    question: str
    distractor: str | None
    answers: list[str]
    names: list[str]
    template: str
    seed: int


class Book:
    """A haystack, tokenised once."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self.text, self._tokenizer = text, tokenizer

    @cached_property
    def _offsets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = self._tokenizer.encode_with_offsets(self.text)
        starts, ends = np.asarray(found.starts), np.asarray(found.ends)
        breaks = [n for n, (start, end) in enumerate(zip(starts, ends)) if "\n" in self.text[start:end]]
        return starts, ends, np.array([0, *breaks])

    def placed(self, needle: str, length: int, depth: float) -> str:
        """Return `length` tokens of the book with a needle on a line of its own.

        Raises:
            DataError: the book is too short.
        """
        starts, ends, breaks = self._offsets
        far = breaks / (length + 1) - depth
        far[far < 0] = np.inf
        place = int(breaks[int(np.argmin(far))])
        first = place - round(length * depth)
        if first < 0 or first + length > len(ends):
            raise DataError(f"a book of {len(ends):,} tokens holds no haystack of {length:,}")
        before = self.text[int(starts[first]) : int(ends[place])]
        behind = self.text[int(ends[place]) : int(ends[first + length - 1])]
        line = max(before.rfind("\n"), 0)
        return f"{before[:line]} {needle}\n{behind}"


class Nolima(PromptTask[NolimaConfig]):
    """The task.

    Args:
        needles: a released needle set.
        books: haystacks by name.

    Raises:
        DataError: the needle set is none, or holds no question of the wanted kinds.
    """

    name, scorer = "nolima", "by_metric"
    answer_tokens = 192

    def __init__(
        self,
        settings: NolimaConfig,
        form: PromptForm,
        needles: Sequence[Mapping[str, Any]],
        books: Mapping[str, str],
    ) -> None:
        super().__init__(settings, form)
        template = None if settings.template is None else _read_template(settings.template)
        self._sha256 = sha256_bytes(json.dumps([needles, books, template]).encode())
        self._books = {name: Book(text, form.tokenizer) for name, text in books.items()}
        try:
            tests = [
                test for number, name in enumerate(books) for test in _tests(needles, name, number, template)
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                "this is no needle set of NoLiMa", found=f"{type(error).__name__}: {error}"
            ) from None
        self._tests = {test.key: test for test in tests if test.kind in settings.questions}
        if not self._tests:
            raise DataError(
                "the needle set holds no such questions", found=sorted({test.kind for test in tests})
            )

        if any(not test.template for test in self._tests.values()):
            raise DataError(
                "the needle set has no prompt of its own",
                fix="--template FILE: a text with {haystack} and {question}, as in the released configuration",
            )

    @classmethod
    def from_config(cls, config: NolimaConfig, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task on a needle set (JSON) and books (text). Raises DataError: one of both is missing."""
        files = files_of(data.named("needle sets and books"), (".json", ".txt"))
        sets = [path for name, path in files.items() if name.endswith(".json")]
        books = {Path(name).stem: path for name, path in sorted(files.items()) if name.endswith(".txt")}
        if not books or not sets:
            raise DataError("NoLiMa needs books (.txt) and a needle set (.json)", found=", ".join(files))
        if len(sets) > 1:
            chosen = [path for path in sets if path.name == "needle_set.json"]
            if len(chosen) != 1:
                raise DataError(
                    "several needle sets are there", found=", ".join(map(str, sets)), fix="name one of them"
                )
            sets = chosen
        try:
            needles = json.loads(sets[0].read_text(encoding="utf-8"))
            texts = {name: path.read_text(encoding="utf-8") for name, path in books.items()}
        except ValueError as error:
            raise DataError(f"{sets[0]} or a book cannot be read", found=str(error)) from None
        return cls(config, form, needles, texts)

    def params(self) -> dict[str, Any]:
        """Return what determines the samples."""
        # Of the template its text counts, not where it stands.
        return {**super().params(), "template": None, "data_sha256": self._sha256}

    def plan(self) -> list[Planned]:
        """Return a sample for each needle, question, book, length and depth."""
        numbers = range(min(self.settings.num_depths, self.settings.samples or self.settings.num_depths))
        return [
            Planned(
                (*key, length, number),
                length + 256 + self._form.room(self.answer_tokens),
                fields={
                    "question_type": test.kind,
                    "length": length,
                    "depth": self._depths[number],
                    "haystack": key[2],
                    "metric": self.settings.metric,
                },
            )
            for length in self.settings.lengths
            for key, test in self._tests.items()
            for number in numbers
        ]

    @cached_property
    def _depths(self) -> list[float]:
        return [float(depth) / 100 for depth in np.linspace(0, 100, self.settings.num_depths)]

    def build(self, planned: Planned) -> Built:
        """Compose one sample. Raises DataError: the book is too short."""
        length, number = int(planned.key[-2]), int(planned.key[-1])
        test = self._tests[str(planned.key[0]), str(planned.key[1]), str(planned.key[2])]
        depth = self._depths[number]
        name, at = self._drawn(test, length, number)
        needle, question = (text.replace(_NAME, name) for text in (test.needle, test.question))
        text = self._books[test.key[2]].placed(needle, length, depth)
        if test.distractor is not None:
            text = self._distracted(text, test, length, at)
        prompt = test.template.format(haystack=text, question=question)
        turns = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}]
        if self._form.takes_turns:
            request = self._form.conversation(turns, max_new_tokens=self.answer_tokens)
        else:
            request = self._form.request(prompt, max_new_tokens=self.answer_tokens)
        assert request.prompt_ids is not None
        fields = {"question": question, "needle": needle, "achieved_length": len(request.prompt_ids)}
        return Built(request, fields, [name] if name else test.answers)

    def _drawn(self, test: _Test, length: int, number: int) -> tuple[str, float]:
        """Return the name of a needle, and where its distractor lies: all depths before it are drawn too."""
        draw, name, at = np.random.RandomState(test.seed), "", 0.0
        for depth in self._depths[: number + 1]:
            if test.names:
                name = str(draw.choice(test.names))
            if test.distractor is not None:
                left, right = max(0.0, depth - 2 * _FREE_ZONE), max(0.0, 1 - (depth + 2 * _FREE_ZONE))
                at = draw.uniform(0, left + right)
                at = depth + _FREE_ZONE + (at - left) if at > left else at + _FREE_ZONE
                if length < _SHORT:
                    at = 0.7 if depth < 0.6 else 0.6 if depth > 0.75 else 0.5
        return name, at

    def _distracted(self, text: str, test: _Test, length: int, depth: float) -> str:
        """Return a haystack with a distractor where that one would lie alone. Raises DataError: it has no place."""
        assert test.distractor is not None
        around, back = (50, 49) if length >= _SHORT else (25, 23)
        alone = self._books[test.key[2]].placed(test.distractor, length, depth)
        place = alone.index(test.distractor)
        before = alone[max(place - around, 0) : place - 1]
        if text.count(before) != 1:
            raise DataError(
                "the text before the distractor does not stand once in the haystack", found=repr(before)
            )
        place = text.index(before) + back
        return f"{text[:place]} {test.distractor}\n{text[place:]}"


def _read_template(path: str) -> str:
    """Read the prompt of a needle set. Raises DataError: it is none."""
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"the template {path} cannot be read", found=str(error)) from None
    missing = [mark for mark in ("{haystack}", "{question}") if mark not in template]
    if missing:
        raise DataError(f"the template {path} has no place for {' and '.join(missing)}")
    try:
        template.format(haystack="", question="")
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"the template {path} has braces that are no place", found=str(error)) from None
    return template


def _tests(
    needles: Sequence[Mapping[str, Any]], book: str, number: int, template: str | None
) -> Iterator[_Test]:
    for each in needles:
        for kind, asked in each["questions"].items():
            for name, test in each["tests"].items():
                needle, question, distractor = each["needle"], asked, None
                for place, value in enumerate(test["input_args"], 1):
                    mark = f"{{{place}}}"
                    if mark in asked:  # as published: of several the last one is put in
                        question = asked.replace(mark, value)
                    needle = needle.replace(mark, value)
                    if mark in each.get("distractors", {}).get(kind, ""):
                        distractor = each["distractors"][kind].replace(mark, value)
                names = each.get("character_set") or []
                yield _Test(
                    (each["id"], f"{name}_{kind}", book),
                    kind,
                    needle,
                    question,
                    distractor,
                    [] if _NAME in needle else list(test["gold_answers"]),
                    names if _NAME in needle else [],
                    each.get("task_template", template) or "",
                    _SEED + int(each["id"][:4]) + number,
                )
