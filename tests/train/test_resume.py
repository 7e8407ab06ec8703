"""A run killed with SIGKILL and started again gives the same losses, to the last bit; elsewhere, nearly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from longspan.annotate.config import AnnotateConfig
from longspan.annotate.run import annotate
from longspan.core.records import read_jsonl
from longspan.core.seeds import rng
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import plan_packing
from longspan.data.store import TokenStore
from longspan.models.hf import build_model, save_model
from longspan.train import trainer
from longspan.train.config import TrainConfig
from tests.patience import PATIENCE_SECONDS
from tests.train.conftest import recipe

DRIVER = Path(__file__).with_name("killing.py")


Driver = Callable[[list[dict[str, Any]]], list[list[int | None]]]


@pytest.fixture(scope="module")
def kill_and_go_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """Run jobs of `killing.py`, one after another."""
    errors = tmp_path_factory.mktemp("driver") / "stderr"
    with errors.open("w") as stderr:
        driver = subprocess.Popen(
            [sys.executable, str(DRIVER)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert driver.stdin is not None and driver.stdout is not None
        asked, answered = driver.stdin, driver.stdout

        def run(jobs: list[dict[str, Any]]) -> list[list[int | None]]:
            filled = [{"kill": None, "stop_after_step": None, "world": 1, **job} for job in jobs]
            asked.write(json.dumps(filled) + "\n")
            asked.flush()
            answer = answered.readline()
            assert answer, errors.read_text()[-4000:]
            return json.loads(answer)

        with asked, answered:
            yield run
        driver.wait()


def curve(path: Path) -> list[dict[str, Any]]:
    """Everything in the metrics that does not depend on the clock."""
    clock = ("tokens_per_s", "tflops", "mfu", "data_wait_s", "checkpoint_s", "peak_memory_bytes", "seconds")
    return [
        {key: value for key, value in record.items() if key not in clock}
        for name in ("metrics.jsonl", "validation.jsonl")
        for record in read_jsonl(path / name)
    ]


def write_recipe(tmp_path: Path, name: str, **changes: Any) -> str:
    """Two stages, checkpoints every second step, two micro-batches a step and rank, perplexity every fifth step."""
    validation = {"stores": {"held out": "plain"}, "lengths": [8, 24], "windows": 3, "every_steps": 5}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe(validation=validation, **changes)))
    return str(path)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_of_two_ranks_go_on_with_the_same_bits(
    data_root: Path, tmp_path: Path, kill_and_go_on: Driver, kills: int
) -> None:
    """Lost moments, row positions or random streams, half-written checkpoints and doubled lines show up here.

    One of two ranks gets SIGKILL at a random moment out of all that it lives through; the other goes with it.
    """
    common = {
        "recipe": write_recipe(
            tmp_path, "two", parallel={"dp_shard": 2, "timeout_seconds": PATIENCE_SECONDS}
        ),
        "data_root": str(data_root),
        "world": 2,
    }
    whole = tmp_path / "undisturbed"
    moments = kill_and_go_on([{**common, "out": str(whole)}])[0]
    random = rng(5, "kill", kills)
    jobs: list[dict[str, Any]] = []
    for number in range(kills):
        rank = int(random.integers(2))
        last = moments[rank]
        assert last is not None and last > 50
        job = {**common, "out": str(tmp_path / f"killed-{number}")}
        jobs += [{**job, "kill": [rank, int(random.integers(1, last + 1))]}, job]
    ends = kill_and_go_on(jobs)
    expected = curve(whole)
    assert len([record for record in expected if "grad_norm" in record]) == 12
    weights = (whole / "stages" / "long" / "model.safetensors").read_bytes()
    for job, end in zip(jobs[::2], ends[::2]):
        assert end[job["kill"][0]] is None, "nobody was killed"
        assert curve(Path(job["out"])) == expected, job["kill"]
        assert (Path(job["out"]) / "stages" / "long" / "model.safetensors").read_bytes() == weights


def test_a_run_killed_again_and_again_on_one_rank_ends_with_the_same_bits(
    data_root: Path, tmp_path: Path, kill_and_go_on: Driver
) -> None:
    """What a resumed run leaves must be what a resumed run can start from; the mean over steps is part of it."""
    stages = [{**stage, "loss_average": "steps"} for stage in recipe()["stages"]]
    common = {"recipe": write_recipe(tmp_path, "one", stages=stages), "data_root": str(data_root)}
    whole, out = tmp_path / "undisturbed", tmp_path / "disturbed"
    moments = kill_and_go_on([{**common, "out": str(whole)}])[0][0]
    assert moments is not None
    shares = [{**common, "out": str(out), "kill": [0, moments // part]} for part in (9, 4, 5, 3, 4)]
    kill_and_go_on([*shares, {**common, "out": str(out)}])
    assert curve(out) == curve(whole)


def test_a_student_killed_again_and_again_ends_with_the_same_bits(
    data_root: Path, tmp_path: Path, kill_and_go_on: Driver
) -> None:
    """Rows that come back with another row's teacher, or with none, show in the divergence of each step."""
    store = TokenStore(data_root / "plain")
    for name in ("plain", "weighted", "tokenizer"):
        (tmp_path / name).symlink_to(data_root / name)
    plan = plan_packing(PackConfig(length=24), store.lengths, np.arange(len(store), dtype=np.uint32), 0)
    plan.save(tmp_path / "plan", stores=[tmp_path / "plain"])
    save_model(build_model(recipe()["model"]["hf_config"], seed=3), tmp_path / "teacher")
    spec = {
        "teacher": {"model": str(tmp_path / "teacher"), "context": 24},
        "data": str(tmp_path / "plan"),
        "k": 5,
        "mass": 0.6,
    }
    annotate(AnnotateConfig.from_dict(spec, where="test"), tmp_path / "taught")
    stage = {
        "name": "distil",
        "context_length": 24,
        "steps": 8,
        "batch_tokens": 24 * 4,
        "micro_batch_tokens": 24 * 2,
        "lr": 0.01,
        "max_epochs": 100,
        "objective": "distill",
        "distill": {"weight": 0.7, "temperature": 2.0},
        "rope": {"rope_type": "default", "rope_theta": 10000.0},
        "streams": {"text": {"rows": "plan", "teacher": "taught"}},
    }
    common = {"recipe": write_recipe(tmp_path, "distil", stages=[stage]), "data_root": str(tmp_path)}
    whole, out = tmp_path / "undisturbed", tmp_path / "disturbed"
    moments = kill_and_go_on([{**common, "out": str(whole)}])[0][0]
    assert moments is not None
    shares = [{**common, "out": str(out), "kill": [0, moments // part]} for part in (5, 3, 4)]
    kill_and_go_on([*shares, {**common, "out": str(out)}])
    expected = curve(whole)
    assert sum(record.get("kl", 0.0) > 0 for record in expected) == 8
    assert curve(out) == expected


def test_one_two_and_four_ranks_share_a_run(data_root: Path, tmp_path: Path, kill_and_go_on: Driver) -> None:
    """The same rows in the same order, whoever reads them; parameters sharded by each number of ranks."""
    four = [
        {**stage, "batch_tokens": stage["context_length"] * 8, "tokens": stage["context_length"] * 8 * 6}
        for stage in recipe()["stages"]
    ]
    job = {"data_root": str(data_root), "out": str(tmp_path / "spread")}
    spread = [
        {
            **job, "world": world, "stop_after_step": stop,
            "recipe": write_recipe(
                tmp_path, f"world {world}", stages=four,
                parallel={"dp_shard": world, "timeout_seconds": PATIENCE_SECONDS},
            ),
        }
        for world, stop in ((1, 4), (2, 8), (4, None))
    ]  # fmt: skip
    kill_and_go_on([{**spread[0], "stop_after_step": None, "out": str(tmp_path / "alone")}, *spread])
    expected, found = curve(tmp_path / "alone"), curve(tmp_path / "spread")
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for one, many in zip(expected, found):
        assert many["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert many["tokens"] == one["tokens"]
        assert many["loss_by_position"].keys() == one["loss_by_position"].keys()
    files = sorted(path.name for path in (tmp_path / "spread" / "checkpoints" / "step-00000012").iterdir())
    assert len(files) == 2 * 4 + 1


def test_a_truncated_checkpoint_is_passed_over_aloud_and_its_steps_are_made_again(
    data_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on from a torn file, the curve would jump; with the lines kept, steps would be there twice."""
    config = TrainConfig.from_dict(recipe())
    trainer.train(config, tmp_path / "run", data_root=data_root)
    expected = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    shutil.rmtree(tmp_path / "run" / "stages" / "long")
    (tmp_path / "run" / "COMPLETE").unlink()
    torn = next((tmp_path / "run" / "checkpoints" / "step-00000012").glob("model-*"))
    torn.write_bytes(torn.read_bytes()[:-100])
    monkeypatch.setattr(trainer.get_logger("train").parent, "propagate", True)
    trainer.train(config, tmp_path / "run", data_root=data_root)
    assert "step-00000012 is damaged" in caplog.text and "truncated" in caplog.text
    found = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert [record["loss"] for record in found] == [record["loss"] for record in expected]


# `longspan train` under torchrun, but rank 1 of the first attempt dies in its sixth step.
DYING = """
import os, signal
from longspan.cli.main import run
from longspan.train import trainer

make_step, made = trainer.train_step, 0

def step(*args, **kwargs):
    global made
    made += 1
    if made == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return make_step(*args, **kwargs)

trainer.train_step = step
run()
"""


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_lost_a_rank(
    data_root: Path, tmp_path: Path, kill_and_go_on: Driver
) -> None:
    """A lost process costs the steps since the last checkpoint, not the run; the data are found from anywhere."""
    settings = {"parallel": {"dp_shard": 2, "timeout_seconds": PATIENCE_SECONDS}, "data_root": str(data_root)}
    path = write_recipe(tmp_path, "elastic", **settings)
    (tmp_path / "dying.py").write_text(DYING)
    trainer_command = [str(tmp_path / "dying.py"), "train", path, "--out", str(tmp_path / "run")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "--max-restarts", "1", *trainer_command],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resuming from" in done.stderr
    undisturbed = {"recipe": path, "data_root": str(data_root), "world": 2, "out": str(tmp_path / "whole")}
    kill_and_go_on([undisturbed])
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
