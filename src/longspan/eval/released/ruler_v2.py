"""RULERv2: needles and questions at four levels of difficulty, from the rows that its own generators have prepared.

    DATA/mk_niah_basic/test.jsonl      question, expected_answer          and so on, a folder for each task

`ns prepare_data ruler2` of NeMo-Skills writes these folders for a tokenizer and a length; the prompt is a row's
question. A row stands in the bin that holds the tokens of its prompt by the model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pydantic

from longspan.core.config import Commas
from longspan.core.errors import DataError
from longspan.eval.metrics_ruler_v2 import SUBTASKS
from longspan.eval.released.binned import BinnedConfig, BinnedTask
from longspan.eval.released.row_task import texts_in
from longspan.eval.released.rows import Rows
from longspan.eval.summaries import mean_by, means_of_means
from longspan.eval.task import Built, Planned


class RulerV2Config(BinnedConfig):
    """Settings of RULERv2."""

    subtasks: Annotated[tuple[str, ...], Commas] = SUBTASKS
    """What is asked for, of the folders that are there."""

    @pydantic.field_validator("subtasks")
    @classmethod
    def _are_known(cls, subtasks: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in subtasks if name not in SUBTASKS]:
            raise ValueError(f"there is no {', '.join(unknown)}; there are {', '.join(SUBTASKS)}")
        return subtasks


class RulerV2(BinnedTask[RulerV2Config]):
    """The task; arguments are those of `RowTask`."""

    name, scorer, axes = "ruler_v2", "ruler_v2", ("subtask", "length")
    answer_tokens = 16384

    def reads(self, name: str) -> bool:
        """Return whether a file holds rows that are asked: its folder is named as the task."""
        folder, _, file = name.rpartition("/")
        return file == "test.jsonl" and folder.rsplit("/", 1)[-1] in self.settings.subtasks

    def place(self, rows: Rows, number: int, row: dict[str, Any]) -> str:
        """Return the task, which is the folder's name."""
        return rows.path.parent.name

    def texts(self, rows: Rows, number: int, row: dict[str, Any]) -> list[str]:
        """Return the prompt."""
        _answers(rows, number)
        return texts_in(rows, number, "question")

    def build(self, planned: Planned) -> Built:
        """Return the prompt of a row as the message of a user."""
        found = self._rows[planned.key]
        prompt = str(found.values["question"])
        request = self._form.request(prompt, max_new_tokens=self.answer_tokens)
        fields = {"question": prompt[-400:], "achieved_length": found.tokens}
        return Built(request, fields, _answers(found.rows, found.number))

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the means by task and length, and of each length over its tasks' means, as published."""
        cells = mean_by(samples, "subtask", "length")
        return {"cells": cells, "averages": means_of_means(cells, by="length")}


def _answers(rows: Rows, number: int) -> list[str]:
    found = rows.field(number, "expected_answer")
    answers = found if isinstance(found, list) else [found]
    if not answers or not all(isinstance(each, str) and each for each in answers):
        raise DataError(f"{rows.path}: row {number + 1} has no expected answer", found=repr(found)[:80])
    return answers
