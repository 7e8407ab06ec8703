"""CPU time, wall time and peak memory of command lines on given cores, and what of it is start-up.

Start-up is measured the same way for every program: a run on a tiny input lists what Python imported, and a
process that imports exactly this and ends is timed. What a program costs net is its CPU time less that.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT = os.environ.copy()
# Installed packages come compiled; without this ours would be compiled anew at every start.
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
IMPORT_THESE = """
import importlib, sys
for name in open(sys.argv[1]).read().split():
    try:
        importlib.import_module(name)
    except Exception:
        pass
"""
_IMPORTED = re.compile(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", re.MULTILINE)

Command = Sequence[str]
Numbers = dict[str, Any]


class Usage(NamedTuple):
    """What a command and the processes it waited for took."""

    cpu_s: float
    wall_s: float
    peak_mib: float
    """Largest resident memory of one process, mapped files included."""


class Failed(Exception):
    """A measured command ended with an error; the message holds the end of what it said."""


def run(command: Command, *, cores: Sequence[int]) -> Usage:
    """Run a command to its end on these cores, with one thread a library."""
    process = start(command, cores=cores)
    usage, _ = finish(process, command)
    return usage


class Started(NamedTuple):
    process: subprocess.Popen[bytes]
    begin: float


def start(command: Command, *, cores: Sequence[int], env: dict[str, str] | None = None) -> Started:
    """Start a command on these cores; its output is kept for `finish`."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT | ONE_THREAD | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return Started(process, begin)


def finish(started: Started, command: Command) -> tuple[Usage, str]:
    """Wait for a command; return what it took and what it said. Raises Failed."""
    process = started.process
    assert process.stdout is not None
    said = process.stdout.read().decode(errors="replace")
    _, status, taken = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started.begin
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise Failed(f"{' '.join(command)}\nended with {process.returncode}:\n{said[-3000:]}")
    return Usage(taken.ru_utime + taken.ru_stime, wall, taken.ru_maxrss / 1024), said


class Memory:
    """Samples the memory of a process while a `with` block runs, in bytes; one that ends in it is no error.

    Attributes:
        own: most at once that is the process's own (anonymous).
        mapped: most at once with all mapped pages.
    """

    def __init__(self, pid: int | None = None) -> None:
        """`pid`: None: this process."""
        self.own = self.mapped = 0
        self._status = Path("/proc", "self" if pid is None else str(pid), "status")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            found = dict.fromkeys(("RssAnon", "VmRSS"), 0)  # a process that has ended says nothing of them
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for line in self._status.read_text().splitlines():
                    name, _, value = line.partition(":")
                    if name in found:
                        found[name] = int(value.split()[0]) * 1024
            self.own = max(self.own, found["RssAnon"])
            self.mapped = max(self.mapped, found["VmRSS"])


def ask(command: Command, cores: Sequence[int]) -> Numbers:
    """Run a command that prints JSON last and return it."""
    _, said = finish(start(command, cores=cores), command)
    return json.loads(said[said.index("{") :])


def list_imports(command: Command, out: Path, *, cores: Sequence[int]) -> None:
    """Run a command and write the names of the modules it imports, in order, to `out`."""
    _, said = finish(start(command, cores=cores, env={"PYTHONPROFILEIMPORTTIME": "1"}), command)
    out.write_text("\n".join(_IMPORTED.findall(said)))


def import_only(python: str, modules: Path) -> Command:
    """Return the command that imports what `list_imports` wrote, and nothing else."""
    return [python, "-c", IMPORT_THESE, str(modules)]


def median(usages: Iterable[Usage]) -> Usage:
    """Return the median of each number."""
    return Usage(*(statistics.median(column) for column in zip(*usages)))


def total(usages: Sequence[Usage]) -> Usage:
    """Return what commands took one after another."""
    cpu_s, wall_s, peak_mib = zip(*usages)
    return Usage(sum(cpu_s), sum(wall_s), max(peak_mib))


def machine(peers: str | None) -> Numbers:
    """Describe the machine and the versions on both sides."""
    names = [
        line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    code = "import importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in %r))"
    theirs = ("datatools-py", "datatrove", "mosaicml-streaming", "transformers", "tokenizers", "fastokens")
    ours = ("longspan", "gigatoken", "tokenizers", "numpy")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": memory[0] / 2**20 if memory else None,
        "python": platform.python_version(),
        "longspan": _output([sys.executable, "-c", code % (ours,)]),
        "peers": _output([peers, "-c", code % (theirs,)]) if peers else None,
        "load_average": os.getloadavg(),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def _output(command: Command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
