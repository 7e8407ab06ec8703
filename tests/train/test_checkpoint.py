"""Checkpoints are whole or passed over."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from longspan.core.errors import DataError
from longspan.train.checkpoint import TrainState, load_latest, save_checkpoint


def state(step: int) -> TrainState:
    return TrainState(
        step=step,
        stage=0,
        stage_step=step,
        tokens=10 * step,
        model={"w": torch.full((3,), float(step))},
        optimizer={"w/exp_avg": torch.ones(3), "w/step": torch.tensor(float(step))},
        loader={"position": step, "fingerprint": "f"},
    )


def test_the_newest_comes_back_and_only_the_last_two_stay(tmp_path: Path) -> None:
    """Keeping all checkpoints fills the disk, keeping one leaves nothing when it is damaged."""
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, state(step), config_fingerprint="c", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]
    loaded = load_latest(tmp_path, config_fingerprint="c")
    assert loaded is not None
    assert loaded.step == 15 and loaded.tokens == 150
    assert torch.equal(loaded.model["w"], torch.full((3,), 15.0))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_refused_aloud_and_the_one_before_it_used(
    tmp_path: Path,
    name: str,
    damage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A truncated file that loads anyway would train on from garbage."""
    for step in (5, 10):
        save_checkpoint(tmp_path, state(step), config_fingerprint="c", keep=2)
    file = tmp_path / "step-00000010" / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[-3] ^= 0xFF
        file.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    monkeypatch.setattr(logging.getLogger("longspan"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="longspan"):
        loaded = load_latest(tmp_path, config_fingerprint="c")
    assert loaded is not None and loaded.step == 5
    assert "step-00000010 is damaged" in caplog.text


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    """Resuming with other settings would mix two runs."""
    save_checkpoint(tmp_path, state(5), config_fingerprint="c", keep=2)
    with pytest.raises(DataError, match="another recipe"):
        load_latest(tmp_path, config_fingerprint="d")


def test_nothing_but_damaged_checkpoints_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    """Starting over in silence would throw days of training away."""
    save_checkpoint(tmp_path, state(5), config_fingerprint="c", keep=2)
    (tmp_path / "step-00000005" / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="every checkpoint"):
        load_latest(tmp_path, config_fingerprint="c")
    assert load_latest(tmp_path / "empty", config_fingerprint="c") is None


def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    """With one checkpoint kept, the damaged one was counted as it, and a kill left nothing to go on from."""
    for step in (5, 10):
        save_checkpoint(tmp_path, state(step), config_fingerprint="c", keep=2)
    (tmp_path / "step-00000010" / "model.safetensors").write_bytes(b"")
    assert load_latest(tmp_path, config_fingerprint="c") is not None
    save_checkpoint(tmp_path, state(7), config_fingerprint="c", keep=1)
    loaded = load_latest(tmp_path, config_fingerprint="c")
    assert loaded is not None and loaded.step == 7
