"""Released benchmarks whose rows are whole prompts of any length: each stands in the bin that holds its tokens.

Rows are read from files or folders of JSON lines, JSON or Parquet, and counted by the model's own tokenizer. A row that
is none is left out, counted and named in a warning, and with `strict` an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import pydantic

from longspan.core.config import Config
from longspan.core.errors import DataError
from longspan.core.log import get_logger
from longspan.eval.grid import Lengths
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.released.rows import Rows
from longspan.eval.task import Planned, PromptTask

_ENDINGS = (".parquet", ".jsonl", ".json")
_MOST_CHARACTERS = 16
"""Of a token, on average: a longer text is in no bin, and is not tokenised to find that out."""


class BinnedConfig(Config):
    """Settings of a benchmark in bins."""

    lengths: Lengths = pydantic.Field("8k,16k,32k,64k,128k,256k,512k,1M", validate_default=True)
    """Upper ends of the bins in tokens, such as 8k,16k,128k; a bin begins above the one below it, the first at half of
    its end."""
    samples: pydantic.PositiveInt | None = None
    """The first so many rows of each cell. Default: all."""


class BinnedRow(NamedTuple):
    """A row of a file, with its tokens as the bins count them."""

    rows: Rows
    number: int
    tokens: int


BinnedConfigT = TypeVar("BinnedConfigT", bound=BinnedConfig)


class BinnedTask(PromptTask[BinnedConfigT]):
    """A benchmark says what of a row is counted (`texts`), its row of the grid (`place`), and what is asked (`build`).

    Raises:
        DataError: a file is missing or broken, or no row is in a bin; (`strict`) a row is none.
    """

    def __init__(
        self, settings: BinnedConfigT, form: PromptForm, files: Sequence[Path], *, strict: bool
    ) -> None:
        super().__init__(settings, form)
        self._files = {path.name: Rows(path) for path in files}
        self._rows: dict[tuple[str | int | float, ...], BinnedRow] = {}
        self._left_out = 0
        cells: dict[tuple[str | int, int], int] = {}
        for name, rows in self._files.items():
            for number in range(len(rows)):
                try:
                    row = rows[number]
                    place, texts = self.place(rows, number, row), self.texts(rows, number, row)
                except DataError as error:
                    if strict:
                        raise
                    self._left_out += 1
                    if self._left_out == 1:
                        get_logger("eval").warning(
                            "%s: rows that are left out begin with: %s", self.name, error
                        )
                    continue
                end = None if place is None else self._bin(texts)
                if place is None or end is None:
                    continue
                cell = (place, end[0])
                cells[cell] = cells.get(cell, 0) + 1
                if settings.samples is None or cells[cell] <= settings.samples:
                    self._rows[(*cell, name, number)] = BinnedRow(rows, number, end[1])
        if self._left_out:
            get_logger("eval").warning("%s: %d rows are left out", self.name, self._left_out)
        if not self._rows:
            raise DataError(
                f"no row of {self.name} is in a bin", found=f"{sum(map(len, self._files.values()))} rows"
            )

    @classmethod
    def from_config(cls, config: BinnedConfigT, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task on the rows of some files and folders."""
        return cls(config, form, _files_of(data.named("rows")), strict=data.strict)

    def texts(self, rows: Rows, number: int, row: dict[str, Any]) -> list[str]:
        """Return what the bins count of a row. Raises DataError: the row is none."""
        raise NotImplementedError

    def place(self, rows: Rows, number: int, row: dict[str, Any]) -> str | int | None:
        """Return the row of the grid; None: it is not asked for. Raises DataError: the row is none."""
        raise NotImplementedError

    def params(self) -> dict[str, Any]:
        """Return what determines the samples."""
        files = {name: rows.sha256 for name, rows in self._files.items()}
        return {**super().params(), "data_sha256": files, "left_out_records": self._left_out}

    def plan(self) -> list[Planned]:
        """Return the rows that are in a bin; a file's order is kept within a cell."""
        return [
            Planned(
                key,
                row.tokens + self._form.room(self.answer_tokens),
                fields={self.axis: key[0], "length": key[1], "sample": row.number},
            )
            for key, row in self._rows.items()
        ]

    axis: str
    """The field of a sample that the rows of the grid are."""

    def _bin(self, texts: Sequence[str]) -> tuple[int, int] | None:
        ends = sorted(self.settings.lengths)
        if sum(map(len, texts)) > _MOST_CHARACTERS * ends[-1]:
            return None
        tokens = sum(len(self._form.tokenizer.encode(text)) for text in texts)
        end = next((end for end in ends if tokens <= end), None)
        return None if end is None or tokens < ends[0] // 2 else (end, tokens)


def _files_of(paths: Sequence[str]) -> list[Path]:
    found = []
    for path in map(Path, paths):
        inside = (
            [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in _ENDINGS)
        )
        if not inside:
            raise DataError(f"{path} holds no rows", allowed=f"a file or folder of {', '.join(_ENDINGS)}")
        found += inside
    return found
