"""Runs that are killed at a given moment, made quickly: one process imports everything, then forks the ranks.

Each line of its input is JSON: [{"recipe", "data_root", "out", "world", "kill": null | [rank, moment],
"stop_after_step": null | step}, ...]. A moment is counted in everything that could matter: steps and micro-batches
begun and ended, lines written, files of a checkpoint begun and ended, renames. Answers each line with one: a JSON list
with, for each job, the moments that each rank has lived through; null for one that did not reach the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longspan.core.records import JsonlWriter
from longspan.train import checkpoint, trainer
from longspan.train.config import TrainConfig
from tests.ports import free_port


class Moments:
    """Counts moments, and ends the process with SIGKILL at one of them."""

    def __init__(self, last: int | None) -> None:
        self.count, self.last = 0, last
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self()
            result = function(*args, **kwargs)
            self()
            return result

        return counted


def rank_of(job: dict[str, Any], rank: int, port: int, told: Path) -> None:
    """Be one rank of a job; never returns."""
    code = 1
    try:
        if job["world"] > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
        kill = job["kill"]
        moment = Moments(kill[1] if kill is not None and kill[0] == rank else None)
        trainer.train_step = moment.around(trainer.train_step)
        checkpoint.write_parts = moment.around(checkpoint.write_parts)
        JsonlWriter.write = moment.around(JsonlWriter.write)  # type: ignore[method-assign]
        torch.Tensor.backward = moment.around(torch.Tensor.backward)  # type: ignore[method-assign]
        os.replace = moment.around(os.replace)
        if job["stop_after_step"] is not None:
            stop_after(job["stop_after_step"])
        trainer.train(TrainConfig.from_yaml(job["recipe"]), job["out"], data_root=job["data_root"])
        told.write_text(str(moment.count))
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def stop_after(last: int) -> None:
    """End the process when the checkpoint of step `last` is whole."""
    save = checkpoint.Checkpointer.save

    def save_and_stop(
        self: checkpoint.Checkpointer, progress: checkpoint.TrainProgress, *tensors: Any
    ) -> Any:
        saved = save(self, progress, *tensors)
        if progress.step == last:
            self.wait()
            os._exit(0)
        return saved

    checkpoint.Checkpointer.save = save_and_stop  # type: ignore[assignment]


def run(job: dict[str, Any]) -> list[int | None]:
    """Fork the ranks of a job; when one is killed, so are the others."""
    port = free_port()
    told = [Path(f"{job['out']}.rank{rank}") for rank in range(job["world"])]
    ranks = {}
    for rank, file in enumerate(told):
        file.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            rank_of(job, rank, port, file)
        ranks[pid] = rank
    while ranks:
        pid, status = os.wait()
        del ranks[pid]
        if os.waitstatus_to_exitcode(status) != 0:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            if job["kill"] is None:
                raise SystemExit(f"a rank of {job['out']} failed by itself: {status}")
    return [int(file.read_text()) if file.exists() else None for file in told]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps([run(job) for job in json.loads(line)]), flush=True)
