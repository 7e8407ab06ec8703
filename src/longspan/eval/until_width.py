"""Asks a task piece by piece, until the interval of each mean is narrow enough.

A column of a task's axes (a length, say) is looked at after 20, 40, 80, ... of its units. A unit is what shares a text,
or has one number in every row of the column (each depth, each subtask), so that the rows stay even. The column is done
when the 95 % interval of its mean is no wider than was asked for, from end to end, or when its units are used up.

Looking again and again makes an interval hold less often than it says, unless what ends it is its width alone, and the
looks are few: it holds the mean in 93 to 99 % of draws where samples are independent, in 92 to 99 % where they come in
clusters (tests/eval/test_until_width.py). So the interval is given as it is.

Units come in an order that is the same for every model, by a hash of their name: a file may be sorted by difficulty.
What is asked next follows from the records alone, so a killed run goes on as if nothing had happened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longspan.core.errors import ArgumentError
from longspan.core.files import sha256_bytes
from longspan.core.intervals import clustered_interval, score_interval
from longspan.eval.registry import entry_of
from longspan.eval.task import Planned

FIRST_LOOK = 20
"""Units of a column before its first look; from so many clusters on intervals hold what they promise."""


def check_width(width: float | None) -> None:
    """Raise ArgumentError for a width that an interval of scores between 0 and 1 cannot have."""
    if width is not None and not 0.0 < width < 1.0:
        raise ArgumentError(
            "no such width of an interval",
            found=f"{width:g}",
            allowed="above 0 and below 1, such as 5% or 0.05",
        )


class UntilWidth:
    """What is asked next of a task, until its intervals are narrow enough.

    Args:
        task: its name; the registry says what its columns are, and which of its samples share texts.
        samples: of the plan, each with its id in the records.
        width: of the interval, from end to end: 0.05 is 5 points.

    Raises:
        ArgumentError: a width that is none.
    """

    def __init__(self, task: str, samples: Iterable[tuple[str, Planned]], width: float) -> None:
        check_width(width)
        self.width = width
        entry = entry_of(task)
        axes = None if entry is None else entry.axes
        self._cluster = "" if entry is None else entry.cluster
        self._columns = ("dataset", "subtask") if axes is None else (axes.columns,)
        found: dict[tuple[Any, ...], dict[str, list[str]]] = {}
        for id_, planned in samples:
            column = tuple(planned.fields.get(name) for name in self._columns)
            found.setdefault(column, {}).setdefault(self._unit(planned), []).append(id_)
        # By column the ids of each unit, in the order in which these are asked.
        self._units = {
            column: [units[name] for name in sorted(units, key=lambda name: sha256_bytes(name.encode()))]
            for column, units in found.items()
        }

    def due(self, recorded: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return the ids to be asked before the next look; none: nothing is left to ask."""
        return [
            id_
            for units in self._units.values()
            for unit in units[: self._reach(units, recorded)]
            for id_ in unit
            if id_ not in recorded
        ]

    def said(self, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return what records and summary say of it: the width, samples of the plan, columns that are narrow enough."""
        narrow = sum(self._is_narrow(units, recorded) for units in self._units.values())
        return {
            "until_width": self.width,
            "planned": sum(len(unit) for units in self._units.values() for unit in units),
            "narrow": narrow,
            "wider": len(self._units) - narrow,
        }

    def _unit(self, planned: Planned) -> str:
        named = self._cluster if self._cluster in planned.fields else "sample"
        return json.dumps(planned.fields.get(named, planned.key))

    def _reach(self, units: Sequence[Sequence[str]], recorded: Mapping[str, Mapping[str, Any]]) -> int:
        """Return how many units of a column are to be asked before its next look, or were before the last."""
        look = FIRST_LOOK
        while look < len(units):
            some = units[:look]
            if any(id_ not in recorded for unit in some for id_ in unit) or self._is_narrow(some, recorded):
                break
            look *= 2
        return look

    def _is_narrow(self, units: Sequence[Sequence[str]], recorded: Mapping[str, Mapping[str, Any]]) -> bool:
        scored = [
            recorded[id_]
            for unit in units
            for id_ in unit
            if id_ in recorded and recorded[id_].get("score") is not None
        ]
        scores = [float(record["score"]) for record in scored]
        interval = score_interval(scores)
        if self._cluster and all(record.get(self._cluster) is not None for record in scored):
            interval = clustered_interval(scores, [record[self._cluster] for record in scored])
        return interval is not None and interval[1] - interval[0] <= self.width
