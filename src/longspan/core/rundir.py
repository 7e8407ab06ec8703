"""The run folder: what was asked, where it ran, what happened, and whether it is done.

RUN/
  config.yaml     the resolved settings
  env.json        versions, machine, command line
  events.jsonl    one line per phase and incident
  COMPLETE        written last
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longspan.core.config import Config, read_yaml
from longspan.core.errors import ArgumentError, ConfigError
from longspan.core.files import atomic_write, disk_errors, remove_leftovers, write_json
from longspan.core.records import JsonlWriter, read_jsonl

PACKAGES = ("longspan", "torch", "transformers", "tokenizers", "gigatoken", "numpy", "pyarrow")

_OTHERS = ("longspan.json", "config.json", "head.json")
"""Files at the top of stores and rows, models, plans; a run has none of them there."""


class RunDir:
    """A run folder at `path`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, config: Config, *, seed: int) -> RunDir:
        """Make the folder, or take up one that holds the same settings.

        Raises:
            ConfigError: the folder holds a run with other settings; the message names those that differ.
            ArgumentError: it is a store, a plan or a model.
        """
        run = cls(path)
        if other := [name for name in _OTHERS if (run.path / name).exists()]:
            raise ArgumentError(
                f"{run.path} holds a store, plan or model, not a run",
                found=other[0],
                fix="choose another place with --out",
            )
        with disk_errors(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run.path)
        saved = run.path / "config.yaml"
        if saved.exists():
            changed = _differences(read_yaml(saved), config.to_dict())
            if changed:
                raise ConfigError(
                    f"{run.path} holds a run with other settings",
                    found="; ".join(changed[:6]),
                    fix="use the same settings to go on with it, or another --out",
                )
            run.event("resumed", seed=seed)
            return run
        write_json(run.path / "env.json", describe_environment(seed))
        config.to_yaml(saved)
        run.event("created", seed=seed)
        return run

    def event(self, name: str, **fields: Any) -> None:
        """Append one line to events.jsonl."""
        with JsonlWriter(self.path / "events.jsonl") as writer:
            writer.write({"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": name, **fields})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and record its seconds, also when it fails; `phase_seconds` adds up all attempts."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.event("phase", phase=name, seconds=round(time.monotonic() - started, 2))

    def phase_seconds(self) -> dict[str, float]:
        """Return the seconds spent in each phase, over all attempts of this run."""
        totals: dict[str, float] = {}
        for record in read_jsonl(self.path / "events.jsonl"):
            if record.get("event") == "phase":
                totals[record["phase"]] = round(totals.get(record["phase"], 0.0) + record["seconds"], 2)
        return totals

    @property
    def is_complete(self) -> bool:
        """Whether the run reached its end."""
        return (self.path / "COMPLETE").exists()

    def mark_complete(self) -> None:
        """Mark the run as complete; the last thing a run does."""
        with atomic_write(self.path / "COMPLETE", "w") as file:
            file.write(datetime.now(UTC).isoformat(timespec="seconds") + "\n")


def describe_environment(seed: int) -> dict[str, Any]:
    """Return versions, machine and command line: what someone needs to run it again."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "seed": seed,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, (a, b) in enumerate(zip(old, new)) for line in _differences(a, b, f"{prefix}{i}.")
        ]
    return [] if old == new else [f"{prefix.rstrip('.')} was {old!r}, is {new!r}"]
