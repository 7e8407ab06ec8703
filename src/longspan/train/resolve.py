"""What a recipe comes to, before anything runs: stages, tokens by source, memory, time, processes.

What is at hand is looked at: stores, rows and records are planned, the model's config is checked. What is not (a model
of the hub, data still to be fetched) is taken from what the recipe and the name say, and noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longspan.core.errors import ConfigError
from longspan.data.plans.framing import frame_words
from longspan.data.plans.packing import PackPlan
from longspan.data.readers.hub import SCHEME as HUB
from longspan.data.rows.loader import RowSource
from longspan.plan.cost import step_seconds
from longspan.plan.hardware import GPUS, Gpu
from longspan.plan.models import ModelShape
from longspan.plan.scale import Degrees, layer_seconds
from longspan.plan.training import WORKSPACE, training_memory
from longspan.train.config import ParallelConfig, StageConfig, TrainConfig
from longspan.train.fit import step_settings
from longspan.train.known_models import KnownModel, known_model
from longspan.train.record_files import DATA_ROOT_PREFIX, parse_records
from longspan.train.runtime import on_gpu
from longspan.train.spread import check_parallel, check_rows
from longspan.train.stage_model import attention_sizes, model_config, rope_at
from longspan.train.stage_rope import check_stage_ropes, rope_notes, stage_rope_notes
from longspan.train.stream_config import StreamConfig
from longspan.train.streams import StagePlan, plan_stage
from longspan.train.trainer import adapter_notes, check_recipe, plan_run
from longspan.train.trainer_moments import check_init

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
    if gpu is not None and gpu not in GPUS:
        raise ConfigError("there is no estimate for this GPU", found=gpu, allowed=list(GPUS))
    here, device = _machine_gpu() if gpu is None else (GPUS[gpu], "")
    cuda = here is not None or torch.cuda.is_available()
    root = data_root / config.data_root
    check_rows(config)
    model = known_model(config.model, root)
    if model.config is not None:
        sizes = attention_sizes(config, root)
        check_parallel(config.parallel, sizes.heads, sizes.kv_heads)
    elif model.shape is not None:
        check_parallel(config.parallel, model.shape.heads, model.shape.kv_heads)
    missing = sorted({path for stage in config.stages for path in _missing(stage, root)})
    notes = []
    if here is None:
        notes.append(f"there is no estimate of time for {device}: name a GPU with --gpu ({', '.join(GPUS)})")
    if model.config is None:
        notes.append(
            f"the model {config.model.path} is not on this machine: it is estimated by its name, and not checked"
        )
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        notes.append(f"data are not on this machine: {shown}; shares are those of the recipe")
    if model.config is not None:
        notes += rope_notes(config, model_config(config, root))
    elif model.own_context is not None:
        notes += stage_rope_notes(config, max_positions=model.own_context)
    plans: list[StagePlan | None]
    if not missing and model.config is not None:
        plans = list(plan_run(config, data_root=data_root))
    else:
        plans = _plan_what_is_there(config, model, root)
        if config.init_from is not None and not (root / config.init_from.path).exists():
            notes.append(f"init_from is not on this machine and is not checked: {config.init_from.path}")
    if model.config is not None:
        notes += adapter_notes(config, root)
    typed = on_gpu(config) if cuda else config
    stages = [
        _stage(typed, plan.stage if plan else stage, plan, model.shape, here, cuda=cuda)
        for stage, plan in zip(config.stages, plans)
    ]
    world = _world(config.parallel)
    return ResolvedRecipe(stages, notes, world, _launch(command, world), model.shape, here, cuda)


def _machine_gpu() -> tuple[Gpu | None, str]:
    """Return the GPU of this machine if there are figures for it, and what it is called."""
    if not torch.cuda.is_available():
        return None, "this machine, which has no GPU"
    name = torch.cuda.get_device_name()
    return next((gpu for key, gpu in GPUS.items() if key in name.lower()), None), f"this machine's {name}"


def _plan_what_is_there(config: TrainConfig, model: KnownModel, root: Path) -> list[StagePlan | None]:
    if model.config is not None:
        check_recipe(config, root)
        if config.init_from is not None and (root / config.init_from.path).exists():
            check_init(config, root)
    elif model.shape is not None and model.own_context is not None:
        check_stage_ropes(config, own_context=model.own_context, head_dim=model.shape.head_dim)
    plans: list[StagePlan | None] = []
    for stage in config.stages:
        # Records need the tokenizer, which stands beside the model.
        at_hand = not _missing(stage, root) and not any(stream.records for stream in stage.streams.values())
        plans.append(plan_stage(stage, data_root=root, seed=config.seed) if at_hand else None)
    return plans


def _missing(stage: StageConfig, root: Path) -> list[str]:
    paths = []
    for stream in stage.streams.values():
        stores = (stream.store,) if isinstance(stream.store, str) else stream.store or ()
        records = [parse_records(entry).path.removeprefix(DATA_ROOT_PREFIX) for entry in stream.records or ()]
        teachers = (stream.teacher,) if isinstance(stream.teacher, str) else stream.teacher or ()
        paths += [*stores, *records, *teachers, *([stream.rows] if stream.rows is not None else [])]
    # A data set that is read where it is counts as missing: nothing is asked of the network here.
    return [path for path in paths if path.startswith(HUB) or not (root / path).exists()]


def _stage(
    config: TrainConfig,
    stage: StageConfig,
    plan: StagePlan | None,
    model: ModelShape | None,
    gpu: Gpu | None,
    *,
    cuda: bool,
) -> ResolvedStage:
    # Only data at hand tell how many steps an epoch is.
    steps = None if stage.epochs is not None else stage.num_steps
    tokens = None if steps is None else steps * stage.rows_per_step * stage.context_length
    memory = host = step_time = seconds = None
    if model is not None and stage.steps != 0:
        settings = step_settings(config, stage, cuda=cuda)
        estimate = training_memory(model, settings)
        memory = {name: size for name, size in estimate.parts.items() if size}
        memory |= {"workspace": WORKSPACE} if cuda else {}
        host = estimate.host_bytes
    if model is not None and stage.steps != 0 and gpu is not None:
        world = _world(config.parallel)
        layer = layer_seconds(
            model,
            gpu,
            Degrees(settings.schedule, settings.ring, settings.ulysses),
            context=settings.tokens,
            num_gpus=world,
        )
        micro = _micro_steps(config.parallel, stage)
        step_time = step_seconds(model, gpu, settings, layer, num_gpus=world, micro_steps=micro)
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
        _streams(stage, plan),
        _tokens_by_source(stage, plan, tokens),
        memory,
        host,
        step_time,
        seconds,
    )


def _streams(stage: StageConfig, plan: StagePlan | None) -> dict[str, dict[str, Any]]:
    if plan is None:
        return {name: {"documents": None, "rows": None, "rows_needed": None} for name in stage.streams}
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


def _tokens_by_source(
    stage: StageConfig, plan: StagePlan | None, tokens: int | None
) -> dict[str, int | None]:
    """Return the tokens of each source: of the plan where there is one, else by the recipe's weights."""
    total = sum(stream.weight for stream in stage.streams.values())
    found: dict[str, int | None] = {}
    for name, stream in stage.streams.items():
        of_stream: float | None = None if tokens is None else tokens * stream.weight / total
        if stage.shares == "rows":
            of_stream = tokens if len(stage.streams) == 1 else None
        if plan is not None:
            of_stream = plan.rows_needed[name] * stage.context_length
        for source, share in _shares(name, stream, plan).items():
            key = source if source not in found else f"{name}/{source}"
            found[key] = None if of_stream is None else round(of_stream * share)
    return found


def _shares(name: str, stream: StreamConfig, plan: StagePlan | None) -> Mapping[str, float]:
    if plan is not None and name in plan.mixtures:
        sources = plan.mixtures[name].report.sources
        return {source: report.share_after for source, report in sources.items() if report.tokens}
    weights = stream.mixture.weights
    if stream.mixture.mode == "proportions" and weights:
        return {source: weight / sum(weights.values()) for source, weight in weights.items() if weight}
    return {name: 1.0}


def _micro_steps(parallel: ParallelConfig, stage: StageConfig) -> float:
    rows = stage.rows_per_step / (parallel.dp_replicate * parallel.dp_shard)
    return max(1.0, rows / stage.rows_per_micro_batch)


def _world(parallel: ParallelConfig) -> int:
    return parallel.dp_replicate * parallel.dp_shard * parallel.cp_ring * parallel.cp_ulysses * parallel.tp


def _launch(command: str, world: int) -> str:
    if world == 1:
        return f"longspan train {command}"
    nodes = -(-world // 8)
    where = f"--nproc-per-node {world}"
    if nodes > 1:
        where = f"--nnodes {nodes} --nproc-per-node {world // nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return f"torchrun {where} -m longspan train {command}"
