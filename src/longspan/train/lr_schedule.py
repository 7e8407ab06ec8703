"""Learning-rate schedules: one pure function of the step."""

from __future__ import annotations

import math

from longspan.train.config import LrScheduleConfig


def lr_factor(schedule: LrScheduleConfig, step: int, num_steps: int) -> float:
    """Return the factor of the peak rate at `step` (0-based) of `num_steps`.

    Warm-up rises linearly and reaches 1 at step `warmup_steps`; the decay reaches `floor` at the last step.
    """
    warmup = schedule.warmup_steps
    if 0 < warmup < 1:
        warmup = math.ceil(warmup * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.kind == "constant":
        return 1.0
    start = max(warmup, num_steps - round(schedule.decay_fraction * num_steps))
    last = num_steps - 1
    if step < start or last <= start:
        return 1.0
    progress = min(1.0, (step - start) / (last - start))
    if schedule.kind == "linear":
        return 1.0 - (1.0 - schedule.floor) * progress
    return schedule.floor + (1.0 - schedule.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
