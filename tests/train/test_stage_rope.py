"""One RoPE a stage: the factors of its context length, whoever set it, for every document, rank and resumed run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.core.errors import ConfigError
from longspan.core.records import read_jsonl
from longspan.models.hf import build_model, load_model, save_model
from longspan.train.config import TrainConfig
from longspan.train.known_models import known_model
from longspan.train.resolve import resolve
from longspan.train.run_plan import plan_run
from longspan.train.stage_model import empty_stage_model, rope_at, stage_model
from longspan.train.trainer import train
from tests.train.conftest import recipe

LENGTH = 48
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 4.0, 8.0],
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    # As Phi-3: without a factor, which follows from max_position_embeddings.
    "longrope": LONGROPE,
    "longrope with a factor": {**LONGROPE, "factor": 8.0},
}


@pytest.fixture(scope="module")
def own(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 16 positions with the same weights and RoPEs of their own."""
    root = tmp_path_factory.mktemp("own-ropes")
    fields = recipe()["model"]["hf_config"]
    for name, rope in {**OWN, "default": {"rope_type": "default"}}.items():
        model = build_model({**fields, "rope_parameters": {"rope_theta": 1e4, **rope}}, seed=0)
        with torch.no_grad():
            for weight in model.parameters():
                # Large enough for positions to matter.
                weight.mul_(6.0 if weight.ndim > 1 else 1.0)
        save_model(model, root / name)
    return root


def settings(model: Path, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Three steps of three rows of short documents, each row a micro-batch."""
    base = {
        "context_length": LENGTH, "steps": 3, "batch_tokens": 3 * LENGTH, "micro_batch_tokens": LENGTH,
        "lr": 1e-3, "streams": {"text": {"store": "plain", "pack": {"strategy": "best_fit"}}},
    }  # fmt: skip
    made = [{**base, "name": f"s{index}", **stage} for index, stage in enumerate(stages or [{}])]
    values = recipe(stages=made, optimizer={"name": "adamw"}, model={"path": str(model)})
    return {**values, "checkpoint": {"every_steps": 1, "keep": 9}, **changes}


def run(values: dict[str, Any], out: Path, data_root: Path) -> list[float]:
    train(TrainConfig.from_dict(values), out, data_root=data_root)
    steps = read_jsonl(out / "metrics.jsonl")
    return [step[name] for step in steps for name in ("loss", "grad_norm")]


def at_length(kind: str) -> dict[str, Any]:
    """What `OWN` is at LENGTH positions, written as a RoPE that does not depend on it."""
    if kind == "dynamic":
        # transformers' formula: theta * (factor * length / own - (factor - 1)) ** (d / (d - 2)), d = 8, own = 16.
        return {"rope_type": "default", "rope_theta": 1e4 * (4 * LENGTH / 16 - 3) ** (8 / 6)}
    factor = OWN[kind].get("factor", LENGTH / 16)
    return {**OWN[kind], "factor": factor, "short_factor": LONGROPE["long_factor"]}


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_nothing_but_the_context_length_decides_the_factors(
    data_root: Path, tmp_path: Path, own: Path, kind: str
) -> None:
    """A model's own dynamic NTK trained as default; factors went with micro-batches, validation and resumed runs."""
    one = run(settings(own / kind), tmp_path / "one", data_root)
    right = run(settings(own / "default", {"rope": at_length(kind)}), tmp_path / "right", data_root)
    plain = run(settings(own / "default"), tmp_path / "plain", data_root)
    assert one == pytest.approx(right, rel=1e-4)
    assert one != pytest.approx(plain, rel=1e-2), "positions do not matter"
    validation = {"stores": {"held out": "plain"}, "lengths": [8], "windows": 2, "every_steps": 1}
    chunks = {"chunk_tokens": 20}
    for name, changes in {
        "whole": {"stages": [{"micro_batch_tokens": 3 * LENGTH}]},
        "watched": {"validation": validation},
        "chunks": {"memory": chunks},
    }.items():
        found = run(settings(own / kind, *changes.pop("stages", [])) | changes, tmp_path / name, data_root)
        assert found == pytest.approx(one, rel=1e-4), name
    for late in ("checkpoints/step-00000002", "checkpoints/step-00000003", "stages"):
        shutil.rmtree(tmp_path / "one" / late)
    (tmp_path / "one" / "COMPLETE").unlink()
    assert run(settings(own / kind), tmp_path / "one", data_root) == one


@pytest.mark.parametrize("kind", OWN)
def test_ranks_without_values_have_the_config_of_the_first(own: Path, kind: str) -> None:
    """A rank that does not know the length scales attention otherwise than the one that loads the weights."""
    config = TrainConfig.from_dict(settings(own / kind))
    stage, known = config.stages[0], known_model(config.model, own)
    first, other = stage_model(config, stage, None, known), empty_stage_model(config, stage, known)
    assert first.config.to_dict() == other.config.to_dict()
    scales = [model.model.rotary_emb.attention_scaling for model in (first, other)]
    expected = AutoConfig.from_pretrained(
        own / kind, max_position_embeddings=16 if kind == "dynamic" else LENGTH
    )
    right = AutoModelForCausalLM.from_config(expected).model.rotary_emb.attention_scaling
    assert scales == [right, right]
    # Dynamic NTK works by the length that the model was made for.
    assert first.config.max_position_embeddings == expected.max_position_embeddings


def test_a_length_that_the_rope_leaves_out_is_the_models_own() -> None:
    """Raised for the stage before it is read, it would be the stage's: LongRoPE that never begins."""
    fields = {**recipe()["model"]["hf_config"], "rope_parameters": {**LONGROPE, "rope_theta": 1e4}}
    del fields["rope_parameters"]["original_max_position_embeddings"]
    config = TrainConfig.from_dict({**settings(Path("unused")), "model": {"hf_config": fields}})
    known = known_model(config.model, Path())
    for model in (
        stage_model(config, config.stages[0], None, known),
        empty_stage_model(config, config.stages[0], known),
    ):
        assert model.config.rope_parameters["original_max_position_embeddings"] == 16
        assert model.config.max_position_embeddings == LENGTH


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("model", "stages", "message"),
    [
        ("default", [{"rope": LINEAR, "context_length": 32}, {}], "'s1', which keeps the rope of stage 's0'"),
        ("default", [{"rope": LINEAR}], "stage 's0': the factor"),
        ("dynamic", [{"context_length": 80, "batch_tokens": 80}], "'s0', which keeps the rope of the model"),
        ("longrope", [{"context_length": 144, "batch_tokens": 144}], "'s0', which keeps the rope of the model"),
    ],
)  # fmt: skip
def test_a_factor_has_to_reach_whoever_set_it(
    data_root: Path, own: Path, model: str, stages: list[dict[str, Any]], message: str
) -> None:
    """A rope that a stage repeats was checked; the same one inherited, or the model's own, was not."""
    stages = [{"micro_batch_tokens": None, **stage} for stage in stages]
    with pytest.raises(ConfigError, match=f"{message}(.|\n)*does not match the context length"):
        plan_run(TrainConfig.from_dict(settings(own / model, *stages)), data_root=data_root)
    meant = [{**stage, "rope_falls_short": True} for stage in stages]
    plan_run(TrainConfig.from_dict(settings(own / model, *meant)), data_root=data_root)


def test_a_theta_stays_until_another_is_set(own: Path) -> None:
    """A stage that changes the type alone fell back to the theta of the base model."""
    ropes: list[dict[str, Any]] = [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 4.0},
    ]
    config = TrainConfig.from_dict(settings(own / "default", *({"rope": rope} for rope in ropes), {}))
    found = [rope_at(config, stage) for stage in config.stages]
    assert found == [ropes[0], {**ropes[1], "rope_theta": 5e5}, {**ropes[1], "rope_theta": 5e5}]
    model = stage_model(config, config.stages[2], None, known_model(config.model, own))
    assert model.config.rope_parameters["rope_theta"] == 5e5


def test_a_long_stage_on_a_short_model_without_a_rope_is_said(
    data_root: Path, tmp_path: Path, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Positions that the model has never seen, trained with frequencies that nobody chose."""
    config = TrainConfig.from_dict(
        settings(own / "default", {}, {"rope": {"rope_type": "default", "rope_theta": 5e4}})
    )
    notes = [note for note in resolve(config, "r", data_root=data_root).notes if "rope" in note]
    assert len(notes) == 1 and "'s0' has 48 positions, the model 16" in notes[0]
    with caplog.at_level(logging.WARNING, "longspan"):
        result = train(config, tmp_path / "run", data_root=data_root)
    assert notes[0] in caplog.text
    assert load_model(result.models["s1"]).config.rope_parameters["rope_theta"] == 5e4
