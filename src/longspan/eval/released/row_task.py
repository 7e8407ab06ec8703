"""Benchmarks whose released files hold a row for each question: rows are placed in a grid, and asked.

Rows are read from files or folders of JSON lines, JSON or Parquet. A row that is none is left out, counted and named in
a warning, and with `strict` an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import pydantic

from longspan.core.config import Config
from longspan.core.errors import DataError
from longspan.core.log import get_logger
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.released.rows import Rows
from longspan.eval.task import Planned, PromptTask

_ENDINGS = (".parquet", ".jsonl", ".json")


class RowsConfig(Config):
    """Settings of a benchmark of rows."""

    samples: pydantic.PositiveInt | None = None
    """The first so many rows of each cell. Default: all."""


class Placed(NamedTuple):
    """Where a row stands."""

    cell: tuple[str | int, ...]
    """Its values on the axes of the task."""
    tokens: int
    """About how long its prompt is."""


class FoundRow(NamedTuple):
    """A row of a file, with its tokens as `Placed` has them."""

    rows: Rows
    number: int
    tokens: int

    @property
    def values(self) -> dict[str, Any]:
        """The row itself."""
        row: dict[str, Any] = self.rows[self.number]
        return row


RowsConfigT = TypeVar("RowsConfigT", bound=RowsConfig)


class RowTask(PromptTask[RowsConfigT]):
    """A benchmark says where a row stands (`placed`) and what it asks (`build`).

    Args:
        files: by the names that records know them by.

    Raises:
        DataError: a file is missing or broken, or no row is asked; (`strict`) a row is none.
    """

    axes: tuple[str, ...]
    """The fields of a sample that `Placed.cell` holds."""

    def __init__(
        self, settings: RowsConfigT, form: PromptForm, files: Mapping[str, Path], *, strict: bool
    ) -> None:
        super().__init__(settings, form)
        self._files: dict[str, Rows] = {}
        self._rows: dict[tuple[str | int | float, ...], FoundRow] = {}
        self._left_out = 0
        cells: dict[tuple[str | int, ...], int] = {}
        for name, path in files.items():
            if not self.reads(name):
                continue
            rows = self._files[name] = Rows(path)
            for number in range(len(rows)):
                placed = self._placed(rows, number, strict=strict)
                if placed is None:
                    continue
                cells[placed.cell] = cells.get(placed.cell, 0) + 1
                if settings.samples is None or cells[placed.cell] <= settings.samples:
                    self._rows[(*placed.cell, name, number)] = FoundRow(rows, number, placed.tokens)
        if self._left_out:
            get_logger("eval").warning("%s: %d rows are left out", self.name, self._left_out)
        if not self._rows:
            count = sum(map(len, self._files.values()))
            raise DataError(
                f"no row of {self.name} is asked", found=f"{count} rows in {len(self._files)} files"
            )

    @classmethod
    def from_config(cls, config: RowsConfigT, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task on the rows of some files and folders."""
        return cls(config, form, files_of(data.named("rows")), strict=data.strict)

    def reads(self, name: str) -> bool:
        """Return whether a file is one of this benchmark with these settings, by its name."""
        return True

    def placed(self, rows: Rows, number: int, row: dict[str, Any]) -> Placed | None:
        """Return where a row stands; None: it is not asked for. Raises DataError: the row is none."""
        raise NotImplementedError

    def params(self) -> dict[str, Any]:
        """Return what determines the samples."""
        files = {name: rows.sha256 for name, rows in self._files.items()}
        return {**super().params(), "data_sha256": files, "left_out_records": self._left_out}

    def plan(self) -> list[Planned]:
        """Return the rows that are asked; a file's order is kept within a cell."""
        return [
            Planned(
                key,
                row.tokens + self._form.room(self.answer_tokens),
                fields={**dict(zip(self.axes, key)), "sample": row.number},
            )
            for key, row in self._rows.items()
        ]

    def _placed(self, rows: Rows, number: int, *, strict: bool) -> Placed | None:
        try:
            return self.placed(rows, number, rows[number])
        except DataError as error:
            if strict:
                raise
            self._left_out += 1
            if self._left_out == 1:
                get_logger("eval").warning("%s: rows that are left out begin with: %s", self.name, error)
            return None


def texts_in(rows: Rows, number: int, *names: str) -> list[str]:
    """Return fields of a row that have to be texts. Raises DataError: one is missing, or none."""
    found = [rows.field(number, name) for name in names]
    for name, value in zip(names, found):
        if not isinstance(value, str):
            raise DataError(f"{rows.path}: row {number + 1} has no text {name!r}", found=type(value).__name__)
    return found


def files_of(paths: Sequence[str], endings: Sequence[str] = _ENDINGS) -> dict[str, Path]:
    """Return the files of some files and folders, by name; in a folder by their place in it. Raises DataError."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        inside = (
            [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in endings)
        )
        if not inside:
            raise DataError(f"{path} holds no rows", allowed=f"a file or folder of {', '.join(endings)}")
        for each in inside:
            name = each.name if each == path else each.relative_to(path).as_posix()
            if found.setdefault(name, each) != each:
                raise DataError("two files have one name", found=f"{found[name]}, {each}")
    return found
