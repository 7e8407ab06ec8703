"""Training on several processes follows training on one: every schedule, data parallel, sharded, resumed, broken."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from longspan.core.errors import ArgumentError, ConfigError, RunError
from longspan.core.records import read_jsonl
from longspan.parallel.launch import spawn_local
from longspan.train import trainer
from longspan.train.config import TrainConfig
from longspan.train.trainer import train
from tests.patience import PATIENCE_SECONDS
from tests.ports import free_port
from tests.train.conftest import recipe

STEPS = 20
STUCK_SECONDS = 30.0

# Rows of 45 tokens: no layout on 2 or 4 ranks divides them.
LENGTH = 45


def spread_recipe(**changes: Any) -> dict[str, Any]:
    """20 steps of 4 rows, two of them in a micro-batch, with loss weights, padding and several documents a row, kept
    apart or not."""
    stage = {
        "name": "only",
        "context_length": LENGTH,
        "tokens": LENGTH * 4 * STEPS,
        "batch_tokens": LENGTH * 4,
        "micro_batch_tokens": LENGTH * 2,
        "lr": 0.004,  # at 0.01 this toy's gradient jumps, in fp64 too, and rounding noise grows a thousandfold
        "max_epochs": 50,
        "streams": {
            "text": {"store": "plain"},
            "weighted": {"store": "weighted", "pack": {"strategy": "intact"}},
            "whole": {"store": "plain", "document_mask": False},
        },
    }
    # AdamW makes a whole step of a gradient that is rounding noise: with eps above that, noise stays noise.
    optimizer = {"name": "adamw", "eps": 1e-5}
    values = recipe(stages=[stage], optimizer=optimizer, checkpoint={"every_steps": 10, "keep": 2})
    return {**values, **changes}


def longrope_recipe() -> dict[str, Any]:
    """Two steps of a model of 16 positions whose own LongRoPE takes its scale from the stage's length."""
    values = spread_recipe()
    values["stages"][0] |= {"tokens": LENGTH * 4 * 2}
    values["model"]["hf_config"]["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 4.0, 8.0],
    }  # fmt: skip
    return values


LONGROPE = longrope_recipe()


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
    "usp": {"cp_ring": 2, "cp_ulysses": 2},
    "dp 2 x cp 2": {"dp_shard": 2, "cp_ring": 2},
    "replicas x cp": {"dp_replicate": 2, "cp_ring": 2, "schedule": "all_gather"},
}
FOUR_MORE = {
    "ring": {"cp_ring": 4},
    "striped": {"cp_ring": 4, "schedule": "striped"},
    "dist_flash": {"cp_ring": 4, "schedule": "dist_flash"},
    "ulysses": {"cp_ulysses": 4},
    "all_gather": {"cp_ring": 4, "schedule": "all_gather"},
    "balanced ring": {"cp_ring": 4, "layout": "balanced"},
    "dp 2 x ulysses 2": {"dp_shard": 2, "cp_ulysses": 2},
    "replicas x shards": {"dp_replicate": 2, "dp_shard": 2},
}


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, TWO),
        pytest.param(4, FOUR, marks=pytest.mark.slow),
        pytest.param(4, FOUR_MORE, marks=pytest.mark.slow),
    ],
    ids=["2", "4", "4 more"],
)
def test_every_schedule_follows_one_process(
    data_root: Path, tmp_path: Path, alone: Path, world: int, cases: dict[str, dict[str, Any]]
) -> None:
    """A loss divided twice, padding that is trained, positions cut twice or a lost gradient leave the curve."""
    runs = [
        (spread_recipe(parallel={**degrees, "timeout_seconds": PATIENCE_SECONDS}), str(tmp_path / name))
        for name, degrees in cases.items()
    ]
    # A RoPE by the length: the ranks see different positions, and only the first loads the model.
    varying = {
        name: LONGROPE | {"parallel": cases[name]} for name in ("data parallel", "ulysses") if name in cases
    }
    runs += [(values, str(tmp_path / f"longrope, {name}")) for name, values in varying.items()]
    spawn_local(train_all, world, runs, str(data_root), timeout_seconds=PATIENCE_SECONDS)
    for name in cases:
        follows(alone, tmp_path / name)
    if varying:
        train(TrainConfig.from_dict(LONGROPE), tmp_path / "longrope", data_root=data_root)
    for name in varying:
        assert curve(tmp_path / f"longrope, {name}") == pytest.approx(curve(tmp_path / "longrope"), abs=1e-5)


def train_and_die(rank: int, values: dict[str, Any], out: str, data_root: str) -> None:
    """Train, but rank 1 is killed in the 14th step."""
    made = 0
    make_step = trainer.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        if rank == 1 and made == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        return make_step(*args, **kwargs)

    trainer.train_step = step  # type: ignore[assignment]
    train(TrainConfig.from_dict(values), out, data_root=data_root)


def test_a_run_goes_on_with_another_number_of_processes(data_root: Path, tmp_path: Path, alone: Path) -> None:
    """Checkpoints hold whole tensors and a row position, so nothing in them says how many processes there were."""
    out = tmp_path / "run"
    two = spread_recipe(parallel={"cp_ring": 2, "timeout_seconds": PATIENCE_SECONDS})
    with pytest.raises(RunError, match="rank 1 of 2 died"):
        spawn_local(train_and_die, 2, two, str(out), str(data_root), timeout_seconds=PATIENCE_SECONDS)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000010"]
    train(TrainConfig.from_dict(spread_recipe()), out, data_root=data_root)
    follows(alone, out)
    # And the other way round, with the parameters sharded: the first 10 steps of one, the rest of two.
    back = tmp_path / "back"
    shutil.copytree(out, back)
    for stale in (back / "checkpoints" / "step-00000020", back / "stages"):
        shutil.rmtree(stale)
    (back / "COMPLETE").unlink()
    sharded = spread_recipe(parallel={"dp_shard": 2, "timeout_seconds": PATIENCE_SECONDS})
    spawn_local(train_all, 2, [(sharded, str(back))], str(data_root), timeout_seconds=PATIENCE_SECONDS)
    follows(alone, back)


def test_memory_settings_change_no_losses_and_muon_takes_sharded_matrices(
    data_root: Path, tmp_path: Path, alone: Path
) -> None:
    """Each setting is one field; together, on two processes and over two stages, they train the same model."""
    saving = {"activation_checkpointing": "offload", "tiled_mlp": 16, "offload_parameters": True}
    muon = recipe(stages=[{**stage, "micro_batch_tokens": None} for stage in recipe()["stages"]])
    runs = [
        (spread_recipe(parallel={"cp_ring": 2}, memory=saving), str(tmp_path / "saving")),
        (
            spread_recipe(parallel={"dp_shard": 2}, memory={"compute_dtype": "bfloat16"}),
            str(tmp_path / "bf16"),
        ),
        ({**muon, "parallel": {"dp_shard": 2}}, str(tmp_path / "muon")),
    ]
    spawn_local(train_all, 2, runs, str(data_root), timeout_seconds=PATIENCE_SECONDS)
    follows(alone, tmp_path / "saving")
    # Rounded to 8 bits, but learning: the weights themselves are not rounded.
    assert curve(tmp_path / "bf16") == pytest.approx(curve(alone), abs=0.02)
    train(TrainConfig.from_dict(muon), tmp_path / "muon alone", data_root=data_root)
    assert curve(tmp_path / "muon") == pytest.approx(curve(tmp_path / "muon alone"), abs=1e-5)
    weights = [
        load_file(tmp_path / name / "stages" / "long" / "model.safetensors")
        for name in ("muon", "muon alone")
    ]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-3, atol=1e-4)


def test_one_process_offloads_and_computes_in_bfloat16_too(
    data_root: Path, tmp_path: Path, alone: Path
) -> None:
    """Sharding over one process is what keeps master weights; it must not need torchrun, or leave a group behind."""
    saving = {"offload_parameters": True, "compute_dtype": "bfloat16"}
    train(TrainConfig.from_dict(spread_recipe(memory=saving)), tmp_path / "run", data_root=data_root)
    assert curve(tmp_path / "run") == pytest.approx(curve(alone), abs=0.02)
    assert not torch.distributed.is_initialized()


def test_a_recipe_for_several_processes_says_how_to_start_them(data_root: Path, tmp_path: Path) -> None:
    """Alone, it would train with another batch than it says, or fail in the middle of torch.distributed."""
    values = spread_recipe(parallel={"cp_ring": 2, "dp_shard": 2})
    with pytest.raises(ArgumentError, match=r"torchrun --nproc-per-node 4 -m longspan train"):
        train(TrainConfig.from_dict(values), tmp_path / "run", data_root=data_root)
    assert not (tmp_path / "run").exists()


def refusals(rank: int, cases: list[dict[str, Any]], out: str, data_root: str) -> list[str]:
    found = []
    for values in cases:
        try:
            train(TrainConfig.from_dict(values), out, data_root=data_root)
        except (ArgumentError, ConfigError) as error:
            found.append(str(error))
    return found


def test_what_does_not_fit_the_processes_is_refused_before_anything_is_written(
    data_root: Path, tmp_path: Path
) -> None:
    """A wrong degree, heads that do not divide, rows that do not divide, degrees the schedule has no use for."""
    odd = spread_recipe(parallel={"cp_ulysses": 2})
    odd["model"]["hf_config"].update(hidden_size=24, num_attention_heads=3, num_key_value_heads=1)
    rows = spread_recipe(parallel={"dp_shard": 2})
    rows["stages"][0]["batch_tokens"] = LENGTH * 3
    cases = [
        spread_recipe(parallel={"cp_ring": 3}),
        spread_recipe(),
        odd,
        rows,
        spread_recipe(parallel={"cp_ulysses": 2, "schedule": "striped"}),
        spread_recipe(parallel={"cp_ring": 2, "schedule": "striped", "layout": "zigzag"}),
        spread_recipe(parallel={"tp": 2}),
    ]
    messages = spawn_local(
        refusals, 2, cases, str(tmp_path / "run"), str(data_root), timeout_seconds=PATIENCE_SECONDS
    )
    assert messages[0] == messages[1] and len(messages[0]) == len(cases)
    expected = [
        ["cp_ring 3", "= 3, but 2 processes", "choose degrees whose product is 2"],
        ["= 1, but 2 processes"],
        ["num_heads", "num_kv_heads", "3", "2"],
        ["3 rows of 45 tokens", "multiple of 90"],
        ["striped", "ulysses degree 2"],
        ["striped", "zigzag"],
        ["parallel.tp = 2", "dp_shard"],
    ]
    for message, parts in zip(messages[0], expected):
        for part in parts:
            assert part in message
    assert not (tmp_path / "run").exists()


# `longspan train` as torchrun starts it, but for what happens to rank 1 in its third step.
BROKEN = """
import os, signal, sys, time
from longspan.cli.main import run
from longspan.train import trainer

make_step, made, fate = trainer.train_step, 0, sys.argv.pop()

def step(*args, **kwargs):
    global made
    made += 1
    if made == 3 and os.environ["RANK"] == "1":
        if fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            time.sleep(0.05)
    return make_step(*args, **kwargs)

trainer.train_step = step
run()
"""


@pytest.mark.parametrize("fate", ["killed", pytest.param("stuck", marks=pytest.mark.slow)])
def test_a_lost_rank_ends_all_with_a_message(data_root: Path, tmp_path: Path, fate: str) -> None:
    """A run that waits for ever for a rank that is gone costs all its machines, and says nothing."""
    # A lost rank is noticed at once; who waits for one that is stuck must have found it first, on a slow machine too.
    seconds = PATIENCE_SECONDS if fate == "killed" else STUCK_SECONDS
    recipe_of_two = spread_recipe(parallel={"cp_ring": 2, "timeout_seconds": seconds})
    (data_root / f"{fate}.yaml").write_text(yaml.safe_dump(recipe_of_two))
    port = str(free_port())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", BROKEN, "train", f"{data_root}/{fate}.yaml", "--out", str(tmp_path / "run"), fate],
            env={**environment, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    ends = [rank.communicate(timeout=PATIENCE_SECONDS)[1] for rank in ranks]
    assert ranks[0].returncode == 1, ends[0]
    assert "Traceback" not in ends[0]
    assert "error: rank 0 of 2 lost the others while training" in ends[0]
    if fate == "killed":
        assert ranks[1].returncode == -signal.SIGKILL
    else:
        assert ranks[1].returncode == 1
        assert "error: rank 1 has made no progress for" in ends[1]
        assert "in step" in ends[1]


@pytest.mark.slow
def test_a_mistake_is_told_once_and_srun_starts_processes_too(data_root: Path, tmp_path: Path) -> None:
    """Eight processes that say the same thing hide it; tasks of srun that do not find each other train eight runs."""
    (data_root / "wrong.yaml").write_text(yaml.safe_dump(spread_recipe(parallel={"dp_shard": 2}, seed=1)))
    port = str(free_port())
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": port, **step}
    command = [
        sys.executable,
        "-m",
        "longspan",
        "train",
        f"{data_root}/wrong.yaml",
        "--out",
        str(tmp_path / "run"),
    ]
    tasks = [
        subprocess.Popen(
            # Three rows on two data-parallel processes.
            [*command, "--set", f"stages.0.batch_tokens={LENGTH * 3}"],
            env={**environment, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [task.communicate(timeout=PATIENCE_SECONDS)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [2, 2], told
    assert "do not divide among the data-parallel processes" in told[0]
    assert "error" not in told[1]
