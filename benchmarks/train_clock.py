"""One clock for every trainer: when each optimizer step ended, by wall and by CPU time of the process.

Imported by what runs under either Python, so it needs torch alone. A global hook of torch's optimizers, which
trainers do not see: whatever lies between two steps (data, collation, logging) belongs to the second.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from loss import memory_mib

Case = dict[str, Any]


class StepClock:
    """Starts to count with the first step; the memory of what was imported before it was made is the base."""

    def __init__(self) -> None:
        self.imports_mib = memory_mib("VmRSS")
        self._ends: list[tuple[float, float]] = []
        self._peak_mib = 0.0
        register_optimizer_step_post_hook(self._end)

    def _end(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._ends.append((time.perf_counter(), time.process_time()))
        self._peak_mib = memory_mib("VmHWM")

    def result(self, losses: list[float], **more: Any) -> dict[str, Any]:
        """Return what the process found: seconds of each step but the first, losses, MiB to the last one and in all."""
        pairs = list(zip(self._ends, self._ends[1:]))
        return {
            "wall_s": [after[0] - before[0] for before, after in pairs],
            "cpu_s": [after[1] - before[1] for before, after in pairs],
            "losses": losses,
            "peak_mib": self._peak_mib,
            "run_peak_mib": memory_mib("VmHWM"),
            "imports_mib": self.imports_mib,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **more,
        }


def read_case() -> Case:
    """Return the case whose file is the only argument."""
    return json.loads(Path(sys.argv[1]).read_text())


def write_result(case: Case, result: dict[str, Any]) -> None:
    """Write what was found to where the case says."""
    Path(case["result"]).write_text(json.dumps(result))
