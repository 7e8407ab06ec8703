"""What a recipe comes to, before anything runs: stages, tokens by source, memory, time, processes.

What is at hand is looked at: stores, rows and records are planned, the model's config is checked. What is not (a model
of the hub, data still to be fetched) is taken from what the recipe and the name say, and noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longspan.core.errors import ArgumentError
from longspan.data.plans.framing import frame_words
from longspan.data.plans.packing import PackPlan
from longspan.data.rows.loader import RowSource
from longspan.plan.cost import step_seconds
from longspan.plan.hardware import GPUS, Gpu, gpu_named, parse_gpus
from longspan.plan.models import ModelShape
from longspan.plan.scale import layer_seconds
from longspan.plan.training import WORKSPACE, training_memory
from longspan.train.config import ParallelConfig, StageConfig, TrainConfig
from longspan.train.fit import MemoryBudget, machine_budget, training_step
from longspan.train.run_plan import plan_run
from longspan.train.runtime import on_gpu
from longspan.train.stage_model import rope_at
from longspan.train.stream_config import StreamConfig
from longspan.train.streams import StagePlan

__all__ = ["ResolvedRecipe", "ResolvedStage", "resolve"]


class ResolvedStage(NamedTuple):
    """One stage; None where what is not at hand decides."""

    name: str
    context_length: int
    steps: int | None
    rows_per_step: int
    tokens: int | None
    lr: float
    rope: dict[str, Any] | None
    objective: str
    optimizer_state: str
    streams: dict[str, dict[str, Any]]
    """By stream: documents, rows in one epoch, rows that are needed, and what stands where documents begin."""
    tokens_by_source: dict[str, int | None]
    memory: dict[str, float] | None
    """Bytes by part at the peak of one GPU, WORKSPACE included, or of one process on the CPU."""
    host: float | None
    """Bytes of host memory of one process."""
    step_seconds: float | None
    """Of an optimizer step, each row one causal document: with shorter ones it is less. None: of no GPU."""
    seconds: float | None


class ResolvedRecipe(NamedTuple):
    """A recipe with its stages."""

    stages: list[ResolvedStage]
    notes: list[str]
    """What was not at hand, and what was therefore not checked."""
    processes: int
    launch: str
    model: ModelShape | None
    gpu: Gpu | None
    """What time is estimated for; None: no GPU that we know."""
    on_gpu: bool
    """Whether memory is that of a GPU; False: of a process on this machine's CPU."""

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "stages": [stage._asdict() for stage in self.stages],
            "notes": self.notes,
            "processes": self.processes,
            "launch": self.launch,
            "model": None if self.model is None else self.model._asdict(),
            "gpu": None if self.gpu is None else self.gpu.name,
            "on_gpu": self.on_gpu,
        }


def resolve(config: TrainConfig, command: str, *, data_root: Path, gpu: str | None = None) -> ResolvedRecipe:
    """Return the resolved plan of a recipe.

    Args:
        config: the recipe.
        command: what stands behind `longspan train` to run it: how it was named, with all settings.
        data_root: where relative paths start.
        gpu: what time and memory are estimated for; None: this machine.

    Nothing is fetched or trained; records of the recipe that are at hand become stores, as when it runs.

    Raises:
        ConfigError, DataError, ArgumentError: what training would raise for all that is at hand.
    """
    here, device = _machine_gpu() if gpu is None else (parse_gpus(gpu).gpu, "")
    cuda = here is not None or torch.cuda.is_available()
    plan = plan_run(on_gpu(config) if cuda else config, data_root=data_root, at_hand=True)
    model, notes = plan.model, []
    if here is None:
        notes.append(f"there is no estimate of time for {device}: name a GPU with --gpu ({', '.join(GPUS)})")
    if model.config is None:
        notes.append(
            f"the model {config.model.path} is not on this machine: it is estimated by its name, and not checked"
        )
    if plan.missing:
        shown = ", ".join(plan.missing[:3])
        shown += f" and {len(plan.missing) - 3} more" if len(plan.missing) > 3 else ""
        notes.append(f"data are not on this machine: {shown}; shares are those of the recipe")
    init = config.init_from
    if init is not None and not (plan.root / init.path).exists():
        notes.append(f"init_from is not on this machine and is not checked: {init.path}")
    notes += plan.notes
    world = config.parallel.world
    if config.memory.auto and model.shape is not None and model.config is not None:
        try:
            plan = plan.fitted(_budget(None if gpu is None else here, world))
        except ArgumentError as error:
            notes.append(f"memory: auto: {error}")
        notes += plan.memory
    stages = [_stage(plan.config, each, model.shape, here, cuda=cuda) for each in plan.stages]
    return ResolvedRecipe(stages, notes, world, _launch(command, world), model.shape, here, cuda)


def _budget(gpu: Gpu | None, world: int) -> MemoryBudget:
    """Return what a process may fill on a named GPU; None: on this machine."""
    if gpu is None:
        return machine_budget()
    return MemoryBudget(gpu.memory, gpu.host_for_rank(world), True)


def _machine_gpu() -> tuple[Gpu | None, str]:
    """Return the GPU of this machine if there are figures for it, and what it is called."""
    if not torch.cuda.is_available():
        return None, "this machine, which has no GPU"
    name = torch.cuda.get_device_name()
    return gpu_named(name), f"this machine's {name}"


def _stage(
    config: TrainConfig, plan: StagePlan, model: ModelShape | None, gpu: Gpu | None, *, cuda: bool
) -> ResolvedStage:
    stage = plan.stage
    # Only data at hand tell how many steps an epoch is.
    steps = None if stage.epochs is not None else stage.num_steps
    tokens = None if steps is None else steps * stage.rows_per_step * stage.context_length
    memory = host = step_time = seconds = None
    if model is not None and stage.steps != 0:
        step = training_step(config, stage, cuda=cuda)
        estimate = training_memory(model, step)
        memory = {name: size for name, size in estimate.parts.items() if size}
        memory |= {"workspace": WORKSPACE} if cuda else {}
        host = estimate.host_bytes
    if model is not None and stage.steps != 0 and gpu is not None:
        world = config.parallel.world
        layers = layer_seconds(
            model, gpu, config.parallel, context=step.tokens, num_gpus=world, kernel=_kernel(config)
        )
        micro = _micro_steps(config.parallel, stage)
        step_time = step_seconds(model, gpu, step, layers, num_gpus=world, micro_steps=micro)
        seconds = None if steps is None else steps * step_time
    return ResolvedStage(
        stage.name,
        stage.context_length,
        steps,
        stage.rows_per_step,
        tokens,
        stage.lr,
        None if stage.rope is None else rope_at(config, stage),
        stage.objective,
        stage.optimizer_state,
        _streams(plan),
        _tokens_by_source(plan, tokens),
        memory,
        host,
        step_time,
        seconds,
    )


def _streams(plan: StagePlan) -> dict[str, dict[str, Any]]:
    if plan.mixer is None:
        return {name: {"documents": None, "rows": None, "rows_needed": None} for name in plan.stage.streams}
    return {
        name: {
            "documents": len(plan.mixtures[name].documents) if name in plan.mixtures else None,
            "rows": plan.sources[name].num_rows,
            "rows_needed": needed,
        }
        | _frame(plan.sources[name])
        | {f"left_out_{kind}": count for kind, count in plan.left_out.get(name, {}).items() if count}
        for name, needed in plan.rows_needed.items()
    }


def _frame(source: RowSource) -> dict[str, str]:
    """Return what stands around the documents of rows that are planned; of rows packed by others it is not known."""
    plan = getattr(source, "plan", None)
    return {"documents_begin": frame_words(plan.spec)} if isinstance(plan, PackPlan) else {}


def _tokens_by_source(plan: StagePlan, tokens: int | None) -> dict[str, int | None]:
    """Return the tokens of each source: of the plan where there is one, else by the recipe's weights."""
    stage = plan.stage
    total = sum(stream.weight for stream in stage.streams.values())
    found: dict[str, int | None] = {}
    for name, stream in stage.streams.items():
        of_stream: float | None = None if tokens is None else tokens * stream.weight / total
        if stage.shares == "rows":
            of_stream = tokens if len(stage.streams) == 1 else None
        if name in plan.rows_needed:
            of_stream = plan.rows_needed[name] * stage.context_length
        for source, share in _shares(name, stream, plan).items():
            key = source if source not in found else f"{name}/{source}"
            found[key] = None if of_stream is None else round(of_stream * share)
    return found


def _shares(name: str, stream: StreamConfig, plan: StagePlan) -> Mapping[str, float]:
    if name in plan.mixtures:
        sources = plan.mixtures[name].report.sources
        return {source: report.share_after for source, report in sources.items() if report.tokens}
    weights = stream.mixture.weights
    if stream.mixture.mode == "proportions" and weights:
        return {source: weight / sum(weights.values()) for source, weight in weights.items() if weight}
    return {name: 1.0}


def _kernel(config: TrainConfig) -> str | None:
    return None if config.runtime.flash == "auto" else config.runtime.flash


def _micro_steps(parallel: ParallelConfig, stage: StageConfig) -> float:
    rows = stage.rows_per_step / parallel.dp
    return max(1.0, rows / stage.rows_per_micro_batch)


def _launch(command: str, world: int) -> str:
    if world == 1:
        return f"longspan train {command}"
    nodes = -(-world // 8)
    where = f"--nproc-per-node {world}"
    if nodes > 1:
        where = f"--nnodes {nodes} --nproc-per-node {world // nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return f"torchrun {where} -m longspan train {command}"
