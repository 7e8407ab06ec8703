"""What every executor does, and the share of one job of an array."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from longspan.core.errors import ArgumentError

Unit = TypeVar("Unit")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs a function over units of work; a context manager, because it may hold processes."""

    @property
    def num_workers(self) -> int:
        """Units that run at once."""

    def run(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
        """Yield `function(unit)` of every unit, in the order of the units.

        Raises:
            Exception: whatever the function raised for the first unit, in their order, that failed.
            RunError: a process that ran a unit died.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


@dataclass(frozen=True)
class ArrayJob:
    """Job `index` of `count` that share units of work. Raises ArgumentError unless 0 <= index < count."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ArgumentError(
                "there is no such job",
                found=f"job {self.index} of {self.count}",
                allowed="--job-id from 0 to --num-jobs - 1",
            )

    def share(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """Return the units of this job."""
        return units[self.index :: self.count]
