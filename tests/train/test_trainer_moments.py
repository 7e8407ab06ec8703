"""Moments of a Hugging Face Trainer: training goes on as theirs would, and what is not theirs is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from longspan.core.errors import ConfigError, DataError
from longspan.models.lora import LoraConfig, apply_lora
from longspan.train.config import TrainConfig
from longspan.train.optim import build_optimizers, load_optimizer_tensors, set_lr
from longspan.train.run_plan import plan_run
from longspan.train.trainer import train
from longspan.train.trainer_moments import find_trainer_checkpoint, read_trainer_moments
from tests.train.conftest import recipe

LR, DECAY = 0.01, 0.1


def groups(model: PreTrainedModel, plain: str) -> list[dict[str, Any]]:
    """Parameters as Trainer has them: those with decay, then those without."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if not re.search(plain, n)], "weight_decay": DECAY},
        {"params": [p for n, p in named if re.search(plain, n)], "weight_decay": 0.0},
    ]


def steps(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(seed))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def settings(path: Path, **changes: Any) -> TrainConfig:
    values = recipe(
        model={"path": str(path)},
        optimizer={"name": "adamw", "weight_decay": DECAY, "betas": [0.9, 0.999]},
        init_from={"path": str(path), "weights": False, "optimizer": True},
    )
    stage = {key: value for key, value in values["stages"][0].items() if key != "adamw_lr"}
    return TrainConfig.from_dict({**values, "stages": [stage], **changes})


def trained(
    path: Path, plain: str = r"norm|bias", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, torch.optim.AdamW]:
    """Three steps of theirs, saved in `path` as Trainer does."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        )
    ).to(dtype)  # fmt: skip
    optimizer = torch.optim.AdamW(groups(model, plain), lr=LR, betas=(0.9, 0.999))
    steps(model, optimizer, range(3))
    model.save_pretrained(path)
    (path / "trainer_state.json").write_text("{}")
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    return model, optimizer


@pytest.mark.parametrize("plain", [r"norm|bias", r"bias"], ids=["now", "before RMSNorm was a norm"])
def test_training_goes_on_as_theirs(tmp_path: Path, plain: str) -> None:
    """Moments numbered by group, put to parameters in the model's order: equal shapes take each other's."""
    # The gradient of a bias of keys is nearly rounding alone, which AdamW makes a step of: in float32 it is another in
    # a fused one.
    theirs, optimizer = trained(tmp_path / "checkpoint-3", plain, torch.float64)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", dtype=torch.float64)
    config = settings(tmp_path / "checkpoint-3")
    mine = build_optimizers(ours, config.optimizer)
    load_optimizer_tensors(mine, *read_trainer_moments(tmp_path / "checkpoint-3", ours, config))
    set_lr(mine, lr=LR, adamw_lr=LR)
    if plain == r"bias":
        # Ours decays matrices alone; they decayed norms then.
        optimizer.param_groups[0]["weight_decay"] = mine[0].param_groups[0]["weight_decay"] = 0.0
    steps(theirs, optimizer, range(3, 6))
    steps(ours, mine[0], range(3, 6))
    for (name, value), expected in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.allclose(value, expected, rtol=0, atol=1e-6), name


def test_a_run_begins_with_them(data_root: Path, tmp_path: Path) -> None:
    """Through the recipe: the first loss is that of the weights, the second shows the moments. The newest counts."""
    trained(tmp_path / "theirs" / "checkpoint-3")
    (tmp_path / "theirs" / "checkpoint-20").mkdir()
    (tmp_path / "theirs" / "checkpoint-20" / "trainer_state.json").write_text("{}")
    assert find_trainer_checkpoint(tmp_path / "theirs") == tmp_path / "theirs" / "checkpoint-20"
    assert find_trainer_checkpoint(tmp_path) is None
    losses = []
    for name, changes in (("with", {}), ("without", {"init_from": None})):
        config = settings(tmp_path / "theirs" / "checkpoint-3", **changes)
        train(config, tmp_path / name, data_root=data_root)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append(
            [float(re.search(r'"loss": ?([\d.e-]+)', line)[1]) for line in lines if '"loss"' in line]
        )  # type: ignore[index]
    assert losses[0][0] == losses[1][0] and losses[0][2] != losses[1][2]


def test_what_is_not_theirs_is_refused_before_work(data_root: Path, tmp_path: Path) -> None:
    """Sharded or foreign states, another model, another optimizer: each would train from noise without a word."""
    path = tmp_path / "checkpoint-3"
    _, optimizer = trained(path)
    whole = optimizer.state_dict()

    def refusal(kind: type[Exception], **changes: Any) -> str:
        with pytest.raises(kind) as caught:
            plan_run(settings(path, **changes), data_root=data_root)
        return str(caught.value)

    assert "model.path" in refusal(ConfigError, init_from={"path": str(path), "optimizer": True})
    assert "with its adapter if it had one" in refusal(
        DataError, lora={"rank": 2, "target_modules": ["q_proj"]}
    )
    assert "muon" in refusal(ConfigError, optimizer={"name": "muon"})
    assert "not those of this model" in refusal(DataError, model=recipe()["model"])
    states = {
        "names parameters, as FSDP": {**whole, "state": {"model.norm.weight": whole["state"][0]}},
        "not of AdamW": {**whole, "state": {0: {"step": torch.tensor(1.0), "state1": torch.zeros(2)}}},
        "DeepSpeed's cannot be read": {"optimizer_state_dict": {}},
        "cannot be read": {"state": {0: Path("a")}},
    }
    for words, state in states.items():
        torch.save(state, path / "optimizer.pt")
        assert words in refusal(DataError)
    (path / "optimizer.pt").write_bytes(b"torn")
    assert "optimizer.pt cannot be read" in refusal(DataError)
    (path / "optimizer.pt").unlink()
    assert "weights alone" in refusal(DataError)
    for name in ("global_step3", "pytorch_model_fsdp_0"):
        (path / name).mkdir()
        found = refusal(DataError)
        assert "FSDP or DeepSpeed" in found and name in found


def test_moments_of_an_adapter_are_matched_before_work(data_root: Path, tmp_path: Path) -> None:
    """They were looked at when the first stage started, after the data had been made."""
    path = tmp_path / "checkpoint-3"
    model, _ = trained(path)
    lora = {"rank": 2, "target_modules": ["q_proj"], "trainable": ["norm"]}
    apply_lora(model, LoraConfig(**lora), seed=0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    steps(model, optimizer, range(1))
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    plan_run(settings(path, lora=lora), data_root=data_root)
    with pytest.raises(DataError, match="not those of this model"):
        plan_run(settings(path, lora={**lora, "rank": 4}), data_root=data_root)
