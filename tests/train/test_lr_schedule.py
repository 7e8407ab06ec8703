"""Learning-rate schedules against values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from longspan.core.errors import ConfigError
from longspan.train.config import LrScheduleConfig, StageConfig
from longspan.train.lr_schedule import lr_factor


def factors(num_steps: int, **settings: object) -> list[float]:
    schedule = LrScheduleConfig.from_dict(settings)
    return [round(lr_factor(schedule, step, num_steps), 4) for step in range(num_steps)]


def test_warmup_never_wastes_a_step_at_zero() -> None:
    """A warm-up that begins at 0 makes the first step do nothing."""
    assert factors(5, kind="constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_decay_covers_only_the_last_part_and_ends_at_the_floor() -> None:
    """WSD: 10 steps, the last 40 % decay from 1 to 0.1 over steps 6..9."""
    assert factors(10, kind="linear", decay_fraction=0.4, floor=0.1) == [1.0] * 7 + [0.7, 0.4, 0.1]


def test_cosine_is_half_way_in_the_middle_and_keeps_its_floor() -> None:
    """A cosine that runs past its end would rise again."""
    assert factors(5, kind="cosine", floor=0.2) == [1.0, pytest.approx(0.8828, abs=1e-4), 0.6, 0.3172, 0.2]


def test_warmup_may_be_a_share_of_the_steps_rounded_up() -> None:
    """transformers' `get_warmup_steps`: ceil(0.25 * 10) = 3 steps; a share must not be taken for no steps."""
    assert factors(10, kind="constant", warmup_steps=0.25) == factors(10, kind="constant", warmup_steps=3)
    assert LrScheduleConfig(warmup_steps=3.0).warmup_steps == 3
    with pytest.raises(ConfigError, match="a share of the stage's below 1"):
        LrScheduleConfig.from_dict({"warmup_steps": 2.5})


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_stage_of_one_step_trains_at_full_rate(kind: str) -> None:
    """Dividing by the number of decay steps less one must not fail when there is one step."""
    assert factors(1, kind=kind) == [1.0]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"schedule": {"kind": "linear", "floor": 0.2}}, ("linear", 0.2)),
        ({"lr_schedule": {"kind": "linear"}, "schedule": {"floor": 0.2}}, ("linear", 0.2)),
    ],
)
def test_the_older_key_of_a_stage_still_counts(stage: dict[str, Any], expected: tuple[str, float]) -> None:
    """A recipe, or a `--set stages.0.schedule.floor=0.2` on a shipped one, must not lose its schedule to a new name."""
    whole = {
        "name": "a",
        "context_length": 8,
        "steps": 1,
        "batch_tokens": 8,
        "lr": 1e-3,
        "streams": {"a": {"rows": "x"}},
    }
    schedule = StageConfig.from_dict({**whole, **stage}).lr_schedule
    assert (schedule.kind, schedule.floor) == expected


def test_a_schedule_that_is_no_mapping_is_named() -> None:
    """The older key is taken apart before it is checked: what is no mapping must not end in a traceback."""
    for key, wrong in (("schedule", 3), ("lr_schedule", 3), ("schedule", {"knd": "linear"})):
        with pytest.raises(ConfigError, match=rf"{key}|lr_schedule\.knd"):
            StageConfig.from_dict({"name": "a", key: wrong, "schedule": {"floor": 0.1}} | {key: wrong})
