"""Checkpoints: each rank writes its part while training goes on; whole or absent, the newest few kept.

checkpoints/step-00000400/
  model-00000-of-00002.safetensors       parts of parameters by name (train/shard_files.py), one file a rank
  optimizer-00000-of-00002.safetensors   `<parameter>/<entry>`
  state.json                             counters, fingerprint, size and SHA-256 of every file; written last

The parts are copied to host memory, then a thread writes them. The ranks' threads agree over a process group of their
own: on the one that training uses, their messages would mix with those of the step. A checkpoint that is being
written lies aside under another name, so a kill costs at most the steps since the one before it.

Any number of ranks reads a checkpoint: each takes the rows of each tensor that it holds. Every byte is verified first,
the files dealt out over the ranks.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from longspan.core.errors import DataError
from longspan.core.files import atomic_dir, disk_errors, read_json, remove_leftovers, sha256_file, write_json
from longspan.core.log import get_logger
from longspan.parallel.fsdp import own_part
from longspan.parallel.launch import PATIENCE, on_all_ranks, on_first_rank
from longspan.parallel.signs_of_life import growing
from longspan.train.shard_files import PartFiles, TensorPart, Written, write_parts

VERSION = 2
KINDS = ("model", "optimizer")
EXIT_SECONDS = 10.0
"""How long a failing run waits for a checkpoint that is being written."""


class TrainProgress(NamedTuple):
    """Everything beside tensors that the next step depends on."""

    step: int
    """Optimizer steps done over all stages."""
    stage: int
    """Index of the current stage."""
    stage_step: int
    """Optimizer steps done in it."""
    tokens: int
    """Tokens seen over all stages."""
    loader: dict[str, Any]
    """Stream fingerprint and row position of the current stage."""
    weight: float = 0.0
    """Weight of the labels of all steps done in it; counted with `loss_average: steps`."""


class Checkpoint(NamedTuple):
    """A whole checkpoint, verified; its tensors are read when they are asked for."""

    path: Path
    progress: TrainProgress
    model: PartFiles
    optimizer: PartFiles


class Saved(NamedTuple):
    """What a finished checkpoint cost."""

    step: int
    held_seconds: float
    """While training waited: for the checkpoint before, and for the copy to host memory."""
    write_seconds: float
    """While training went on."""
    bytes: int


class Checkpointer:
    """Writes the checkpoints of a run, in the background; every rank has one and calls it at the same steps.

    with Checkpointer(folder, config_fingerprint="...", keep=2) as checkpointer:
        checkpointer.save(progress, model_tensors, optimizer_tensors)

    Leaving the block waits for the last one. When an error leaves it, at most for some seconds.
    """

    def __init__(self, folder: Path, *, config_fingerprint: str, keep: int) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.folder = folder
        self._fingerprint, self._keep = config_fingerprint, keep
        self._rank = dist.get_rank() if several else 0
        self._world = dist.get_world_size() if several else 1
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: Saved | None = None
        self._last: Path | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join(EXIT_SECONDS)

    def save(
        self,
        progress: TrainProgress,
        model: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
    ) -> Saved | None:
        """Copy the tensors and begin to write `step-<n>`, once the checkpoint before it is written.

        Returns what that one cost. It and the `keep - 1` before it stay until the new one is whole.

        Raises:
            RunError: a rank could not write the one before, on every rank.
        """
        started = time.monotonic()
        before = self.wait()
        parts = {"model": _copy_own_parts(model), "optimizer": _copy_own_parts(optimizer)}
        held = time.monotonic() - started
        self._thread = threading.Thread(
            target=self._run, args=(progress, parts, held), name="longspan-checkpoint", daemon=True
        )
        self._thread.start()
        return before

    def wait(self) -> Saved | None:
        """Wait until the checkpoint in the making is whole; return what it cost, None if there was none.

        Raises:
            RunError: a rank could not write its part, on every rank.
        """
        if self._thread is not None:
            with growing(self.folder):
                self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        saved, self._saved = self._saved, None
        return saved

    def latest(self) -> Checkpoint | None:
        """Return the last checkpoint that was written here, its bytes not read again; None if there is none."""
        return None if self._last is None else _open(self._last, self._fingerprint, verify=False)

    def _run(self, progress: TrainProgress, parts: dict[str, dict[str, TensorPart]], held: float) -> None:
        started = time.monotonic()
        try:
            written = self._write(progress, parts)
        except BaseException as error:  # noqa: BLE001 - raised again by wait()
            self._error = error
            return
        self._saved = Saved(progress.step, held, time.monotonic() - started, written)
        self._last = self.folder / _name(progress.step)

    def _write(self, progress: TrainProgress, parts: dict[str, dict[str, TensorPart]]) -> int:
        path = self.folder / _name(progress.step)
        with contextlib.ExitStack() as stack:

            def begin() -> str:
                return str(stack.enter_context(atomic_dir(path, replace=True))) if self._rank == 0 else ""

            aside = Path(on_all_ranks(begin, group=self.group)[0])
            shares = on_all_ranks(lambda: self._write_own(path, aside, parts), group=self.group)
            files = {name: written for share in shares for name, written in share.items()}

            def commit() -> None:
                if self._rank == 0:
                    head = {"version": VERSION, "config": self._fingerprint, **progress._asdict()}
                    head["files"] = {name: written._asdict() for name, written in files.items()}
                    write_json(aside / "state.json", head)
                    stack.close()
                    self._remove_old(path)

            on_all_ranks(commit, group=self.group)
        return sum(written.bytes for written in files.values())

    def _write_own(
        self, path: Path, aside: Path, parts: dict[str, dict[str, TensorPart]]
    ) -> dict[str, Written]:
        names = {kind: f"{kind}-{self._rank:05d}-of-{self._world:05d}.safetensors" for kind in KINDS}
        with disk_errors(path):
            return {name: write_parts(aside / name, parts[kind]) for kind, name in names.items()}

    def _remove_old(self, path: Path) -> None:
        # Later steps are damaged ones that were passed over: they must not push out the one just written.
        for old in [found for found in _checkpoints(self.folder) if found.name <= path.name][: -self._keep]:
            shutil.rmtree(old)


def load_latest(folder: Path, *, config_fingerprint: str) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None when there is none; all ranks call it and get the same one.

    A damaged checkpoint is skipped, with a warning, for the one before it.

    Raises:
        DataError: a checkpoint belongs to another recipe, or all are damaged.
    """
    log = get_logger("train")
    first = not dist.is_initialized() or dist.get_rank() == 0

    def names() -> list[str]:
        remove_leftovers(folder)
        return [path.name for path in _checkpoints(folder)]

    found = on_first_rank(names)
    for path in (folder / name for name in reversed(found)):
        try:
            checkpoint = _open(path, config_fingerprint)
        except _Damaged as error:
            if first:
                log.warning("checkpoint %s is damaged (%s); trying the one before it", path, error)
            continue
        log.info("resuming from %s", path)
        return checkpoint
    if found:
        raise DataError(
            f"every checkpoint in {folder} is damaged",
            fix="remove the folder to start over, or restore a copy",
        )
    return None


def find_checkpoint(path: Path) -> Path:
    """Return the newest checkpoint of a run folder, or `path` if it is a checkpoint itself; its bytes are not read.

    Raises:
        DataError: nothing is there.
    """
    found = _checkpoints(path / "checkpoints") or [path]
    if not (found[-1] / "state.json").is_file():
        raise DataError(
            f"{path} is not a checkpoint",
            found="no state.json and no checkpoints/" if path.is_dir() else "no such folder",
            fix="name a run folder or one of its checkpoints/step-*",
        )
    return found[-1]


def read_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open one checkpoint, of whatever recipe, or the newest of a run folder; all ranks call it if they `verify` it.

    Raises:
        DataError: it is damaged, or nothing is there.
    """
    path = find_checkpoint(path)
    try:
        return _open(path, None, verify=verify)
    except _Damaged as error:
        raise DataError(
            f"the checkpoint {path} is damaged", found=str(error), fix="use another one"
        ) from error


class _Damaged(Exception):
    """A checkpoint that is not whole."""


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _open(path: Path, config_fingerprint: str | None, *, verify: bool = True) -> Checkpoint:
    """Verify one checkpoint and open its files, on all ranks alike."""
    head = _read_head(path)
    if config_fingerprint not in (None, head["config"]):
        raise DataError(
            f"{path} was written by another recipe",
            found=head["config"],
            allowed=config_fingerprint,
            fix="use the recipe it was written with, or another --out",
        )
    if verify:
        _verify(path, head["files"])
    try:
        files = {
            kind: PartFiles(path / name for name in head["files"] if name.startswith(kind)) for kind in KINDS
        }
    except DataError as error:
        raise _Damaged(str(error)) from error
    progress = TrainProgress(**{name: head[name] for name in TrainProgress._fields if name in head})
    return Checkpoint(path, progress, files["model"], files["optimizer"])


def _verify(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare every byte with what was written; each rank reads its share of the files."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    def problem() -> str | None:
        for name, expected in list(files.items())[rank::world]:
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"] or sha256_file(file) != expected["sha256"]:
                return f"{name} is truncated or altered"
        return None

    for found in on_all_ranks(problem):
        if found is not None:
            raise _Damaged(found)


def _read_head(path: Path) -> dict[str, Any]:
    try:
        head = read_json(path / "state.json")
    except DataError as error:
        raise _Damaged(str(error)) from error
    if not isinstance(head, dict) or not {*TrainProgress._fields, "config", "files"} <= set(head):
        raise _Damaged("state.json lacks entries")
    if head.get("version") != VERSION:
        raise DataError(
            f"{path} was written by another version of longspan",
            found=f"format {head.get('version', 1)}",
            allowed=VERSION,
            fix="go on with that version, or start over in another --out",
        )
    return head


def _copy_own_parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorPart]:
    """Return copies in host memory of what this rank has to write: of replicas, only the first writes."""
    parts = {}
    for name, tensor in tensors.items():
        own = own_part(tensor)
        if own.is_writer:
            copy = own.local.detach().to("cpu", copy=True)
            parts[name] = TensorPart(copy, tuple(tensor.shape), own.start)
    return parts


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())
