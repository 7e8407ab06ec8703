"""How long threads spin is bounded before torch is loaded, and a user's own setting is left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from longspan.core.threads import bound_spinning

SHOWN = """
import contextlib, sys
sys.argv = ["longspan", "--version"]
from longspan.cli.main import run
with contextlib.suppress(SystemExit):
    run()
assert "torch" not in sys.modules
import torch
"""


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}])
def test_own_settings_are_left_alone(own: dict[str, str]) -> None:
    """A setting of ours would outrank OMP_WAIT_POLICY, which whoever set it would look for in vain."""
    environment = dict(own)
    bound_spinning(environment)
    assert environment == (own or {"GOMP_SPINCOUNT": "10000"})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch carries GNU's OpenMP on Linux only")
def test_the_library_that_torch_carries_is_told() -> None:
    """Set after torch is imported it does nothing: the slowdown beside other work was more than tenfold."""
    free = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", SHOWN], env={**free, "OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "GOMP_SPINCOUNT = '10000'" in done.stderr, done.stderr[-2000:]
