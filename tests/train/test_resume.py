"""A run killed with SIGKILL and started again gives the same losses, to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from longspan.core.records import read_jsonl
from tests.train.conftest import recipe

SCRIPT = """
import os, signal, sys
from longspan.core.records import JsonlWriter
from longspan.train.config import TrainConfig
from longspan.train import trainer

recipe, data_root, out, kill_at = sys.argv[1:5]
write = JsonlWriter.write
def write_or_die(self, record):
    write(self, record)
    if record.get("step") == int(kill_at) and "loss" in record:
        os.kill(os.getpid(), signal.SIGKILL)
JsonlWriter.write = write_or_die
trainer.train(TrainConfig.from_yaml(recipe), out, data_root=data_root)
"""


def run(tmp_path: Path, data_root: Path, out: str, kill_at: int = 0) -> int:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe()))
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        str(tmp_path / "recipe.yaml"),
        str(data_root),
        str(tmp_path / out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(kill_at)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def curve(path: Path) -> list[tuple[object, ...]]:
    """Everything in the metrics that does not depend on the clock."""
    keys = ("step", "stage", "tokens", "loss", "lr", "grad_norm")
    return [
        (*(record[key] for key in keys), json.dumps([record["loss_by_source"], record["loss_by_position"]]))
        for record in read_jsonl(path / "metrics.jsonl")
    ]


def test_killed_runs_go_on_with_the_same_bits(data_root: Path, tmp_path: Path) -> None:
    """Lost optimizer moments, row positions or duplicated log lines all show up here.

    Checkpoints come every 2 steps: the run is killed right after one, between two, in the first step of the
    second stage (whose optimizer state is carried over), and before any checkpoint.
    """
    assert run(tmp_path, data_root, "undisturbed") == 0
    kills = (1, 4, 5, 7, 11)
    for kill_at in kills:
        assert run(tmp_path, data_root, "disturbed", kill_at) == -signal.SIGKILL
    assert run(tmp_path, data_root, "disturbed") == 0
    expected = curve(tmp_path / "undisturbed")
    assert len(expected) == 12
    assert curve(tmp_path / "disturbed") == expected
    weights = [
        (tmp_path / name / "stages" / "long" / "model.safetensors").read_bytes()
        for name in ("undisturbed", "disturbed")
    ]
    assert weights[0] == weights[1]
