"""How keys and values travel: ring, striped, dist-flash, Ulysses, USP and all-gather attention."""

from __future__ import annotations

import torch.distributed as dist

from longspan.core.errors import ArgumentError
from longspan.core.places import load_place
from longspan.core.schedule_table import SCHEDULES, ScheduleName
from longspan.parallel.schedules.base import CpSchedule, sequence_attention

__all__ = ["SCHEDULES", "CpSchedule", "ScheduleName", "build_schedule", "check_degrees", "sequence_attention"]


def check_degrees(name: str, *, ring: int, ulysses: int) -> None:
    """Refuse a schedule that there is not, or degrees that it has no use for. Raises ArgumentError."""
    if name not in SCHEDULES:
        raise ArgumentError("unknown context-parallel schedule", found=name, allowed=", ".join(SCHEDULES))
    entry = SCHEDULES[name]
    for kind, degree, used in (("ring", ring, entry.rings), ("ulysses", ulysses, entry.trades_heads)):
        if degree > 1 and not used:
            by_ring, by_heads = (
                ", ".join(other for other, each in SCHEDULES.items() if each[1:3] == flags)
                for flags in ((True, False), (False, True))
            )
            raise ArgumentError(
                f"the schedule {name} has no use for a {kind} degree",
                found=f"{kind} degree {degree}",
                allowed="1",
                fix=f"set cp_ring for {by_ring}, cp_ulysses for {by_heads}, both for usp",
            )


def build_schedule(
    name: ScheduleName,
    *,
    ring_group: dist.ProcessGroup | None = None,
    ulysses_group: dist.ProcessGroup | None = None,
) -> CpSchedule:
    """Return a schedule over groups that exist already; a group that is None has one rank.

    Args:
        name: "none" for a sequence on one rank; "usp" is Ulysses inside, ring outside.
        ring_group: ranks among which keys travel.
        ulysses_group: ranks that trade heads.

    Raises:
        ArgumentError: an unknown name, or a group of several ranks that the schedule has no use for.
    """
    ring, ulysses = (
        1 if group is None else dist.get_world_size(group) for group in (ring_group, ulysses_group)
    )
    check_degrees(name, ring=ring, ulysses=ulysses)
    entry = SCHEDULES[name]
    make = load_place(f"{__name__}.{entry.place}")
    if entry.trades_heads:
        built: CpSchedule = make(ulysses_group, ring_group=ring_group, **entry.arguments)
    else:
        built = make(ring_group, **entry.arguments)
    return built
