"""The context-parallel schedules by name: where each is, and which degrees it uses. Read without torch.

A new one is a class beside the others (`parallel.schedules.base.CpSchedule`), its name and its entry here; recipes,
evaluation, teachers and the certificate know it by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any, Literal, NamedTuple

__all__ = ["SCHEDULES", "CpScheduleName", "ScheduleEntry", "ScheduleName", "arranged", "schedule_of_degrees"]

CpScheduleName = Literal["ring", "striped", "dist_flash", "ulysses", "usp", "all_gather"]
"""Of a sequence that several ranks share."""
ScheduleName = Literal["none", CpScheduleName]


class ScheduleEntry(NamedTuple):
    """A schedule before it is built."""

    place: str
    """Module below `parallel.schedules` and class: "ring:Ring"; called with the group of its (inner) ranks."""
    rings: bool = True
    """Keys travel among the ranks of `cp_ring`."""
    trades_heads: bool = False
    """The ranks of `cp_ulysses` trade tokens for heads."""
    arguments: Mapping[str, Any] = {}
    """Further arguments of the class."""
    planned_as: str = ""
    """The schedule of `plan` whose estimates hold for it; empty: it has its own."""


SCHEDULES: dict[ScheduleName, ScheduleEntry] = {
    "none": ScheduleEntry("ring:Ring", rings=False, arguments={"name": "none"}),
    "ring": ScheduleEntry("ring:Ring"),
    "striped": ScheduleEntry("ring:Ring", arguments={"name": "striped", "layouts": ("striped",)}),
    "dist_flash": ScheduleEntry("dist_flash:DistFlash"),
    "ulysses": ScheduleEntry("ulysses:Ulysses", rings=False, trades_heads=True),
    "usp": ScheduleEntry("ulysses:Ulysses", trades_heads=True, arguments={"name": "usp"}),
    "all_gather": ScheduleEntry("all_gather:AllGather"),
}


def schedule_of_degrees(ring: int, ulysses: int) -> ScheduleName:
    """Return the schedule of a recipe that names degrees alone: none, ring, ulysses or usp."""
    wanted = (ring > 1, ulysses > 1)
    return next(name for name, entry in SCHEDULES.items() if (entry.rings, entry.trades_heads) == wanted)


def arranged(name: ScheduleName, world: int) -> tuple[int, int]:
    """Return the ring and the Ulysses degree of `world` ranks: where both are used, as near to a square as can be."""
    entry = SCHEDULES[name]
    if entry.rings and entry.trades_heads:
        ulysses = max(side for side in range(1, isqrt(world) + 1) if world % side == 0)
        return world // ulysses, ulysses
    return (1, world) if entry.trades_heads else (world, 1)
