"""Checkpoints: model, optimizer and counters, whole or absent, the newest few kept.

checkpoints/step-00000400/
  model.safetensors        parameters by name
  optimizer.safetensors    `<parameter>/<entry>`
  state.json               counters, fingerprints, size and SHA-256 of the files above; written last
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from longspan.core.errors import DataError
from longspan.core.files import atomic_dir, read_json, remove_leftovers, sha256_file, write_json
from longspan.core.log import get_logger

TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")


class TrainState(NamedTuple):
    """Everything that the next step depends on."""

    step: int
    """Optimizer steps done over all stages."""
    stage: int
    """Index of the current stage."""
    stage_step: int
    """Optimizer steps done in it."""
    tokens: int
    """Tokens seen over all stages."""
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    loader: dict[str, Any]
    """Stream fingerprint and row position of the current stage."""


def save_checkpoint(folder: Path, state: TrainState, *, config_fingerprint: str, keep: int) -> Path:
    """Write `state` as `folder/step-<n>` and keep that and the `keep - 1` before it. Raises RunError on a full disk."""
    path = folder / f"step-{state.step:08d}"
    with atomic_dir(path, replace=True) as aside:
        for name, tensors in zip(TENSOR_FILES, (state.model, state.optimizer)):
            save_file({key: value.contiguous() for key, value in tensors.items()}, aside / name)
        files = {
            name: {"bytes": (aside / name).stat().st_size, "sha256": sha256_file(aside / name)}
            for name in TENSOR_FILES
        }
        counters = {
            name: getattr(state, name) for name in ("step", "stage", "stage_step", "tokens", "loader")
        }
        write_json(aside / "state.json", {**counters, "config": config_fingerprint, "files": files})
    # Later steps are damaged ones that were passed over: they must not push out the one just written.
    for old in [found for found in _checkpoints(folder) if found.name <= path.name][:-keep]:
        shutil.rmtree(old)
    return path


def load_latest(folder: Path, *, config_fingerprint: str) -> TrainState | None:
    """Return the newest whole checkpoint, or None when there is none.

    A damaged checkpoint is passed over, aloud, for the one before it.

    Raises:
        DataError: a checkpoint belongs to another recipe, or all are damaged.
    """
    log = get_logger("train")
    remove_leftovers(folder)
    paths = _checkpoints(folder)
    for path in reversed(paths):
        try:
            state = load_checkpoint(path, config_fingerprint=config_fingerprint)
        except _Damaged as error:
            log.warning("checkpoint %s is damaged (%s); trying the one before it", path, error)
            continue
        log.info("resuming from %s", path)
        return state
    if paths:
        raise DataError(
            f"every checkpoint in {folder} is damaged",
            fix="remove the folder to start over, or restore a copy",
        )
    return None


def read_checkpoint(path: Path) -> TrainState:
    """Read one checkpoint, of whatever recipe, and verify every byte of it. Raises DataError if it is damaged."""
    try:
        return load_checkpoint(path, config_fingerprint=_read_head(path)["config"])
    except _Damaged as error:
        raise DataError(
            f"the checkpoint {path} is damaged", found=str(error), fix="use another one"
        ) from error


def load_checkpoint(path: Path, *, config_fingerprint: str) -> TrainState:
    """Read one checkpoint and verify every byte of it."""
    head = _read_head(path)
    if head["config"] != config_fingerprint:
        raise DataError(
            f"{path} was written by another recipe",
            found=head["config"],
            allowed=config_fingerprint,
            fix="use the recipe it was written with, or another --out",
        )
    tensors = []
    for name in TENSOR_FILES:
        expected = head["files"].get(name)
        file = path / name
        if expected is None or not file.exists():
            raise _Damaged(f"{name} is missing")
        if file.stat().st_size != expected["bytes"] or sha256_file(file) != expected["sha256"]:
            raise _Damaged(f"{name} is truncated or altered")
        try:
            tensors.append(load_file(file))
        except SafetensorError as error:
            raise _Damaged(f"{name}: {error}") from error
    counters = {name: head[name] for name in ("step", "stage", "stage_step", "tokens", "loader")}
    return TrainState(model=tensors[0], optimizer=tensors[1], **counters)


class _Damaged(Exception):
    """A checkpoint that is not whole."""


def _read_head(path: Path) -> dict[str, Any]:
    try:
        head = read_json(path / "state.json")
    except DataError as error:
        raise _Damaged(str(error)) from error
    keys = {"step", "stage", "stage_step", "tokens", "loader", "config", "files"}
    if not isinstance(head, dict) or not keys <= set(head):
        raise _Damaged("state.json lacks entries")
    return head


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())
