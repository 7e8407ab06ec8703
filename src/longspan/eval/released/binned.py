"""Released benchmarks whose rows are whole prompts of any length: each stands in the bin that holds its tokens.

Tokens are counted by the model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pydantic

from longspan.eval.grid import Lengths
from longspan.eval.released.row_task import Placed, RowsConfig, RowTask
from longspan.eval.released.rows import Rows

_MOST_CHARACTERS = 16
"""Of a token, on average: a longer text is in no bin, and is not tokenised to find that out."""


class BinnedConfig(RowsConfig):
    """Settings of a benchmark in bins."""

    lengths: Lengths = pydantic.Field("8k,16k,32k,64k,128k,256k,512k,1M", validate_default=True)
    """Upper ends of the bins in tokens, such as 8k,16k,128k; a bin begins above the one below it, the first at half of
    its end."""


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
