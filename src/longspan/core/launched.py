"""Which of the processes of a run this is: told by torchrun, or by Slurm where srun started it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

PORTS = range(20000, 50000)
"""Ports for the rendezvous, one of them by the job's number: two jobs on a node seldom collide."""


class Launched(NamedTuple):
    """A process among those that were started together."""

    rank: int
    world: int
    local_rank: int
    """Place among those of this machine."""
    address: str | None
    """Machine of the first process; None: torchrun has arranged where they meet."""
    port: int | None


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """Return what torchrun or srun say of this process; None if it was started alone.

    srun is asked only by what it sets for the tasks of a step: the script of a job has none, and is one process.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Launched(
            int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", "0")),
            None, None,
        )  # fmt: skip
    world = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if world == 1 or "SLURM_PROCID" not in environment:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    return Launched(
        int(environment["SLURM_PROCID"]),
        world,
        int(environment.get("SLURM_LOCALID", "0")),
        environment.get("MASTER_ADDR") or first_host(nodes),
        int(environment.get("MASTER_PORT") or PORTS[job % len(PORTS)]),
    )


def is_first() -> bool:
    """Return whether this process logs and writes for the run: rank 0, or the only one."""
    found = launched()
    return found is None or found.rank == 0


def first_host(nodes: str) -> str:
    """Return the first name of a Slurm node list.

    >>> first_host("gpu[007-012,15],login1")
    'gpu007'
    """
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,]*)", nodes)
    return nodes if found is None else found[1] + (found[2] or "") + found[3]
