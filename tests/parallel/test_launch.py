"""Starting processes and ending them: nothing waits for ever, and the rank that failed is the one that speaks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan.core.errors import ArgumentError, ConfigError, DataError, RunError
from longspan.core.heartbeat import beat, watched_by
from longspan.parallel import launch, signs_of_life
from longspan.parallel.launch import Watchdog, lost_ranks, on_first_rank, process_group, spawn_local
from longspan.parallel.signs_of_life import first_reads, growing
from tests.patience import PATIENCE_SECONDS


def behave(rank: int, fate: str) -> Any:
    if fate == "sum":
        mine = torch.tensor([rank + 1.0])
        dist.all_reduce(mine)
        return mine
    if rank == 1:
        if fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "wrong":
            raise ValueError("one of a kind")
    # The others wait for rank 1.
    dist.barrier()
    return None


def first(rank: int) -> list[Any]:
    def refuse() -> None:
        raise ConfigError("the folder is taken", fix="use another")

    answers: list[Any] = [on_first_rank(lambda: os.environ.get("NOBODY", f"said by {rank}"))]
    try:
        on_first_rank(refuse)
    except ConfigError as error:
        answers.append(str(error))
    return answers


def test_results_come_back_by_rank() -> None:
    """Tensors are sent as shared memory: it must outlive the process that made it."""
    results = spawn_local(behave, 2, "sum", timeout_seconds=PATIENCE_SECONDS)
    assert [result.tolist() for result in results] == [[3.0], [3.0]]


@pytest.mark.parametrize(
    ("fate", "found"), [("killed", "rank 1 of 2 died"), ("wrong", r"one of a kind \(.*test_launch.py:\d+\)")]
)
def test_the_rank_that_failed_is_named_and_the_others_are_ended(fate: str, found: str) -> None:
    """The peers of a dead rank fail too, with what gloo says: that is not the reason."""
    with pytest.raises(RunError, match=found):
        spawn_local(behave, 2, fate, timeout_seconds=PATIENCE_SECONDS)


def test_what_the_first_rank_does_all_know() -> None:
    """Other ranks that go on after the first one was refused wait for it until the timeout."""
    results = spawn_local(first, 2, timeout_seconds=PATIENCE_SECONDS)
    assert results[0] == results[1]
    assert results[0][0] == "said by 0"
    assert "the folder is taken" in results[0][1] and "use another" in results[0][1]


def test_no_process_is_a_mistake() -> None:
    """A world of 0 would return no result, as if all had gone well."""
    with pytest.raises(ArgumentError, match="at least one"):
        spawn_local(behave, 0, "sum")


def test_one_process_needs_no_group_unless_asked() -> None:
    """A group left behind is found by the next run in the process, with the wrong size."""
    with process_group(timeout_seconds=PATIENCE_SECONDS) as device:
        assert not dist.is_initialized() and device.type in ("cpu", "cuda")
    with process_group(timeout_seconds=PATIENCE_SECONDS, always=True):
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()


def test_only_lost_ranks_are_reported_as_lost() -> None:
    """An error of shapes must keep its traceback: it is a bug."""
    with pytest.raises(RuntimeError, match="shapes"), lost_ranks("adding"):
        raise RuntimeError("shapes do not match")
    with pytest.raises(RunError, match="lost the others while adding"), lost_ranks("adding"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5")


STUCK = """
from longspan.parallel.launch import Watchdog

def turn_in_circles():
    while True:
        pass

with Watchdog(0.5) as dog:
    dog.beat("turning")
    turn_in_circles()
"""


class FakeEvent:
    """Work on a GPU that has ended when a test says so."""

    ended = False

    def record(self, stream: object) -> None:
        assert stream == "of card 3"

    def query(self) -> bool:
        return self.ended


def test_work_that_ends_on_the_gpu_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host may be a whole step ahead and wait: while queued blocks end one by one, nothing is stuck."""
    events: list[FakeEvent] = []
    clock = 0.0

    def made() -> FakeEvent:
        events.append(FakeEvent())
        return events[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of card {device}")
    monkeypatch.setattr(torch.cuda, "Event", made)
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: clock))
    dog = Watchdog(10.0)
    with watched_by(dog._goes_on):
        dog.beat("step 1")
        beat()
        beat()
    moved = []
    for clock in (8.0, 16.0, 24.0, 32.0):
        if clock < 30:
            events[len(moved)].ended = True
        dog._look_at_the_gpu()
        moved.append(dog._since)
    assert moved == [8.0, 16.0, 24.0, 24.0]


def _wait_for_a_slow_disk(rank: int, folder: Path) -> int:
    """Rank 0 writes until rank 1 has beaten, which by then does nothing but wait; return the beats of this rank."""
    store, beats = dist.distributed_c10d._get_default_store(), []

    def watcher() -> None:
        beats.append(rank)
        if rank == 1:
            store.set("beaten", "yes")

    def write() -> None:
        (folder / "part").write_bytes(b"a model")
        store.wait(["beaten"])

    patch = pytest.MonkeyPatch()
    patch.setattr(signs_of_life, "GROWTH_SECONDS", 0.02)
    with watched_by(watcher), growing(folder):
        dist.barrier()  # both have looked
        on_first_rank(write, group=dist.new_group(backend="gloo", timeout=launch.PATIENCE))
    return len(beats)


def test_ranks_that_wait_for_what_is_written_are_not_stuck(tmp_path: Path) -> None:
    """The end of a stage writes a whole model on one rank: longer than the timeout, and the others' watchdogs ended
    them."""
    (tmp_path / "stage").mkdir()
    beats = spawn_local(_wait_for_a_slow_disk, 2, tmp_path, timeout_seconds=PATIENCE_SECONDS)
    assert beats[1] > 0


def _wait_for_a_large_model(rank: int) -> tuple[int, str | None, str]:
    """Rank 0 reads until rank 1 has beaten; return the beats, what was read and the message of a failure."""
    store, beats = dist.distributed_c10d._get_default_store(), []

    def watcher() -> None:
        beats.append(rank)
        if rank == 1:
            store.set("beaten", "yes")

    def read() -> str:
        while not store.check(["beaten"]):
            bytearray(1 << 22)  # memory that was not there before
        return "model"

    def fail() -> str:
        raise DataError("half of it is missing")

    patch = pytest.MonkeyPatch()
    patch.setattr(signs_of_life, "GROWTH_SECONDS", 0.02)
    group, message = dist.new_group(backend="gloo", timeout=launch.PATIENCE), ""
    with watched_by(watcher):
        found = first_reads(read, group=group)
    try:
        first_reads(fail, group=group)
    except DataError as error:
        message = str(error)
    return len(beats), found, message


def test_ranks_that_wait_for_the_first_to_read_a_model_are_not_stuck() -> None:
    """A large model is read by one rank for longer than the timeout: each watchdog ended its rank, the reader's too."""
    first, other = spawn_local(_wait_for_a_large_model, 2, timeout_seconds=PATIENCE_SECONDS)
    assert first[0] > 0 and other[0] > 0
    assert (first[1], other[1]) == ("model", None)
    assert first[2] == other[2] == "half of it is missing"


SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}


@pytest.mark.parametrize("environment", [SRUN, TORCHRUN])
@pytest.mark.parametrize(("gpus", "expected"), [(8, 3), (1, 0)])
def test_each_process_shares_matrices_on_its_own_gpu(
    environment: dict[str, str], gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads LOCAL_RANK: without it all ranks of srun meet on card 0, with srun's own masks on none."""
    for name in (*SRUN, *TORCHRUN):
        monkeypatch.setenv(name, "")  # what is set from here on is put back
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bound: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with process_group(timeout_seconds=1) as device:
        assert device == torch.device("cuda", expected)
        assert bound == [expected] and os.environ["LOCAL_RANK"] == str(expected)


def test_the_watchdog_ends_a_process_that_is_stuck_in_python() -> None:
    """No timeout of a collective fires where none is called."""
    done = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 1
    assert "no progress for 0.5 s (turning)" in done.stderr
    assert "turn_in_circles" in done.stderr
