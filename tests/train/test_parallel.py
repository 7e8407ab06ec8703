"""Training on several processes follows training on one: every schedule, data parallel, sharded, resumed, broken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from longspan.core.errors import ArgumentError, ConfigError, RunError
from longspan.core.records import read_jsonl
from longspan.parallel.launch import spawn_local
from longspan.train.config import TrainConfig
from longspan.train.trainer import train
from tests.train.conftest import recipe

STEPS = 20
TIMEOUT = 20.0

# Rows of 45 tokens: no layout on 2 or 4 ranks divides them.
LENGTH = 45


def spread_recipe(**changes: Any) -> dict[str, Any]:
    """20 steps of 4 rows, two of them in a micro-batch, with loss weights, padding and several documents a row."""
    stage = {
        "name": "only",
        "context_length": LENGTH,
        "tokens": LENGTH * 4 * STEPS,
        "batch_tokens": LENGTH * 4,
        "micro_batch_tokens": LENGTH * 2,
        "lr": 0.01,
        "max_epochs": 50,
        "streams": {"text": {"store": "plain"}, "weighted": {"store": "weighted", "strategy": "intact"}},
    }
    values = recipe(stages=[stage], optimizer={"name": "adamw"}, checkpoint={"every_steps": 10, "keep": 2})
    values["model"]["hf_config"]["num_key_value_heads"] = 4
    return {**values, **changes}


def curve(out: Path) -> list[float]:
    return [record["loss"] for record in read_jsonl(out / "metrics.jsonl")]


def train_all(rank: int, runs: list[tuple[dict[str, Any], str]], data_root: str) -> None:
    """Train several recipes one after another in one set of processes: starting them is what takes long."""
    for values, out in runs:
        train(TrainConfig.from_dict(values), out, data_root=data_root)


@pytest.fixture(scope="module")
def alone(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    train(TrainConfig.from_dict(spread_recipe()), out, data_root=data_root)
    return out


def follows(alone: Path, out: Path) -> None:
    expected, losses = list(read_jsonl(alone / "metrics.jsonl")), list(read_jsonl(out / "metrics.jsonl"))
    assert len(losses) == len(expected)
    assert expected[-1]["loss"] < 0.8 * expected[0]["loss"], "nothing was learnt"
    for one, many in zip(expected, losses):
        assert many["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert many["tokens"] == one["tokens"]
        assert many["loss_by_source"] == pytest.approx(one["loss_by_source"], abs=1e-4)
        assert many["loss_by_position"] == pytest.approx(one["loss_by_position"], abs=1e-4)


TWO = {
    "ring": {"cp_ring": 2},
    "ring contiguous": {"cp_ring": 2, "layout": "contiguous"},
    "striped": {"cp_ring": 2, "schedule": "striped"},
    "dist_flash": {"cp_ring": 2, "schedule": "dist_flash"},
    "ulysses": {"cp_ulysses": 2},
    "all_gather": {"cp_ring": 2, "schedule": "all_gather"},
    "data parallel": {"dp_shard": 2},
    "replicas": {"dp_replicate": 2},
}
FOUR = {
    "ring": {"cp_ring": 4},
    "striped": {"cp_ring": 4, "schedule": "striped"},
    "dist_flash": {"cp_ring": 4, "schedule": "dist_flash"},
    "ulysses": {"cp_ulysses": 4},
    "usp": {"cp_ring": 2, "cp_ulysses": 2},
    "all_gather": {"cp_ring": 4, "schedule": "all_gather"},
    "dp 2 x cp 2": {"dp_shard": 2, "cp_ring": 2},
    "dp 2 x ulysses 2": {"dp_shard": 2, "cp_ulysses": 2},
    "replicas x shards": {"dp_replicate": 2, "dp_shard": 2},
    "replicas x cp": {"dp_replicate": 2, "cp_ring": 2, "schedule": "all_gather"},
}


@pytest.mark.parametrize(("world", "cases"), [(2, TWO), (4, FOUR)], ids=["2", "4"])
def test_every_schedule_follows_one_process(
    data_root: Path, tmp_path: Path, alone: Path, world: int, cases: dict[str, dict[str, Any]]
) -> None:
    """A loss divided twice, padding that is trained, positions cut twice or a lost gradient leave the curve."""
    runs = [
        (spread_recipe(parallel={**degrees, "timeout_seconds": 60}), str(tmp_path / name))
        for name, degrees in cases.items()
    ]
    spawn_local(train_all, world, runs, str(data_root), timeout_seconds=240)
    for name in cases:
        follows(alone, tmp_path / name)
