"""How threads wait for each other at the end of each parallel loop, decided before torch is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN_TURNS = 10_000
"""Spins before a waiting thread sleeps: tens of microseconds, longer than most waits between two loops."""
WAITING_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Where the user has set one of these, it stays."""


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let a waiting OpenMP thread of torch sleep after a moment instead of spinning for milliseconds.

    GNU's OpenMP, which torch's builds for Linux carry, spins 300,000 turns by default. Beside other work on the same
    cores the spinning takes their time from the very thread that is waited for, and a step takes ten times as long. It
    reads its environment once, when it is loaded.
    """
    if not any(name in environment for name in WAITING_SETTINGS):
        environment["GOMP_SPINCOUNT"] = str(SPIN_TURNS)
