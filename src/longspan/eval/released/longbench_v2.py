"""LongBench v2: questions of four choices on documents of up to two million words.

Rows are as in `THUDM/LongBench-v2` (data.json, or its export): `context`, `question`, `choice_A` to
`choice_D`, `answer` (a letter), `domain`, `difficulty` (easy, hard), `length` (short, medium, long). A prompt too
long loses its middle. Its two settings of one request are here: with the context, and without it. The one that reasons
first, in a request of its own, and the one with a retriever are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspan.core.config import Length
from longspan.core.errors import DataError
from longspan.eval.fitting import cut_prompt
from longspan.eval.released.row_task import Placed, RowsConfig, RowTask, texts_in
from longspan.eval.released.rows import Rows
from longspan.eval.summaries import mean_by
from longspan.eval.task import Built, Planned

_CHOICES = ("choice_A", "choice_B", "choice_C", "choice_D")
_FIELDS = ("context", "question", *_CHOICES, "answer", "domain", "difficulty", "length")
_READ = "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
_ASK = "What is the correct answer to this question: {question}\nChoices:\n"
_FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'
_ALONE = "What is the single, most likely answer choice? "
_CHARACTERS_PER_TOKEN = 4


class LongBenchV2Config(RowsConfig):
    """Settings of LongBench v2."""

    no_context: bool = False
    """Leave the document out: what the model knows without it."""
    max_length: Length | None = None
    """Tokens of prompt and answer, such as 128k; a longer prompt loses its middle. None: nothing is cut."""


class LongBenchV2(RowTask[LongBenchV2Config]):
    """The task; arguments are those of `RowTask`."""

    name, scorer, axes = "longbench_v2", "longbench_v2", ("difficulty", "size")
    answer_tokens = 128

    def placed(self, rows: Rows, number: int, row: dict[str, Any]) -> Placed:
        """Return difficulty and size."""
        context, *_, answer, _, difficulty, size = texts_in(rows, number, *_FIELDS)
        if answer not in "ABCD" or not answer:
            raise DataError(f"{rows.path}: row {number + 1} names no choice", found=repr(answer))
        tokens = 0 if self.settings.no_context else len(context) // _CHARACTERS_PER_TOKEN
        if self.settings.max_length is not None:
            tokens = min(tokens, self.settings.max_length - self._form.room(self.answer_tokens))
        return Placed((difficulty, size), tokens)

    def build(self, planned: Planned) -> Built:
        """Return the question with its choices behind the document."""
        row = self._rows[planned.key].values
        letters = "".join(f"({name[-1]}) {row[name].strip()}\n" for name in _CHOICES)
        prompt = _ASK.format(question=row["question"].strip()) + f"{letters}\n"
        if self.settings.no_context:
            prompt += _ALONE + _FORMAT
        else:
            prompt = _READ.format(context=row["context"].strip()) + prompt + _FORMAT
        removed = 0
        if self.settings.max_length is not None:
            room = self.settings.max_length - self._form.room(self.answer_tokens)
            prompt, removed = cut_prompt(prompt, self._form, room)
        request = self._form.request(prompt, max_new_tokens=self.answer_tokens)
        assert request.prompt_ids is not None
        fields = {
            "question": row["question"],
            "category": row["domain"],
            "achieved_length": len(request.prompt_ids),
            "truncated": removed,
        }
        return Built(request, fields, row["answer"])

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the means of LongBench v2's table, by difficulty and by size, and those of its domains."""
        return {
            **super().summary(samples),
            "by_difficulty": mean_by(samples, "difficulty"),
            "by_size": mean_by(samples, "size"),
            "by_category": mean_by([sample for sample in samples if "category" in sample], "category"),
            "truncated": sum(bool(sample.get("truncated")) for sample in samples),
        }
