"""BABILong: the facts of a bAbI story hidden among the sentences of books, and a question on them.

Rows are as in the data sets `RMT-team/babilong` and `babilong-1k-samples`: `input`, `question`, `target`; task and
length stand in the name of a file or of its folder (data/qa1/4k.json, 4k/qa1-00000-of-00001.parquet).

The instructions and examples of the published scores are read from the released `babilong/prompts.py` (`prompts`; it is
parsed as data, never run). Without them the prompt is context and question alone, which is a published setting too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic

from longspan.core.config import Commas
from longspan.core.errors import DataError
from longspan.core.files import sha256_bytes
from longspan.core.log import get_logger
from longspan.eval.metrics_babilong import LABELS
from longspan.eval.prompts import PromptForm
from longspan.eval.released.literals import literals_in
from longspan.eval.released.row_task import Placed, RowsConfig, RowTask, texts_in
from longspan.eval.released.rows import Rows
from longspan.eval.task import Built, Planned

_PARTS = ("instruction", "examples", "post_prompt")
_TASK, _LENGTH = re.compile(r"(?<![a-z])qa\d+"), re.compile(r"(?<![0-9a-zA-Z])(\d+)(k|M)(?![a-zA-Z])")
_UNITS = {"k": 1024, "M": 1024**2}
_FACTS_ALONE = 256
"""Where 0k stands on an axis of lengths: the facts alone have about so many tokens."""
_CHARACTERS_PER_TOKEN = 4


class BabilongConfig(RowsConfig):
    """Settings of BABILong."""

    lengths: Annotated[tuple[str, ...], Commas] = ()
    """Lengths by name, such as 0k,4k,128k; 0k are the facts alone. Default: all that the files hold."""
    subtasks: Annotated[tuple[str, ...], Commas] = ("qa1", "qa2", "qa3", "qa4", "qa5")
    """Tasks, qa1 to qa20; published means are over the first five."""
    prompts: Path | None = None
    """The released babilong/prompts.py. None: context and question alone."""

    @pydantic.field_validator("subtasks")
    @classmethod
    def _are_known(cls, subtasks: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in subtasks if name not in LABELS]:
            raise ValueError(f"there is no {', '.join(unknown)}; there are qa1 to qa20")
        return subtasks


class Babilong(RowTask[BabilongConfig]):
    """The task; arguments are those of `RowTask`."""

    name, scorer, axes = "babilong", "babilong", ("subtask", "length")
    answer_tokens = 20

    def __init__(self, settings: BabilongConfig, form: PromptForm, *arguments: Any, **options: Any) -> None:
        self._prompts = {} if settings.prompts is None else read_prompts(settings.prompts)
        if missing := [name for name in settings.subtasks if self._prompts and name not in self._prompts]:
            raise DataError(f"{settings.prompts} holds no prompt of {', '.join(missing)}")
        if settings.prompts is None:
            get_logger("eval").warning(
                "babilong: without --prompts (the released prompts.py) no instruction and no example stands before "
                "the context: most published scores have both"
            )
        super().__init__(settings, form, *arguments, **options)

    def params(self) -> dict[str, Any]:
        """Return what determines the samples; the prompts by their content."""
        asked = {name: self._prompts.get(name) for name in self.settings.subtasks}
        return {
            **super().params(),
            "prompts": sha256_bytes(repr(asked).encode())[:16] if self._prompts else None,
        }

    def reads(self, name: str) -> bool:
        """Return whether a file is of a task and length that are asked."""
        subtask, length = place_of(name)
        return subtask in self.settings.subtasks and (
            not self.settings.lengths or length in self.settings.lengths
        )

    def placed(self, rows: Rows, number: int, row: dict[str, Any]) -> Placed:
        """Return task and length, which are those of the file."""
        context, *_ = texts_in(rows, number, "input", "question", "target")
        subtask, length = place_of("/".join(rows.path.parts[-3:]))
        tokens = int(length[:-1]) * _UNITS[length[-1]] or _FACTS_ALONE
        return Placed((subtask, tokens), len(context) // _CHARACTERS_PER_TOKEN)

    def build(self, planned: Planned) -> Built:
        """Return the question behind the context, and the instructions before it."""
        row = self._rows[planned.key].values
        head = self._prompts.get(str(planned.key[0]), dict.fromkeys(_PARTS, ""))
        body = f"<context>\n{row['input'].strip()}\n</context>\n\nQuestion: {row['question']}"
        prompt = "\n\n".join((*(head[part] for part in _PARTS), body)).strip()
        request = self._form.request(prompt, max_new_tokens=self.answer_tokens)
        assert request.prompt_ids is not None
        fields = {"question": row["question"], "achieved_length": len(request.prompt_ids)}
        return Built(request, fields, row["target"])


def place_of(name: str) -> tuple[str, str]:
    """Return task and length that the name of a file says; empty where it does not."""
    subtasks, lengths = _TASK.findall(name), _LENGTH.findall(name)
    return (subtasks[-1] if subtasks else "", "".join(lengths[-1]) if lengths else "")


def read_prompts(path: Path) -> Mapping[str, Mapping[str, str]]:
    """Return instruction, examples and post_prompt of each task from a Python file, which is not run.

    Raises:
        DataError: the file cannot be read, or assigns no such texts to DEFAULT_PROMPTS.
    """
    allowed = "the released babilong/prompts.py"
    found = literals_in(path, ["DEFAULT_PROMPTS"], allowed=allowed)["DEFAULT_PROMPTS"]
    try:
        if not found or not all(isinstance(each[part], str) for each in found.values() for part in _PARTS):
            raise ValueError("its DEFAULT_PROMPTS are none")
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} holds no prompts of BABILong", found=f"{type(error).__name__}: {error}", allowed=allowed
        ) from None
    return {name: {part: each[part] for part in _PARTS} for name, each in found.items()}
