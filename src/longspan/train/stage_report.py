"""What a run reports while it trains: metrics.jsonl, validation.jsonl, events, the log, trackers, the bar."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from longspan.core.errors import RunError
from longspan.core.files import atomic_write
from longspan.core.log import get_logger
from longspan.core.progress import progress
from longspan.core.records import JsonlWriter, read_jsonl
from longspan.core.rundir import RunDir
from longspan.data.rows.loader import PackedRow
from longspan.models.hf import rope_fingerprint
from longspan.models.routing import RoutingReport
from longspan.parallel.mesh import Mesh
from longspan.train.checkpoint import Saved
from longspan.train.config import StageConfig, TrainConfig
from longspan.train.metrics import LossBreakdown, StepFlops, peak_memory
from longspan.train.routing import routing_record
from longspan.train.tracking import open_trackers, scalars

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
LOST_STEPS = 10
"""Steps without a number at the end of a stage, of which it did not come back."""


class StepResult(NamedTuple):
    """What is recorded of one optimizer step; losses are None when it was skipped or had no labels."""

    loss: float | None
    grad_norm: float | None
    loss_by_source: dict[str, float]
    loss_by_position: dict[str, float]
    loss_by_length: dict[str, float]
    tokens: int
    kl: float | None = None
    """Divergence from the teacher, where there is one."""
    routing: RoutingReport | None = None
    """What the routers did, where the model has experts."""

    @classmethod
    def of(
        cls,
        breakdown: LossBreakdown,
        *,
        loss: float | None,
        grad_norm: float | None,
        tokens: int,
        routing: RoutingReport | None = None,
    ) -> StepResult:
        """Return the result of a step; one without a gradient norm was skipped."""
        skipped = grad_norm is None
        return cls(
            loss=loss,
            grad_norm=grad_norm,
            loss_by_source={} if skipped else breakdown.by_source(),
            loss_by_position={} if skipped else breakdown.by_position(),
            loss_by_length={} if skipped else breakdown.by_length(),
            tokens=tokens,
            kl=None if skipped else breakdown.kl(),
            routing=None if skipped else routing,
        )


class Timing(NamedTuple):
    """Seconds of one step, and what came before it."""

    took: float
    """The step, reading its rows included."""
    data_wait: float
    """Reading its rows."""
    checkpoint: float
    """The checkpoint before it, while training waited for it."""
    total: float
    """All steps of the run so far."""


class StageReport:
    """Reports on one stage, on the first rank. Numbers of speed are those of all ranks, memory is the first one's."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        run: RunDir,
        config: TrainConfig,
        stage: StageConfig,
        model: PreTrainedModel,
        *,
        step: int,
        stage_step: int,
        mesh: Mesh,
    ) -> None:
        self._run, self._stage, self._device = run, stage, mesh.device
        self._flops = StepFlops(
            model.config, frozen=config.lora is not None, device=mesh.device, num_devices=mesh.world
        )
        run.event(
            "stage", stage=stage.name, step=step, rope=rope_fingerprint(model), context=stage.context_length
        )
        get_logger("train").info(
            "stage %s: %d steps of %d rows of %d tokens",
            stage.name, stage.num_steps, stage.rows_per_step, stage.context_length,
        )  # fmt: skip
        self._metrics = stack.enter_context(JsonlWriter(run.path / METRICS))
        self._validation = (
            stack.enter_context(JsonlWriter(run.path / VALIDATION)) if config.validation is not None else None
        )
        self._trackers = open_trackers(config.tracking, run.path, recipe=config.to_dict(), step=step)
        for tracker in self._trackers:
            stack.callback(tracker.close)
        self._bar = stack.enter_context(
            progress(stage.name, total=stage.num_steps, unit="steps", done=stage_step)
        )

    def write(
        self,
        result: StepResult,
        rows: Sequence[PackedRow],
        timing: Timing,
        *,
        step: int,
        stage_step: int,
        tokens: int,
        lr: float,
    ) -> None:
        """Record one step."""
        tflops, mfu = self._flops.rates(rows, timing.took)
        record = {
            "step": step, "stage": self._stage.name, "stage_step": stage_step,
            "context_length": self._stage.context_length, "tokens": tokens, "loss": result.loss,
            "lr": lr, "grad_norm": result.grad_norm, "loss_by_source": result.loss_by_source,
            "loss_by_position": result.loss_by_position, "loss_by_length": result.loss_by_length,
            "tokens_per_s": round(result.tokens / timing.took, 1), "tflops": tflops, "mfu": mfu,
            "data_wait_s": round(timing.data_wait, 4), "checkpoint_s": round(timing.checkpoint, 4),
            "peak_memory_bytes": peak_memory(self._device), "seconds": round(timing.total, 3),
        }  # fmt: skip
        if result.kl is not None:
            record["kl"] = result.kl
        if result.routing is not None:
            record |= routing_record(result.routing)
        self._metrics.write(record)
        for tracker in self._trackers:
            tracker.write(scalars(record, "train"), step)
        self._bar.advance()
        self._bar.note(f"loss {result.loss:.4f}" if result.loss is not None else "skipped a step")

    def saved(self, saved: Saved | None) -> None:
        """Record what a checkpoint cost that is whole by now."""
        if saved is not None:
            self._run.event("checkpoint", **saved._asdict())

    def validated(self, records: Sequence[dict[str, Any]], *, step: int, tokens: int) -> None:
        """Record perplexities."""
        assert self._validation is not None
        for record in records:
            self._validation.write({"step": step, "stage": self._stage.name, "tokens": tokens, **record})
            perplexity = record["perplexity"]
            get_logger("train").info(
                "step %d: perplexity of %s at %d tokens: %s",
                step, record["name"], record["length"], "none" if perplexity is None else f"{perplexity:.3f}",
            )  # fmt: skip
            prefix = f"validation/{record['name']}/{record['length']}"
            for tracker in self._trackers:
                tracker.write(scalars({"loss": record["loss"], "perplexity": perplexity}, prefix), step)


def rewind(run: Path, step: int | None) -> float:
    """Drop the lines of steps after a checkpoint, which will be made again; return the seconds of the rest.

    `step` None: there is no checkpoint, so all go.
    """
    seconds = 0.0
    for path in (run / METRICS, run / VALIDATION):
        if not path.exists():
            continue
        kept = [record for record in read_jsonl(path) if step is not None and record["step"] <= step]
        with atomic_write(path, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        if kept and path.name == METRICS:
            seconds = float(kept[-1]["seconds"])
    return seconds


def check_trained(run: Path, stage: str) -> None:
    """Refuse a stage that changed nothing, or diverged: it would pass for a trained one.

    Raises:
        RunError: all steps, or the last ones, have no loss.
    """
    steps = [record for record in read_jsonl(run / METRICS) if record["stage"] == stage]
    skipped = sum(record["loss"] is None for record in steps)
    if skipped and skipped == len(steps):
        raise RunError(
            f"stage {stage!r} changed nothing: every step was skipped",
            found=f"{skipped} steps with a loss or gradient that is not finite, or without a label",
            fix="look at the model's weights, the learning rate and the data, and start over in another --out",
        )
    # From weights that overflow no step comes back.
    last = sum(1 for _ in takewhile(lambda record: record["loss"] is None, reversed(steps)))
    if last >= min(LOST_STEPS, len(steps) - 1) and last > 1:
        raise RunError(
            f"stage {stage!r} diverged: its last {last} of {len(steps)} steps were skipped",
            found="losses or gradients that are not finite, or no labels",
            fix="look at the learning rate, and start over in another --out, or from an earlier checkpoint",
        )
    if skipped:
        get_logger("train").warning("stage %s: %d of %d steps were skipped", stage, skipped, len(steps))
