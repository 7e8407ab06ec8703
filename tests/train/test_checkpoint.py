"""Checkpoints are whole or passed over."""

from __future__ import annotations

import errno
import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from longspan.core.errors import DataError, RunError
from longspan.parallel.fsdp import fill
from longspan.parallel.launch import spawn_local
from longspan.train import checkpoint
from longspan.train.checkpoint import Checkpointer, TrainProgress, load_latest, read_checkpoint
from longspan.train.shard_files import PartFiles, TensorPart, write_parts
from tests.patience import PATIENCE_SECONDS

MODEL = "model-00000-of-00001.safetensors"


def save(folder: Path, step: int, *, keep: int = 2) -> None:
    with Checkpointer(folder, config_fingerprint="c", keep=keep) as checkpointer:
        checkpointer.save(
            TrainProgress(step=step, stage=0, stage_step=step, tokens=10 * step, loader={"position": step}),
            {"w": torch.full((3,), float(step))},
            {"w/exp_avg": torch.ones(3), "w/step": torch.tensor(float(step))},
        )


def test_the_newest_comes_back_and_only_the_last_two_stay(tmp_path: Path) -> None:
    """Keeping all checkpoints fills the disk, keeping one leaves nothing when it is damaged."""
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]
    loaded = load_latest(tmp_path, config_fingerprint="c")
    assert loaded is not None
    assert loaded.progress == TrainProgress(15, 0, 15, 150, {"position": 15})
    assert torch.equal(loaded.model.read("w"), torch.full((3,), 15.0))
    assert loaded.optimizer.read("w/step").item() == 15.0


@pytest.mark.parametrize("name", [MODEL, "optimizer-00000-of-00001.safetensors", "state.json"])
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
        save(tmp_path, step)
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
    assert loaded is not None and loaded.progress.step == 5
    assert "step-00000010 is damaged" in caplog.text


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    """Resuming with other settings would mix two runs."""
    save(tmp_path, 5)
    with pytest.raises(DataError, match="another recipe"):
        load_latest(tmp_path, config_fingerprint="d")


def test_nothing_but_damaged_checkpoints_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    """Starting over in silence would throw days of training away."""
    save(tmp_path, 5)
    (tmp_path / "step-00000005" / MODEL).write_bytes(b"")
    with pytest.raises(DataError, match="every checkpoint"):
        load_latest(tmp_path, config_fingerprint="c")
    assert load_latest(tmp_path / "empty", config_fingerprint="c") is None


def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    """With one checkpoint kept, the damaged one was counted as it, and a kill left nothing to go on from."""
    for step in (5, 10):
        save(tmp_path, step)
    (tmp_path / "step-00000010" / MODEL).write_bytes(b"")
    assert load_latest(tmp_path, config_fingerprint="c") is not None
    save(tmp_path, 7, keep=1)
    loaded = load_latest(tmp_path, config_fingerprint="c")
    assert loaded is not None and loaded.progress.step == 7


def test_a_checkpoint_is_a_copy_of_the_moment_it_was_taken(tmp_path: Path) -> None:
    """Written in the background from the live tensors, it would hold a mixture of two steps."""
    weight = torch.zeros(1000)
    with Checkpointer(tmp_path, config_fingerprint="c", keep=2) as checkpointer:
        checkpointer.save(TrainProgress(1, 0, 1, 1, {}), {"w": weight}, {})
        weight.fill_(7.0)
        assert checkpointer.wait() is not None
        latest = checkpointer.latest()
    assert latest is not None and latest.model.read("w").max() == 0


def test_a_full_disk_is_told_at_the_next_step_that_asks_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a thread is lost unless somebody raises it; a half-written folder is taken for a checkpoint."""
    save(tmp_path, 5)

    def full(path: Path, parts: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_parts", full)
    with pytest.raises(RunError, match="No space left"):
        save(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_checkpoint_in_an_older_format_is_named_not_called_damaged(tmp_path: Path) -> None:
    """Passed over as damaged, it would be lost in silence when the next one is written."""
    save(tmp_path, 5)
    head = json.loads((tmp_path / "step-00000005" / "state.json").read_text())
    del head["version"]
    (tmp_path / "step-00000005" / "state.json").write_text(json.dumps(head))
    with pytest.raises(DataError, match="another version"):
        load_latest(tmp_path, config_fingerprint="c")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_rows_are_put_together_from_the_files_that_hold_them(tmp_path: Path, dtype: torch.dtype) -> None:
    """Seven rows in files of three, three and one: a reader asks for any range, whoever wrote it."""
    whole = torch.arange(14).reshape(7, 2).to(dtype)
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for path, start in zip(paths, (0, 3, 6)):
        write_parts(path, {"w": TensorPart(whole[start : start + 3], (7, 2), start)})
    files = PartFiles(reversed(paths))
    for start in range(7):
        for rows in range(7 - start):
            assert torch.equal(files.read("w", start, rows), whole[start : start + rows])
    assert torch.equal(files.read("w"), whole) and files.read("w").dtype == dtype
    with pytest.raises(DataError, match="w from row 3"):
        PartFiles([paths[0], paths[2]]).read("w")
    # Other tools read a part as a plain safetensors file.
    assert torch.equal(load_file(paths[1])["w"], whole[3:6])


def write_and_break(rank: int, folder: str) -> list[str]:
    """Three checkpoints of two ranks; the last cannot be written by rank 1."""
    mesh = init_device_mesh("cpu", (2,))
    told = []
    with Checkpointer(Path(folder), config_fingerprint="c", keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.wait()
            if rank == 1 and step == 3:
                checkpoint.write_parts = broken  # type: ignore[assignment]
            weight = distribute_tensor(torch.arange(5.0)[:, None] + step, mesh, [Shard(0)])
            one = distribute_tensor(torch.full((1,), float(step)), mesh, [Shard(0)])
            tensors = {"w": weight, "one": one, "b": torch.tensor(float(step))}
            checkpointer.save(TrainProgress(step, 0, step, step, {}), tensors, {"w/step": torch.tensor(1.0)})
        try:
            checkpointer.wait()
        except RunError as error:
            told.append(str(error))
    found = load_latest(Path(folder), config_fingerprint="c")
    assert found is not None
    back = distribute_tensor(torch.zeros(5, 1), mesh, [Shard(0)])
    fill(back, partial(found.model.read, "w"))
    assert torch.equal(back.full_tensor(), torch.arange(5.0)[:, None] + found.progress.step)
    return [*told, found.path.name]


def broken(path: Path, parts: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_two_ranks_write_their_parts_and_fail_together(tmp_path: Path) -> None:
    """A rank that goes on while another could not write takes half a checkpoint for a whole one."""
    told = spawn_local(write_and_break, 2, str(tmp_path), timeout_seconds=PATIENCE_SECONDS)
    assert told[0] == told[1]
    assert "No space left" in told[0][0] and told[0][1] == "step-00000002"
    files = sorted(path.name for path in (tmp_path / "step-00000002").iterdir())
    assert [name for name in files if name.startswith("model")] == [
        "model-00000-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
    ]
    # One process reads what two have written; a lost part is damage.
    found = load_latest(tmp_path, config_fingerprint="c")
    assert found is not None and torch.equal(found.model.read("w")[:, 0], torch.arange(5.0) + 2)
    (tmp_path / "step-00000002" / files[1]).unlink()
    with pytest.raises(DataError, match="is damaged"):
        read_checkpoint(tmp_path / "step-00000002")
