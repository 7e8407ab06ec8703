"""Ports of this machine that nobody else takes before the process under test does."""

from __future__ import annotations

import os
import random
import socket

BELOW_THE_SYSTEM_S = range(20_000, 32_000)
"""The system gives out ports from 32,768: one of those may be another connection's before it is listened at."""


def free_port() -> int:
    """Return a port at which nobody listens, another one in each worker of the tests."""
    draw = random.Random(f"{os.getpid()} {os.urandom(8).hex()}")
    for port in draw.sample(BELOW_THE_SYSTEM_S, 100):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("100 ports are taken")
