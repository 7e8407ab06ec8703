"""Adapters train like whole models: every schedule, sharded, resumed, and the frozen weights stay as they are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longspan.core.errors import ConfigError, DataError
from longspan.core.records import read_jsonl
from longspan.models.hf import build_model, hidden_states, load_model, save_model
from longspan.parallel.launch import spawn_local
from longspan.train import trainer
from longspan.train.config import TrainConfig
from longspan.train.known_models import known_model
from longspan.train.resolve import resolve
from longspan.train.run_plan import plan_run
from longspan.train.trainer import train
from tests.patience import PATIENCE_SECONDS
from tests.train.conftest import recipe

LENGTH = 45
"""Tokens of a row: nothing that two processes could share without padding."""
STEPS = 4

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 16, "trainable": ["embed_tokens", "norm"]},
    "qlora": {"rank": 4, "alpha": 16, "quantize": "nf4", "target_modules": ["q_proj", "v_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def base(data_root: Path) -> Path:
    """A model whose MLP has 2 x 64 scales and some left over; its matrices are 4-bit blocks of uneven size."""
    path = data_root / "base"
    if not path.exists():
        fields = {**recipe()["model"]["hf_config"], "intermediate_size": 50, "num_hidden_layers": 2}
        save_model(build_model(fields, seed=5), path)
    return path


def adapted(base: Path, lora: dict[str, Any], **changes: Any) -> dict[str, Any]:
    stage = {
        "name": "only",
        "context_length": LENGTH,
        "tokens": LENGTH * 4 * STEPS,
        "batch_tokens": LENGTH * 4,
        "micro_batch_tokens": LENGTH * 2,
        "lr": 0.01,
        "max_epochs": 50,
        "rope": {"rope_type": "default", "rope_theta": 50000.0},
        "streams": {
            "text": {"store": "plain"},
            "weighted": {"store": "weighted", "pack": {"strategy": "intact"}},
        },
    }
    return {
        **recipe(stages=[stage], optimizer={"name": "adamw"}, checkpoint={"every_steps": 2, "keep": 2}),
        "model": {"path": str(base)},
        "lora": lora,
        **changes,
    }


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_jsonl(out / "metrics.jsonl")]


def train_all(rank: int, runs: list[tuple[dict[str, Any], str]], data_root: str) -> None:
    for values, out in runs:
        train(TrainConfig.from_dict(values), out, data_root=data_root)


@pytest.fixture(scope="module")
def alone(data_root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, lora in CONFIGS.items():
        folders[name] = tmp_path_factory.mktemp("alone") / "run"
        train(TrainConfig.from_dict(adapted(base, lora)), folders[name], data_root=data_root)
    return folders


SCHEDULES = {
    "ring": {"cp_ring": 2},
    "ulysses": {"cp_ulysses": 2},
    "data parallel": {"dp_shard": 2},
}
OTHER_SCHEDULES = {
    "striped": {"cp_ring": 2, "schedule": "striped"},
    "dist_flash": {"cp_ring": 2, "schedule": "dist_flash"},
    "all_gather": {"cp_ring": 2, "schedule": "all_gather"},
    "usp": {"cp_ring": 2, "schedule": "usp"},
}


@pytest.mark.parametrize("schedules", [SCHEDULES, pytest.param(OTHER_SCHEDULES, marks=pytest.mark.slow)])
def test_every_schedule_follows_one_process(
    data_root: Path, base: Path, tmp_path: Path, alone: dict[str, Path], schedules: dict[str, dict[str, Any]]
) -> None:
    """Sharded 4-bit weights that lose their scales, frozen parameters that are reduced, a trained norm's lost sum."""
    runs = {
        (name, schedule): adapted(base, lora, parallel={**degrees, "timeout_seconds": PATIENCE_SECONDS})
        for name, lora in CONFIGS.items()
        for schedule, degrees in schedules.items()
    }
    places = {key: tmp_path / "-".join(key) for key in runs}
    arguments = [(runs[key], str(places[key])) for key in runs]
    spawn_local(train_all, 2, arguments, str(data_root), timeout_seconds=PATIENCE_SECONDS)
    for (name, _), place in places.items():
        one, many = losses(alone[name]), losses(place)
        assert one[-1] < one[0] - 0.05, "nothing was learnt"
        assert many == pytest.approx(one, abs=1e-4)


def test_stage_folder_holds_the_adapter_and_its_rope(
    data_root: Path, base: Path, alone: dict[str, Path]
) -> None:
    """A run that writes the whole model again fills disks; one that forgets the RoPE evaluates another model."""
    for name, run in alone.items():
        stage = run / "stages" / "only"
        names = set(load_file(stage / "adapter_model.safetensors"))
        assert all(
            any(word in each for word in ("lora_", "embed_tokens", "lm_head", "norm")) for each in names
        )
        assert ("base_model.model.model.embed_tokens.weight" in names) == (name == "lora")
        model = load_model(stage)
        assert model.config.rope_parameters["rope_theta"] == 50000.0
        assert model.config.max_position_embeddings == LENGTH
        state = load_file(run / "checkpoints" / "step-00000004" / "model-00000-of-00001.safetensors")
        trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
        assert state.keys() == trained.keys()
        assert all(torch.equal(state[key], trained[key]) for key in state)
        assert hidden_states(model, torch.arange(20)).isfinite().all()


def test_a_killed_run_goes_on_with_the_same_losses(
    data_root: Path, base: Path, tmp_path: Path, alone: dict[str, Path]
) -> None:
    """A resumed adapter starts from a new A if the checkpoint's names are not those of the model."""
    run = tmp_path / "run"
    shutil.copytree(alone["qlora"], run)
    shutil.rmtree(run / "stages")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "COMPLETE").unlink()
    train(TrainConfig.from_dict(adapted(base, CONFIGS["qlora"])), run, data_root=data_root)
    assert losses(run) == losses(alone["qlora"])


def test_frozen_weights_keep_their_bits_and_memory_settings_change_nothing(
    data_root: Path, base: Path, tmp_path: Path, alone: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointed blocks whose input needs no gradient lose those of their adapters; decay moves frozen weights."""
    seen: list[torch.nn.Module] = []
    make_model = trainer.stage_model
    monkeypatch.setattr(
        trainer, "stage_model", lambda *arguments: seen.append(make_model(*arguments)) or seen[-1]
    )
    saving = {"activation_checkpointing": "full", "tiled_mlp": 16}
    for name, lora in CONFIGS.items():
        seen.clear()
        values = adapted(base, lora, memory=saving, optimizer={"name": "adamw", "weight_decay": 0.0})
        train(TrainConfig.from_dict(values), tmp_path / name, data_root=data_root)
        assert losses(tmp_path / name) == pytest.approx(losses(alone[name]), abs=1e-5)
        config = TrainConfig.from_dict(values)
        made = make_model(config, config.stages[0], None, known_model(config.model, data_root))
        fresh, trained = (dict(model.named_parameters()) for model in (made, seen[0]))
        changed = {key for key in fresh if not torch.equal(fresh[key], trained[key])}
        assert changed == {key for key in fresh if fresh[key].requires_grad}


@pytest.mark.slow
def test_bfloat16_base_with_float32_adapters_trains_sharded(
    data_root: Path, base: Path, tmp_path: Path
) -> None:
    """FSDP2 refuses units whose trained parameters differ in type, and bfloat16 adapters lose small updates."""
    lora = {"rank": 4, "trainable": ["embed_tokens", "lm_head"], "quantize": "nf4"}
    runs = [
        (
            adapted(base, lora, model={"path": str(base), "dtype": "bfloat16"}, parallel=degrees, memory=memory),
            str(tmp_path / name),
        )
        for name, degrees, memory in (
            ("float32 adapters", {"dp_shard": 2}, {}),
            ("computing in bfloat16", {"cp_ring": 2}, {"compute_dtype": "bfloat16"}),
            ("offloaded", {"cp_ring": 2}, {"offload_parameters": True}),
        )
    ]  # fmt: skip
    spawn_local(train_all, 2, runs, str(data_root), timeout_seconds=PATIENCE_SECONDS)
    train(
        TrainConfig.from_dict(adapted(base, lora, model={"path": str(base), "dtype": "bfloat16"})),
        tmp_path / "alone",
        data_root=data_root,
    )
    for _, place in runs:
        assert losses(Path(place)) == pytest.approx(losses(tmp_path / "alone"), abs=0.05)
        tensors = load_file(Path(place) / "stages" / "only" / "adapter_model.safetensors")
        assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_wrong_settings_are_refused_before_anything_is_written(
    data_root: Path, base: Path, tmp_path: Path
) -> None:
    """A target that matches nothing would train nothing for days; an adapter without a base cannot be loaded."""
    values = adapted(base, {"target_modules": ["q_proj", "query"]})
    with pytest.raises(ConfigError) as caught:
        train(TrainConfig.from_dict(values), tmp_path / "run", data_root=data_root)
    for part in ("'query'", "down_proj", "q_proj", "v_proj"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"set model\.path"):
        TrainConfig.from_dict({**recipe(), "lora": {}})
    with pytest.raises(ConfigError, match="without quantize"):
        TrainConfig.from_dict(adapted(base, {"compute_dtype": "bfloat16"}))
    assert not (tmp_path / "run").exists()


def test_experts_without_adapters_are_said_before_any_data_are_read(tmp_path: Path) -> None:
    """Hours of reading records came first; and with data still to be fetched the dry run did not say it at all."""
    fields = {**recipe()["model"]["hf_config"], "model_type": "mixtral", "num_local_experts": 4}
    save_model(build_model(fields, seed=0), tmp_path / "base")
    config = TrainConfig.from_dict(adapted(tmp_path / "base", {"rank": 4, "quantize": "nf4"}))
    said: list[str] = []
    with pytest.raises(DataError):
        plan_run(config, data_root=tmp_path, say=said.append)
    (note,) = [note for note in said if "experts" in note]
    assert re.match(r"\d+% of the weights, the experts, get no adapter and are not quantised", note)
    assert note in resolve(config, "r", data_root=tmp_path).notes
