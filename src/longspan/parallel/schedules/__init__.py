"""How keys and values travel: ring, striped, dist-flash, Ulysses, USP and all-gather attention."""

from __future__ import annotations

from typing import Literal, get_args

import torch.distributed as dist

from longspan.core.errors import ArgumentError
from longspan.parallel.schedules.all_gather import AllGather
from longspan.parallel.schedules.base import CpSchedule, sequence_attention
from longspan.parallel.schedules.dist_flash import DistFlash
from longspan.parallel.schedules.ring import Ring
from longspan.parallel.schedules.ulysses import Ulysses

__all__ = ["SCHEDULES", "CpSchedule", "ScheduleName", "build_schedule", "check_degrees", "sequence_attention"]

ScheduleName = Literal["none", "ring", "striped", "dist_flash", "ulysses", "usp", "all_gather"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)


def check_degrees(name: str, *, ring: int, ulysses: int) -> None:
    """Refuse a schedule that there is not, or degrees that it has no use for. Raises ArgumentError."""
    if name not in SCHEDULES:
        raise ArgumentError("unknown sequence-parallel schedule", found=name, allowed=", ".join(SCHEDULES))
    unused = {"ring": ring if name in ("none", "ulysses") else 1}
    unused["ulysses"] = 1 if name in ("ulysses", "usp") else ulysses
    for kind, degree in unused.items():
        if degree > 1:
            raise ArgumentError(
                f"the schedule {name} has no use for a {kind} degree",
                found=f"{kind} degree {degree}",
                allowed="1",
                fix="set cp_ring for ring, striped, dist_flash and all_gather, cp_ulysses for ulysses, both for usp",
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
        ring_group: ranks among which keys travel, for every schedule but "ulysses".
        ulysses_group: ranks that trade heads, for "ulysses" and "usp".

    Raises:
        ArgumentError: an unknown name, or a group of several ranks that the schedule has no use for.
    """
    ring, ulysses = (
        1 if group is None else dist.get_world_size(group) for group in (ring_group, ulysses_group)
    )
    check_degrees(name, ring=ring, ulysses=ulysses)
    if name in ("ulysses", "usp"):
        return Ulysses(ulysses_group, ring_group=ring_group, name=name)
    if name == "dist_flash":
        return DistFlash(ring_group)
    if name == "all_gather":
        return AllGather(ring_group)
    if name == "striped":
        return Ring(ring_group, name=name, layouts=("striped",))
    return Ring(ring_group, name=name)
