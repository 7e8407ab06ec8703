"""LongBench v2: questions of four choices on documents of up to two million words.

Rows are as in `THUDM/LongBench-v2` (data.json, or its export): `context`, `question`, `choice_A` to
`choice_D`, `answer` (a letter), `domain`, `difficulty` (easy, hard), `length` (short, medium, long). A prompt too
long loses its middle. Its two settings of one request are here: with the context, and without it. The one that reasons
first, in a request of its own, and the one with a retriever are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from longspan.core.config import Length
from longspan.core.errors import DataError
from longspan.eval.fitting import cut_prompt
from longspan.eval.released.row_task import Placed, RowsConfig, RowTask, texts_in
from longspan.eval.released.rows import Rows
from longspan.eval.summaries import mean_by
from longspan.eval.task import Built, Planned
from longspan.infer.requests import Request

_CHOICES = ("choice_A", "choice_B", "choice_C", "choice_D")
_FIELDS = ("context", "question", *_CHOICES, "answer", "domain", "difficulty", "length")
_READ = "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
_ASK = "What is the correct answer to this question: {question}\nChoices:\n"
_FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'
_READ_AND_REASON = _READ.replace("the question", "the questions")
_OMITTED = f"{_READ_AND_REASON.partition('<text>')[0]}The text is too long and omitted here.\n\n"
_REASON = "Let\u2019s think step by step:"
_CONCLUDE = "\n\nBased on the above, what is the single, most likely answer choice? "
_REASONING_TOKENS = 1024
_ALONE = "What is the single, most likely answer choice? "
_CHARACTERS_PER_TOKEN = 4


class LongBenchV2Config(RowsConfig):
    """Settings of LongBench v2."""

    no_context: bool = False
    """Leave the document out: what the model knows without it."""
    reason: bool = False
    """Reason first, in up to 1,024 tokens, and be asked for the letter in a second request without the document."""
    max_length: Length | None = None
    """Tokens of prompt and answer, such as 128k; a longer prompt loses its middle. None: nothing is cut."""

    @pydantic.model_validator(mode="after")
    def _one_setting(self) -> LongBenchV2Config:
        if self.reason and self.no_context:
            raise ValueError("`reason` and `no_context` are two settings of the benchmark: choose one")
        return self


class LongBenchV2(RowTask[LongBenchV2Config]):
    """The task; arguments are those of `RowTask`."""

    name, scorer, axes = "longbench_v2", "longbench_v2", ("difficulty", "size")
    answer_tokens = 128

    @property
    def _room(self) -> int:
        """Tokens of the answer behind the document."""
        return self._form.room(_REASONING_TOKENS if self.settings.reason else self.answer_tokens)

    def placed(self, rows: Rows, number: int, row: dict[str, Any]) -> Placed:
        """Return difficulty and size."""
        context, *_, answer, _, difficulty, size = texts_in(rows, number, *_FIELDS)
        if answer not in "ABCD" or not answer:
            raise DataError(f"{rows.path}: row {number + 1} names no choice", found=repr(answer))
        tokens = 0 if self.settings.no_context else len(context) // _CHARACTERS_PER_TOKEN
        if self.settings.max_length is not None:
            tokens = min(tokens, self.settings.max_length - self._room)
        return Placed((difficulty, size), tokens)

    def build(self, planned: Planned) -> Built:
        """Return the question with its choices behind the document."""
        row = self._rows[planned.key].values
        letters = "".join(f"({name[-1]}) {row[name].strip()}\n" for name in _CHOICES)
        asked = f"{_ASK.format(question=row['question'].strip())}{letters}\n"
        read = _READ_AND_REASON if self.settings.reason else _READ
        text = "" if self.settings.no_context else read.format(context=row["context"].strip())
        end = _REASON if self.settings.reason else _FORMAT
        prompt = text + asked + (_ALONE + end if self.settings.no_context else end)
        removed = 0
        if self.settings.max_length is not None:
            room = self.settings.max_length - self._room
            prompt, removed = cut_prompt(prompt, self._form, room)
        first = _REASONING_TOKENS if self.settings.reason else self.answer_tokens
        request = self._form.request(prompt, max_new_tokens=first)
        assert request.prompt_ids is not None
        fields = {
            "question": row["question"],
            "category": row["domain"],
            "achieved_length": len(request.prompt_ids),
            "truncated": removed,
        }

        def conclude(reasoning: str) -> Request:
            said = f"{_OMITTED}{asked}{_REASON} {reasoning.strip()}{_CONCLUDE}{_FORMAT}"
            return self._form.request(said, max_new_tokens=self.answer_tokens)

        return Built(request, fields, row["answer"], conclude if self.settings.reason else None)

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the means of LongBench v2's table, by difficulty and by size, and those of its domains."""
        return {
            **super().summary(samples),
            "by_difficulty": mean_by(samples, "difficulty"),
            "by_size": mean_by(samples, "size"),
            "by_category": mean_by([sample for sample in samples if "category" in sample], "category"),
            "truncated": sum(bool(sample.get("truncated")) for sample in samples),
        }
