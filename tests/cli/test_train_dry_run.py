"""What `longspan train --dry-run` says is of the run that its command starts, and of this machine."""

from __future__ import annotations

import json

import pytest
import torch


def test_the_command_it_prints_starts_the_run_that_it_is_about(longspan):
    """Settings that were left out would train another model for days."""
    line = "train fu-2024-80k --set seed=7 --set 'tracking.wandb={project: a b}' --out here --dry-run --json"
    shown = json.loads(longspan(line).out)
    wanted = "fu-2024-80k --set seed=7 --set 'tracking.wandb={project: a b}' --out here"
    assert shown["launch"].endswith(f"-m longspan train {wanted}")


def test_figures_are_those_of_the_machine_unless_a_gpu_is_named(longspan, monkeypatch: pytest.MonkeyPatch):
    """A machine without a GPU showed the seconds of one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = json.loads(longspan("train fu-2024-80k --dry-run --json").out)
    stage = here["stages"][0]
    assert here["gpu"] is None and stage["seconds"] is None and "workspace" not in stage["memory"]
    assert any("no GPU" in note and "--gpu" in note for note in here["notes"])
    assert "this machine's CPU" in longspan("train fu-2024-80k --dry-run").out
    there = json.loads(longspan("train fu-2024-80k --dry-run --json --gpu h100").out)
    assert there["gpu"] == "h100" and there["stages"][0]["seconds"] > 1
    # On a GPU it computes in bfloat16 beside fp32 weights, as the run would.
    assert there["stages"][0]["memory"] == pytest.approx(
        json.loads(
            longspan("train fu-2024-80k --dry-run --json --gpu h100 --set memory.compute_dtype=bfloat16").out
        )["stages"][0]["memory"]
    )


def test_a_gpu_is_named_for_estimates_alone(longspan):
    """--gpu h100 without --dry-run trained on whatever there was."""
    outcome = longspan("train fu-2024-80k --gpu h100")
    assert outcome.code == 2 and "--dry-run" in outcome.err
