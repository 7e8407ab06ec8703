"""MRCR: in a long conversation the same was asked for 2, 4 or 8 times; one of the answers is wanted, word for word.

Rows are as in the data set `openai/mrcr`: `prompt` (the turns as JSON), `answer`, `random_string_to_prepend`,
`n_needles`. The answer has to begin with the drawn string; its score is then difflib's ratio (`mrcr_ratio`). Bins hold
the tokens of all turns and of the answer.
"""

from __future__ import annotations

import json
from typing import Any

from longspan.core.errors import DataError
from longspan.eval.released.binned import DatedConfig, DatedTask, date_of
from longspan.eval.released.row_task import texts_in
from longspan.eval.released.rows import Rows
from longspan.eval.task import Built, Planned


class MrcrConfig(DatedConfig):
    """Settings of MRCR."""

    needles: tuple[int, ...] = (2, 4, 8)
    """How often the same was asked for, of the rows that are asked."""


class Mrcr(DatedTask[MrcrConfig]):
    """The task; arguments are those of `RowTask`."""

    name, scorer, axes = "mrcr", "mrcr_ratio", ("num_needles", "length")
    answer_tokens = 2048

    def place(self, rows: Rows, number: int, row: dict[str, Any]) -> int | None:
        """Return how often the same was asked for."""
        count = rows.field(number, "n_needles")
        return int(count) if count in self.settings.needles else None

    def texts(self, rows: Rows, number: int, row: dict[str, Any]) -> list[str]:
        """Return the turns and the answer."""
        answer, _ = texts_in(rows, number, "answer", "random_string_to_prepend")
        return [*(turn["content"] for turn in _turns(rows, number)), answer]

    def build(self, planned: Planned) -> Built:
        """Return the conversation of a row, to be continued."""
        found = self._rows[planned.key]
        row, turns = found.values, _turns(found.rows, found.number)
        request = self._form.conversation(turns, max_new_tokens=self.answer_tokens)
        fields = {
            "question": turns[-1]["content"],
            "random_string_to_prepend": row["random_string_to_prepend"],
            "achieved_length": found.tokens,
            "date_added": date_of(row) or None,
        }
        return Built(request, fields, row["answer"])


def _turns(rows: Rows, number: int) -> list[dict[str, str]]:
    prompt = rows.field(number, "prompt")
    try:
        turns = json.loads(prompt) if isinstance(prompt, str) else prompt
        found = [{"role": str(turn["role"]), "content": turn["content"]} for turn in turns]
        if not found or not all(isinstance(turn["content"], str) for turn in found):
            raise ValueError("no turn, or one that is not text")
    except (ValueError, TypeError, LookupError) as error:
        where = f"{rows.path}: row {number + 1} holds no conversation"
        raise DataError(where, found=f"{type(error).__name__}: {error}") from None
    return found
