"""Released benchmarks whose rows are whole prompts of any length: each stands in the bin that holds its tokens.

Tokens are counted by the model's own tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

from longspan.core.config import Commas
from longspan.core.log import get_logger
from longspan.eval.grid import Lengths
from longspan.eval.prompts import PromptForm
from longspan.eval.released.row_task import Placed, RowsConfig, RowTask
from longspan.eval.released.rows import Rows

_MOST_CHARACTERS = 16
"""Of a token, on average: a longer text is in no bin, and is not tokenised to find that out."""


class BinnedConfig(RowsConfig):
    """Settings of a benchmark in bins."""

    lengths: Lengths = pydantic.Field("8k,16k,32k,64k,128k,256k,512k,1M", validate_default=True)
    """Upper ends of the bins in tokens, such as 8k,16k,128k; a bin begins above the one below it, the first at half of
    its end."""


class DatedConfig(BinnedConfig):
    """Settings of a benchmark that was revised: its rows say since when they belong to it."""

    added: Annotated[tuple[str, ...], Commas] = ()
    """Rows of these dates alone (`date_added`), such as 04-12-2025: published scores are of the rows of their time.
    Default: all."""


BinnedConfigT = TypeVar("BinnedConfigT", bound=BinnedConfig)


class BinnedTask(RowTask[BinnedConfigT]):
    """A benchmark says what of a row is counted (`texts`), its row of the grid (`place`), what is asked (`build`)."""

    def texts(self, rows: Rows, number: int, row: dict[str, Any]) -> list[str]:
        """Return what the bins count of a row. Raises DataError: the row is none."""
        raise NotImplementedError

    def place(self, rows: Rows, number: int, row: dict[str, Any]) -> str | int | None:
        """Return the row of the grid; None: it is not asked for. Raises DataError: the row is none."""
        raise NotImplementedError

    def placed(self, rows: Rows, number: int, row: dict[str, Any]) -> Placed | None:
        """Return row of the grid and bin."""
        place, texts = self.place(rows, number, row), self.texts(rows, number, row)
        end = None if place is None else self._bin(texts)
        return None if place is None or end is None else Placed((place, end[0]), end[1])

    def _bin(self, texts: Sequence[str]) -> tuple[int, int] | None:
        ends = sorted(self.settings.lengths)
        if sum(map(len, texts)) > _MOST_CHARACTERS * ends[-1]:
            return None
        tokens = sum(len(self._form.tokenizer.encode(text)) for text in texts)
        end = next((end for end in ends if tokens <= end), None)
        return None if end is None or tokens < ends[0] // 2 else (end, tokens)


DatedConfigT = TypeVar("DatedConfigT", bound=DatedConfig)


class DatedTask(BinnedTask[DatedConfigT]):
    """A benchmark whose rows may have a date, which is recorded; rows of several dates are said."""

    def __init__(
        self, settings: DatedConfigT, form: PromptForm, files: Mapping[str, Path], *, strict: bool
    ) -> None:
        super().__init__(settings, form, files, strict=strict)
        dates = Counter(date_of(row.values) for row in self._rows.values())
        if len(dates) > 1:
            found = ", ".join(f"{count} of {date or 'no date'}" for date, count in sorted(dates.items()))
            get_logger("eval").warning(
                "%s: the rows are of several dates (%s); published scores are of those of their time, which --added "
                "chooses",
                self.name,
                found,
            )

    def params(self) -> dict[str, Any]:
        """Return what determines the samples; all dates are what there was before there were several."""
        params = super().params()
        return params if self.settings.added else {name: params[name] for name in params if name != "added"}

    def placed(self, rows: Rows, number: int, row: dict[str, Any]) -> Placed | None:
        """Return row of the grid and bin; None: it is of another date."""
        if self.settings.added and date_of(row) not in self.settings.added:
            return None
        return super().placed(rows, number, row)


def date_of(row: Mapping[str, Any]) -> str:
    """Return since when a row belongs to its benchmark; empty: it does not say."""
    return str(row.get("date_added") or "")
