"""Where the time of a step goes: torch's profiler over a few steps of each rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from longspan.core.files import atomic_write
from longspan.core.log import get_logger

WARM_STEPS = 2
"""Left out: they start kernels, compile and allocate."""
PROFILED_STEPS = 3


@contextlib.contextmanager
def profiled(folder: Path | None, *, rank: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step; the third to fifth step of this process are recorded.

    Writes `rank-<n>.json`, a trace for chrome://tracing or Perfetto, and `rank-<n>.txt`, the operations by their own
    time. Recorded steps are slower. `folder` None: nothing is recorded.
    """
    if folder is None:
        yield lambda: None
        return
    cuda = torch.cuda.is_available()

    def finish(trace: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(folder / f"rank-{rank}.json"))
        by = "self_device_time_total" if cuda else "self_cpu_time_total"
        with atomic_write(folder / f"rank-{rank}.txt", "w") as file:
            file.write(trace.key_averages().table(sort_by=by, row_limit=40))
        get_logger("train").info("wrote a profile of %d steps to %s", PROFILED_STEPS, folder)

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    steps = schedule(wait=0, warmup=WARM_STEPS, active=PROFILED_STEPS, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=finish) as trace:
        yield trace.step
