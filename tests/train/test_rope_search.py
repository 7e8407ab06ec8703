"""LongRoPE on a model: candidates are scored with their own frequencies, and the model stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longspan.core.errors import ConfigError
from longspan.kernels.longrope import LongRopeSearch, attention_scaling
from longspan.models.hf import build_model, load_model, rope_fingerprint, save_model
from longspan.train.batch import collate, total_weight
from longspan.train.config import TrainConfig
from longspan.train.objectives import ModelWithLoss
from longspan.train.rope_search import score_factors, search_rope
from longspan.train.streams import plan_stage, stage_rows
from longspan.train.trainer import train
from tests.train.conftest import recipe


def long_recipe(tmp_path: Path) -> TrainConfig:
    values = recipe()
    save_model(build_model(values["model"]["hf_config"], seed=1), tmp_path / "base")
    stage = {**values["stages"][1], "rope": None, "optimizer_state": "fresh", "tokens": 48 * 2 * 2}
    return TrainConfig.from_dict({**values, "model": {"path": str(tmp_path / "base")}, "stages": [stage]})


def test_factors_of_one_are_the_model_itself(data_root: Path, tmp_path: Path) -> None:
    """A score that forgets to restore, or scales cos twice, would rank candidates by chance."""
    config = long_recipe(tmp_path)
    model = load_model(tmp_path / "base", max_position_embeddings=48)
    rows = stage_rows(plan_stage(config.stages[0], data_root=data_root, seed=3), 0, 3, seed=3)
    before = rope_fingerprint(model)
    with torch.no_grad():
        for weight in model.parameters():
            # New weights are so small that attention hardly looks at positions.
            weight.mul_(4.0)
        plain = sum(ModelWithLoss(model)(collate([row])).loss.item() for row in rows) / total_weight(rows)
    assert score_factors(model, rows, [1.0] * 4, theta=1e4, scaling=1.0) == pytest.approx(plain, rel=1e-6)
    assert score_factors(model, rows, [8.0] * 4, theta=1e4, scaling=1.0) != pytest.approx(plain, rel=1e-6)
    assert rope_fingerprint(model) == before


def test_what_is_found_trains_and_is_what_was_scored(data_root: Path, tmp_path: Path) -> None:
    """Factors that mean something else to transformers than to the search would be worthless."""
    config = long_recipe(tmp_path)
    found = search_rope(config, "long", data_root=data_root, rows=2, search=LongRopeSearch(6, 2, 2, 2))
    assert found.result.score <= min(found.result.started_at.values())
    stage = {**config.to_dict()["stages"][0], "rope": found.rope}
    trained = TrainConfig.from_dict({**config.to_dict(), "stages": [stage]})
    model = load_model(tmp_path / "base", rope=found.rope, max_position_embeddings=48)
    rows = [
        row
        for row in stage_rows(plan_stage(config.stages[0], data_root=data_root, seed=3), 0, 8, seed=3)
        if max(row.cu_seqlens[1:] - row.cu_seqlens[:-1]) > 16
    ]
    with torch.no_grad():
        loaded = sum(ModelWithLoss(model)(collate([row])).loss.item() for row in rows) / total_weight(rows)
    plain = load_model(tmp_path / "base", max_position_embeddings=48)
    scored = score_factors(
        plain, rows, found.result.factors, theta=1e4, scaling=attention_scaling(48 / 16, 16)
    )
    assert rows and loaded == pytest.approx(scored, rel=1e-5)
    result = train(trained, tmp_path / "run", data_root=data_root)
    assert load_model(result.models["long"]).config.rope_parameters["rope_type"] == "longrope"


def test_stages_and_models_that_cannot_be_searched_are_named(data_root: Path, tmp_path: Path) -> None:
    """A model from scratch has nothing to spare; a wrong stage gets the list."""
    config = long_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"no such stage(.|\n)*long"):
        search_rope(config, "lang", data_root=data_root)
    with pytest.raises(ConfigError, match="from scratch"):
        search_rope(TrainConfig.from_dict(recipe()), "long", data_root=data_root)
