"""How the processes of a run are arranged, and the context-parallel schedule that goes with it; without torch."""

from __future__ import annotations

from math import prod
from typing import Self

import pydantic

from longspan.core.config import Config
from longspan.core.schedule_table import SCHEDULES, ScheduleName, arranged, schedule_of_degrees

__all__ = ["MeshConfig"]

_DEGREES = ("dp_replicate", "dp_shard", "cp_ring", "cp_ulysses", "tp")


class MeshConfig(Config):
    """Degrees of parallelism; their product is the number of processes. See `parallel.mesh`."""

    dp_replicate: int = pydantic.Field(1, ge=1)
    """Data parallelism: copies of the sharded model (HSDP)."""
    dp_shard: int = pydantic.Field(1, ge=1)
    """Sharded data parallelism: processes that share the parameters (FSDP2) and read different rows."""
    cp_ring: int = pydantic.Field(1, ge=1)
    """Context parallelism: processes that share each sequence, keys and values going round (ring attention)."""
    cp_ulysses: int = pydantic.Field(1, ge=1)
    """Context parallelism: processes that share each sequence, each computing some of the heads (Ulysses)."""
    tp: int = pydantic.Field(1, ge=1)
    """Tensor parallelism: processes that share each matrix; training refuses it above 1."""
    schedule: ScheduleName | None = None
    """Context-parallel schedule: how keys and values reach the queries. None: what the cp degrees say: none, ring,
    ulysses or usp."""

    @classmethod
    def of_schedule(cls, schedule: ScheduleName, cp: int, *, dp_replicate: int = 1) -> Self:
        """Return how `cp` processes share a sequence by a schedule."""
        ring, ulysses = arranged(schedule, cp)
        return cls(dp_replicate=dp_replicate, cp_ring=ring, cp_ulysses=ulysses, schedule=schedule)

    @property
    def schedule_name(self) -> ScheduleName:
        """The schedule, that of the degrees if none is set."""
        return self.schedule or schedule_of_degrees(self.cp_ring, self.cp_ulysses)

    @property
    def planned_schedule(self) -> str:
        """The schedule whose estimates hold for it."""
        return SCHEDULES[self.schedule_name].planned_as or self.schedule_name

    @property
    def degrees(self) -> tuple[int, ...]:
        """The degrees, outermost first."""
        return tuple(getattr(self, name) for name in _DEGREES)

    @property
    def world(self) -> int:
        """Processes that the mesh needs."""
        return prod(self.degrees)

    @property
    def cp(self) -> int:
        """Processes that share a sequence."""
        return self.cp_ring * self.cp_ulysses

    @property
    def dp(self) -> int:
        """Processes, or groups of them, that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Processes that the parameters are sharded over."""
        return self.dp_shard * self.cp

    def __str__(self) -> str:
        return " x ".join(f"{name} {degree}" for name, degree in zip(_DEGREES, self.degrees))
