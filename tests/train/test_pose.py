"""PoSE: skipped positions, and that they reach the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.records import read_jsonl
from longspan.models.hf import build_model, load_model
from longspan.train.batch import collate
from longspan.train.config import PoseConfig, TrainConfig
from longspan.train.objectives import ModelWithLoss
from longspan.train.pose import document_positions
from longspan.train.streams import plan_stage, stage_rows
from longspan.train.trainer import train
from tests.train.conftest import recipe


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 200), st.integers(2, 5), st.integers(0, 99))
def test_positions_rise_and_stay_below_the_target(length: int, target: int, chunks: int, seed: int) -> None:
    """A position past the target is never seen in use; one that falls puts tokens out of order."""
    pose = PoseConfig(target_length=target, chunks=chunks)
    positions = document_positions(np.random.default_rng(seed), length, pose)
    assert positions[0] == 0 and (np.diff(positions) >= 1).all()
    assert positions[-1] < max(length, target)
    assert (np.diff(positions) > 1).sum() <= chunks - 1


def test_over_many_documents_every_distance_occurs() -> None:
    """Skips that always lie in one place train only a few distances."""
    pose = PoseConfig(target_length=64)
    generator = np.random.default_rng(0)
    ends = [int(document_positions(generator, 8, pose)[-1]) for _ in range(2000)]
    assert set(range(7, 64)) == set(ends)


def pose_recipe() -> TrainConfig:
    values = recipe()
    first = {**values["stages"][0], "pose": {"target_length": 64}, "tokens": 16 * 8 * 2}
    return TrainConfig.from_dict({**values, "stages": [first]})


def test_positions_reach_the_model_and_its_config(data_root: Path, tmp_path: Path) -> None:
    """Positions that stop at the batch would train an ordinary short context; the saved model says 64."""
    config = pose_recipe()
    plan = plan_stage(config.stages[0], data_root=data_root, seed=config.seed)
    rows = stage_rows(plan, 0, 3, seed=config.seed)
    again = stage_rows(plan, 1, 2, seed=config.seed)
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(rows[1:], again)), (
        "a function of the row"
    )
    batch = collate(rows)
    assert batch.positions.max() >= 16
    assert config.model.hf_config is not None
    # Weights as small as a new model's attend to everything alike, wherever it stands.
    sharp = {"max_position_embeddings": 64, "initializer_range": 0.5}
    model = build_model({**config.model.hf_config, **sharp}, seed=0)
    loss = ModelWithLoss(model)(batch).loss.item()
    plain = ModelWithLoss(model)(batch._replace(positions=batch.documents.positions())).loss.item()
    assert abs(loss - plain) > 1e-2
    result = train(config, tmp_path / "run", data_root=data_root)
    assert load_model(result.models["short"]).config.max_position_embeddings == 64
    assert all(
        torch.isfinite(torch.tensor(r["loss"])) for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")
    )
