"""Grids of context lengths and depths: lists as people write them, or evenly spaced `start:end:count`.

lengths   4k,16k,128k      4096, 16384, 131072
          1000:128000:40   40 lengths from 1000 to 128000, both included
depths    0,0.5,1          start, middle and end of the haystack
          0:1:11           0, 0.1, ..., 1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import pydantic

from longspan.core.config import Config
from longspan.core.errors import ArgumentError
from longspan.core.units import parse_length


def lengths_from(values: Any) -> Any:
    """Read context lengths before validation; a value that is neither text nor a list is left to it."""
    return _read(values, parse_length, such_as="1k:8k:8")


def depths_from(values: Any) -> Any:
    """Read depths before validation; a value that is neither text nor a list is left to it."""
    return _read(values, _depth, such_as="0:1:11")


def _read(values: Any, read: Callable[[str], float], *, such_as: str) -> Any:
    if isinstance(values, str):
        values = values.split(",")
    if not isinstance(values, list | tuple):
        return values
    found: list[Any] = []
    try:
        for value in values:
            if isinstance(value, str) and ":" in value:
                start, end, count = _range(value, such_as=such_as)
                found += _spaced(read(start), read(end), count)
            else:
                found.append(read(value) if isinstance(value, str) else value)
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    return tuple(found)


def refuse_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values. Raises ValueError when there are none or one stands twice."""
    if not values:
        raise ValueError("at least one value is needed")
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{value} stands twice")
    return values


def refuse_outside(depths: tuple[float, ...]) -> tuple[float, ...]:
    """Return the depths. Raises ValueError when one is not a fraction."""
    if not all(0.0 <= depth <= 1.0 for depth in depths):
        raise ValueError("a depth lies between 0 (start) and 1 (end of the haystack)")
    return depths


def _range(text: str, *, such_as: str) -> tuple[str, str, int]:
    parts = text.split(":")
    if len(parts) != 3:
        raise ValueError(f"{text!r} is not start:end:count, such as {such_as}")
    if not parts[2].strip().isdecimal() or int(parts[2]) < 1:
        raise ValueError(f"{text!r} ends in no count of values of 1 or more, such as {such_as} does")
    if int(parts[2]) == 1 and parts[0].strip() != parts[1].strip():
        raise ValueError(f"{text!r} asks for one value between two different ends")
    return parts[0], parts[1], int(parts[2])


def _spaced(start: float, end: float, count: int) -> Sequence[Any]:
    # Ends are exact, and 11 depths are 0.1 and 0.3, not 0.30000000000000004.
    digits = None if isinstance(start, int) else 9
    return [round(float(point), digits) for point in np.linspace(start, end, count)]


def _depth(text: str) -> float:
    try:
        depth = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a depth, such as 0.5") from None
    if not 0.0 <= depth <= 1.0:
        raise ValueError(
            f"{text.strip()} is not a depth: these lie between 0 (start) and 1 (end of the haystack)"
        )
    return depth


Lengths = Annotated[
    tuple[pydantic.PositiveInt, ...],
    pydantic.BeforeValidator(lengths_from),
    pydantic.AfterValidator(refuse_repeats),
]
Depths = Annotated[
    tuple[float, ...],
    pydantic.BeforeValidator(depths_from),
    pydantic.AfterValidator(refuse_repeats),
    pydantic.AfterValidator(refuse_outside),
]


class GridConfig(Config):
    """Settings of a grid: every length with every depth is a cell of `samples` samples."""

    lengths: Lengths
    """Context lengths in tokens, prompt and answer together, such as 1k,4k,32k or 1k:8k:8."""
    depths: Depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where in the context: 0 is its start, 1 its end; such as 0,0.5,1 or 0:1:11."""
    samples: pydantic.PositiveInt = 10
    """Samples of each length and depth."""
    seed: int = 0
    """Seed of every random choice."""

    def cells(self) -> list[tuple[int, float]]:
        """Return (length, depth) of every cell."""
        return [(length, depth) for length in self.lengths for depth in self.depths]
