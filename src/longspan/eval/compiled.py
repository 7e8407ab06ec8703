"""C++ that a model wrote, compiled and run on test cases: in a folder of its own, within limits of time and memory.

This is no sandbox: a program may do what the user may who runs it. Nothing here is called unless that was asked for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO

from longspan.core.errors import ArgumentError

Case = Sequence[Sequence[str]]
"""The lines that a program reads, and those that it has to write."""
MOST_CASES = 10
"""Test cases that count, the first ones."""
SECONDS = 3.0
"""Of one test case, as published."""
_HEADERS = (
    "cstdio", "iostream", "vector", "algorithm", "numeric", "cmath", "cstring", "set", "map", "queue", "stack", "list",
    "fstream", "climits", "cassert", "iomanip", "sstream", "bitset",
)  # fmt: skip
_COMPILERS = ("g++", "clang++", "c++")
_COMPILE_SECONDS = 60
_GIB_KIB = 1024 * 1024
_FILE_BLOCKS = 64 * 1024 * 2
"""Largest file that may be written, in the 512 bytes that a shell counts: 64 MiB."""


@cache
def compiler() -> str:
    """Return the C++ compiler. Raises ArgumentError: there is none."""
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        raise ArgumentError(
            "there is no C++ compiler to score what is written",
            found=f"no {', '.join(_COMPILERS)} in PATH",
            fix="install one (apt-get install g++), or leave pseudo_to_code out",
        )
    return found


def passes(code: str, cases: Sequence[Case]) -> bool:
    """Return whether a program compiles and writes what each of the first test cases wants, to the letter.

    Its exit status does not count. Cost: a second or two, and up to 3 seconds for each case.

    Raises:
        ArgumentError: there is no compiler.
    """
    with tempfile.TemporaryDirectory(prefix="longspan-code-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        head = "".join(f"#include <{header}>\n" for header in _HEADERS)
        (folder / "main.cpp").write_text(
            f"{head}using namespace std;\n{code}", encoding="utf-8", errors="replace"
        )
        command = [compiler(), "-std=c++11", "-O", "-o", "main", "main.cpp"]
        with open(folder / "messages", "wb") as messages:
            done = _run(command, folder, _COMPILE_SECONDS, memory_gib=4, stdout=messages)
        return done == 0 and all(_passes(folder, *case) for case in cases[:MOST_CASES])


def _passes(folder: Path, given: Sequence[str], wanted: Sequence[str]) -> bool:
    whole = ("\n".join(wanted) + "\n").encode()
    (folder / "in").write_bytes(("\n".join(given) + "\n").encode())
    with open(folder / "in", "rb") as stdin, open(folder / "out", "wb") as stdout:
        if _run(["./main"], folder, SECONDS, memory_gib=2, stdin=stdin, stdout=stdout) is None:
            return False
    with open(folder / "out", "rb") as written:
        return written.read(len(whole) + 1) == whole


def _run(
    command: Sequence[str],
    folder: Path,
    seconds: float,
    *,
    memory_gib: int,
    stdout: IO[bytes],
    stdin: IO[bytes] | None = None,
) -> int | None:
    """Run a command with limits and nothing of our environment; return its status, None where it took too long."""
    limits = f"ulimit -c 0; ulimit -t {int(seconds) + 2}; ulimit -f {_FILE_BLOCKS}; ulimit -v {memory_gib * _GIB_KIB}"
    with subprocess.Popen(
        ["/bin/sh", "-c", f'{{ {limits}; }} 2>/dev/null; exec "$@"', "sh", *command],
        cwd=folder,
        env={"PATH": os.environ.get("PATH", ""), "TMPDIR": str(folder), "HOME": str(folder)},
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started goes with it
