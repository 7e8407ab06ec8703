"""Learning-rate schedules: one pure function of the step."""

from __future__ import annotations

import math

from longspan.train.config import LrScheduleConfig


def lr_factor(schedule: LrScheduleConfig, step: int, num_steps: int) -> float:
    """Return the factor of the peak rate at `step` (0-based) of `num_steps`.

    Warm-up rises linearly and reaches 1 at step `warmup_steps`; the decay reaches `floor` at the last step.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return 1.0
    start = max(schedule.warmup_steps, num_steps - round(schedule.decay_fraction * num_steps))
    last = num_steps - 1
    if step < start or last <= start:
        return 1.0
    progress = min(1.0, (step - start) / (last - start))
    if schedule.kind == "linear":
        return 1.0 - (1.0 - schedule.floor) * progress
    return schedule.floor + (1.0 - schedule.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
