"""How a run is spread over its processes: which rows, which tokens of them, which part of the parameters.

Every rank reads all rows of a step, which costs little, and takes its share: rows by the data-parallel rank, so
that ranks finish together; tokens of these rows by the place in the group that shares a sequence. The rows of a
micro-batch are one sequence with one document table, padded, as a document of its own, to what the layout needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from longspan.core.errors import ArgumentError, ConfigError
from longspan.data.rows.loader import PackedRow, balance
from longspan.models.documents import Documents
from longspan.models.quantize import plain_parameters
from longspan.parallel.fsdp import shard_model
from longspan.parallel.launch import Watchdog, collective_timeout
from longspan.parallel.layout import Layout
from longspan.parallel.mesh import Mesh, build_mesh, check_same_batch
from longspan.parallel.schedules import build_schedule, check_degrees
from longspan.parallel.schedules.base import CpSchedule
from longspan.parallel.schedules.ulysses import head_share
from longspan.parallel.sharded_documents import ShardedDocuments
from longspan.plan.training_step import MemoryConfig
from longspan.train.batch import Batch, collate, take
from longspan.train.config import ParallelConfig, TrainConfig
from longspan.train.metrics import LossBreakdown
from longspan.train.objectives import ModelWithLoss


class Spread:
    """This process' part in a run.

    Attributes:
        mesh: its place among the others.
        layout: which tokens of a sequence it holds.
    """

    def __init__(
        self,
        mesh: Mesh,
        schedule: CpSchedule,
        layout: Layout,
        *,
        window: int | None,
        watchdog: Watchdog | None,
    ) -> None:
        self.mesh, self.schedule, self.layout = mesh, schedule, layout
        self._window, self._watchdog = window, watchdog
        self._checked = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.mesh.is_first

    def beat(self, doing: str) -> None:
        """Tell the watchdog that this process is alive."""
        if self._watchdog is not None:
            self._watchdog.beat(doing)

    def shard(self, model: nn.Module, memory: MemoryConfig, *, from_first: bool = False) -> ModelWithLoss:
        """Shard the model over the mesh, in place, and return the module to run; without a mesh only the latter.

        With `from_first` only the first rank's model has values; the others' is on the meta device.
        """
        root = ModelWithLoss(model)
        if self.mesh.fsdp is None:
            model.to(self.mesh.device)
        else:
            plain_parameters(model, self.mesh.device)
            shard_model(
                root,
                self.mesh.fsdp,
                compute_dtype=None if memory.compute_dtype is None else getattr(torch, memory.compute_dtype),
                reduce_dtype=getattr(torch, memory.reduce_dtype),
                offload=memory.offload_parameters,
                from_first=from_first,
            )
        return root

    def rows(self, rows: Sequence[PackedRow]) -> Sequence[PackedRow]:
        """Return this process' share of a step's rows."""
        if self.mesh.dp_size == 1:
            return rows
        # All rows are equally long: what differs is their attention.
        costs = [_attention_work(row) for row in rows]
        return [rows[index] for index in balance(costs, self.mesh.dp_size)[self.mesh.dp_rank]]

    def batch(self, rows: Sequence[PackedRow]) -> Batch:
        """Return this process' tokens of a micro-batch, on the host.

        Raises:
            RunError: on the first batch, if another process that shares the sequence has another one.
        """
        if self.mesh.cp_size == 1:
            return collate(rows)
        whole = collate(rows)
        assert isinstance(whole.documents, Documents)
        if not self._checked:
            columns = whole.input_ids, whole.labels, whole.positions
            check_same_batch(self.mesh, [*(x.numpy() for x in columns), whole.documents.cu_seqlens])
            self._checked = True
        shards = whole.documents.shards(self.layout, self.mesh.cp_size, window=self._window)
        return take(whole, ShardedDocuments(shards, self.schedule))

    def total(self, loss_sum: float, breakdown: LossBreakdown) -> tuple[float, LossBreakdown]:
        """Return loss sum and breakdown over all processes, the same bits on each."""
        if self.mesh.world == 1:
            return loss_sum, breakdown
        counted: list[tuple[float, LossBreakdown] | None] = [None] * self.mesh.world
        dist.all_gather_object(counted, (loss_sum, breakdown))
        everything = LossBreakdown()
        total = 0.0
        for part in counted:
            assert part is not None
            total += part[0]
            everything.join(part[1])
        return total, everything


def _attention_work(row: PackedRow) -> int:
    """Return the square of each document, of a branch that of what it is and follows, less what it follows."""
    first = row.first_positions
    return int(((first + np.diff(row.cu_seqlens).astype(np.int64)) ** 2 - first**2).sum())


def check_rows(config: TrainConfig) -> None:
    """Refuse rows of a step that do not divide among the data-parallel processes. Raises ConfigError."""
    ranks = config.parallel.dp
    for stage in config.stages:
        if stage.rows_per_step % ranks:
            raise ConfigError(
                f"stage {stage.name!r}: the rows of a step do not divide among the data-parallel processes",
                found=f"{stage.rows_per_step} rows of {stage.context_length} tokens, dp_replicate x dp_shard = {ranks}",
                fix=f"choose batch_tokens as a multiple of {ranks * stage.context_length}",
            )


def check_parallel(config: ParallelConfig, heads: int, kv_heads: int) -> None:
    """Refuse degrees that a run would refuse, without its processes.

    Raises:
        ArgumentError: as `build_spread`, but for the number of processes, and heads that the schedule cannot share.
    """
    _refuse_tp(config)
    name = config.schedule_name
    check_degrees(name, ring=config.cp_ring, ulysses=config.cp_ulysses)
    _layout(config, build_schedule(name))
    head_share(heads, kv_heads, config.cp_ulysses, 0)


def build_spread(
    config: ParallelConfig,
    device: torch.device,
    *,
    window: int | None = None,
    watchdog: Watchdog | None = None,
) -> Spread:
    """Make the mesh and the schedule of a run; every process calls it once, at the start.

    The layouts balance for a sliding `window` of so many tokens.

    Raises:
        ArgumentError: degrees that do not multiply to the number of processes, a schedule or layout that does not
            work with them.
    """
    _refuse_tp(config)
    timeout = collective_timeout(config.timeout_seconds, device.type)
    mesh = build_mesh(config, device, timeout_seconds=timeout)
    schedule = build_schedule(
        config.schedule_name, ring_group=mesh.ring_group, ulysses_group=mesh.ulysses_group
    )
    return Spread(mesh, schedule, _layout(config, schedule), window=window, watchdog=watchdog)


def _layout(config: ParallelConfig, schedule: CpSchedule) -> Layout:
    layout = config.layout or schedule.layouts[0]
    if layout not in schedule.layouts:
        raise ArgumentError(
            f"the schedule {schedule.name} does not work with this layout",
            found=layout,
            allowed=", ".join(schedule.layouts),
        )
    return layout


def _refuse_tp(config: ParallelConfig) -> None:
    if config.tp > 1:
        raise ArgumentError(
            "training does not share single matrices between processes",
            found=f"parallel.tp = {config.tp}",
            allowed=1,
            fix="raise dp_shard: parameters are sharded over it and over both cp degrees",
        )
