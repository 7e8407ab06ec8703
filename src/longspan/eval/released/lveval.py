"""LV-Eval: questions on texts of 16K to 256K words in two languages, among confusing facts, with replaced names.

    DATA/hotpotwikiqa_mixup_16k.jsonl      input, context, answers, answer_keywords

Rows are as in the data set `infini-ai/LVEval`; data set and length stand in the name of a file. Prompts, room
for answers and metrics are data (lveval.yaml). A prompt that is too long loses its middle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any

import pydantic

from longspan.core.config import Commas, Length
from longspan.core.errors import DataError
from longspan.eval.fitting import cut_prompt
from longspan.eval.released.longllm import read_settings
from longspan.eval.released.row_task import Placed, RowsConfig, RowTask, texts_in
from longspan.eval.released.rows import Rows
from longspan.eval.summaries import mean_by
from longspan.eval.task import Built, Planned

_NAME = re.compile(r"(\w+?)_(\d+)k(?![0-9a-zA-Z])")


@cache
def rules() -> Mapping[str, Mapping[str, Any]]:
    """Return how each data set is asked and scored."""
    found: Mapping[str, Mapping[str, Any]] = read_settings("lveval.yaml")["datasets"]
    return found


class LvEvalConfig(RowsConfig):
    """Settings of LV-Eval."""

    lengths: Annotated[tuple[int, ...], Commas] = (16, 32, 64, 128, 256)
    """Thousands of words (of characters in Chinese), such as 16,32."""
    subtasks: Annotated[tuple[str, ...], Commas] = ()
    """Data sets, such as hotpotwikiqa_mixup. Default: all that the files hold."""
    max_length: Length | None = None
    """Tokens of prompt and answer; a longer prompt loses its middle. None: nothing is cut."""

    @pydantic.field_validator("subtasks")
    @classmethod
    def _are_known(cls, subtasks: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in subtasks if name not in rules()]:
            raise ValueError(f"there is no {', '.join(unknown)}; there are {', '.join(rules())}")
        return subtasks


class LvEval(RowTask[LvEvalConfig]):
    """The task; arguments are those of `RowTask`."""

    name, scorer, axes = "lveval", "by_metric", ("subtask", "length")
    answer_tokens = 64

    def reads(self, name: str) -> bool:
        """Return whether a file is of a data set and length that are asked."""
        subtask, length = _place(name)
        return subtask in (self.settings.subtasks or rules()) and length in self.settings.lengths

    def placed(self, rows: Rows, number: int, row: dict[str, Any]) -> Placed:
        """Return data set and length, which are those of the file."""
        context, _ = texts_in(rows, number, "context", "input")
        answers = rows.field(number, "answers")
        if not isinstance(answers, list) or not answers or not isinstance(answers[0], str):
            raise DataError(f"{rows.path}: row {number + 1} has no answers", found=repr(answers)[:80])
        subtask, length = _place(rows.path.name)
        tokens = len(context) // 4
        if self.settings.max_length is not None:
            tokens = min(tokens, self.settings.max_length - self._form.room(self.answer_tokens))
        return Placed((subtask, 1000 * length), tokens)

    def build(self, planned: Planned) -> Built:
        """Return the question behind the text. Of several answers the first counts."""
        row, rule = self._rows[planned.key].values, rules()[str(planned.key[0])]
        prompt = rule["prompt"].format(context=row["context"], input=row["input"])
        removed = 0
        if self.settings.max_length is not None:
            room = self.settings.max_length - self._form.room(rule["max_new_tokens"])
            prompt, removed = cut_prompt(prompt, self._form, room)
        request = self._form.request(prompt, max_new_tokens=rule["max_new_tokens"])
        assert request.prompt_ids is not None
        fields = {
            "question": row["input"],
            "metric": rule["metric"],
            "category": rule["kind"],
            "answer_keywords": row.get("answer_keywords") or None,
            "achieved_length": len(request.prompt_ids),
            "truncated": removed,
        }
        return Built(request, fields, row["answers"][:1])

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the means by data set and length, and of each kind: means over its data sets' means."""
        kinds: dict[tuple[str, int], list[float]] = {}
        rows = mean_by(samples, "subtask", "length")
        for row in rows:
            if row["mean"] is not None:
                kinds.setdefault((rules()[row["subtask"]]["kind"], row["length"]), []).append(row["mean"])
        by_kind = [
            {"kind": kind, "length": length, "sets": len(means), "mean": sum(means) / len(means)}
            for (kind, length), means in sorted(kinds.items())
        ]
        return {"cells": rows, "by_kind": by_kind}


def _place(name: str) -> tuple[str, int]:
    found = _NAME.search(name.rsplit("/", 1)[-1])
    return (found[1], int(found[2])) if found else ("", 0)
