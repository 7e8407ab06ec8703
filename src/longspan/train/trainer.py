"""The training loop: stages of optimizer steps, one file, read from top to bottom.

A run can be killed at any moment and started again with the same command: it goes on from the newest whole
checkpoint, and on CPU its losses are the same bits as those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from longspan.core.errors import DataError
from longspan.core.files import remove_leftovers
from longspan.core.heartbeat import beat
from longspan.core.log import get_logger
from longspan.core.records import read_jsonl
from longspan.core.rundir import RunDir
from longspan.core.seeds import derive_seed
from longspan.data.rows.loader import PackedRow
from longspan.kernels.loss import LossSum
from longspan.kernels.transfers import to_host
from longspan.models.adapter_card import adapter_note
from longspan.models.head import vocab_size
from longspan.models.hf import save_model
from longspan.models.lora import save_adapter
from longspan.models.rotary import EXACT_FROM, exact_angles, hold_frequencies
from longspan.models.routing import watch_routing
from longspan.parallel.fsdp import full_tensor
from longspan.parallel.launch import Watchdog, lost_ranks, on_all_ranks, on_first_rank, process_group
from longspan.parallel.signs_of_life import first_reads, growing, reading
from longspan.train.batch import Batch, collate, total_weight
from longspan.train.checkpoint import (
    Checkpoint,
    Checkpointer,
    TrainProgress,
    load_latest,
    read_checkpoint,
)
from longspan.train.config import StageConfig, TrainConfig
from longspan.train.fit import machine_budget
from longspan.train.known_models import known_model
from longspan.train.left_out import log_left_out
from longspan.train.lr_schedule import lr_factor
from longspan.train.metrics import LossBreakdown
from longspan.train.objectives import OBJECTIVES, ModelWithLoss
from longspan.train.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors, set_lr
from longspan.train.profiling import profiled
from longspan.train.recurrent import recurrent_step
from longspan.train.routing import count_choices
from longspan.train.run_plan import RunPlan, plan_run
from longspan.train.runtime import on_machine, prepare_blocks
from longspan.train.spread import Spread, build_spread
from longspan.train.stage_model import (
    empty_stage_model,
    load_tensors,
    own_tensors,
    stage_model,
    tokenizer_source,
)
from longspan.train.stage_report import METRICS, StageReport, StepResult, Timing, check_trained, rewind
from longspan.train.streams import StagePlan, rows_ahead, stage_rows
from longspan.train.trained import STARTED, check_same_plan
from longspan.train.trainer_moments import find_trainer_checkpoint, read_trainer_moments
from longspan.train.validation import validate

Made = TypeVar("Made")


class TrainResult(NamedTuple):
    """What a finished run leaves."""

    models: dict[str, Path]
    """Hugging Face folder of the model at the end of each stage."""
    steps: int
    tokens: int


class _RunContext(NamedTuple):
    """What all stages of a run share."""

    plan: RunPlan
    folder: RunDir
    spread: Spread
    checkpointer: Checkpointer
    after_step: Callable[[], None]
    """Called after each step: the profiler."""


def train(
    config: TrainConfig, out: str | Path, *, data_root: str | Path = ".", profile: bool = False
) -> TrainResult:
    """Train through every stage of `config` in the run folder `out`; go on if it holds a part of this run.

    `data_root` is where relative store paths start. Writes `metrics.jsonl` (one line a step), `checkpoints/`
    and, for each finished stage, `stages/<name>/`: a Hugging Face folder. With several processes every one calls it,
    all see the same folders, and only the first one logs. `profile` records some steps in `profile/`.

    Raises:
        ConfigError, DataError: settings, stores or checkpoints do not fit; before the first step.
        MissingDependencyError: a tracker is not installed; before the first step.
        ArgumentError: degrees of parallelism that do not fit the processes or the heads; before the first step.
        RunError: the disk is full, or another process is gone or did not answer in time.
    """
    root = Path(data_root) / config.data_root
    config = on_machine(config)
    with contextlib.ExitStack() as stack:
        timeout = config.parallel.timeout_seconds
        # What `memory: auto` chooses may need a group too.
        always = config.memory.needs_sharding or config.memory.auto
        device = stack.enter_context(process_group(timeout_seconds=timeout, always=always))
        several = dist.is_initialized() and dist.get_world_size() > 1
        if several:
            stack.enter_context(lost_ranks("training"))
        watchdog = stack.enter_context(Watchdog(timeout)) if several else None
        model = _everywhere(lambda: known_model(config.model, root, fetch=True))
        assert model.sizes is not None
        window = model.sizes.window
        spread = build_spread(config.parallel, device, window=window, watchdog=watchdog)
        # Planned first: a recipe with a mistake leaves no run folder that would refuse the mended one.
        log = get_logger("train")
        say = log.warning if spread.is_first else None
        plan = _everywhere(lambda: plan_run(config, data_root=Path(data_root), model=model, say=say))
        if spread.is_first:
            for stage in plan.stages:
                log_left_out(stage.stage.name, stage.left_out)
        if config.memory.auto:
            plan = plan.fitted(machine_budget())
            for line in plan.memory:
                log.info(line)
        folder = RunDir(out)
        if on_first_rank(lambda: _open(plan, folder)):
            # Its checkpoints may have been removed to save space; without them it would be trained once more.
            last = list(read_jsonl(folder.path / METRICS))[-1]
            return TrainResult(_model_folders(plan.config, folder), last["step"], last["tokens"])
        checkpoints, fingerprint = folder.path / "checkpoints", plan.config.without_machine().fingerprint()
        state = load_latest(checkpoints, config_fingerprint=fingerprint)
        keep = config.checkpoint.keep
        checkpointer = stack.enter_context(
            Checkpointer(checkpoints, config_fingerprint=fingerprint, keep=keep)
        )
        profiler = profiled(folder.path / "profile" if profile else None, rank=spread.mesh.rank)
        run = _RunContext(plan, folder, spread, checkpointer, stack.enter_context(profiler))
        return _train_stages(run, state)


def _everywhere(action: Callable[[], Made]) -> Made:
    """Return what `action` makes on this rank; where it fails on one, all raise."""
    made: list[Made] = []
    on_all_ranks(lambda: made.append(action()))
    return made[0]


def _train_stages(run: _RunContext, state: Checkpoint | None) -> TrainResult:
    models = _model_folders(run.plan.config, run.folder)
    done = state.progress.step if state else None
    seconds = on_first_rank(lambda: rewind(run.folder.path, done))
    for index, plan in enumerate(run.plan.stages):
        if state is None or state.progress.stage <= index:
            state, seconds = _train_stage(run, plan, index, state, seconds)
            on_first_rank(partial(check_trained, run.folder.path, plan.stage.name))
            write = partial(_write_stage, run.plan, plan.stage, state, models[plan.stage.name])
            with growing(run.folder.path / "stages"):
                on_first_rank(write, group=run.checkpointer.group)
    assert state is not None
    on_first_rank(run.folder.mark_complete)
    return TrainResult(models, state.progress.step, state.progress.tokens)


def _write_stage(plan: RunPlan, stage: StageConfig, state: Checkpoint, folder: Path) -> None:
    if folder.exists():
        return
    config, base = plan.config, plan.model.path
    model = stage_model(config, stage, state, plan.model)
    tokenizer = tokenizer_source(config, plan.root)
    if config.lora is None:
        save_model(model, folder, tokenizer=tokenizer)
    else:
        assert base is not None
        save_adapter(model, folder, base=base, tokenizer=tokenizer)
        get_logger("train").info("%s: %s", folder, adapter_note(base))


def _model_folders(config: TrainConfig, folder: RunDir) -> dict[str, Path]:
    return {stage.name: folder.path / "stages" / stage.name for stage in config.stages}


def _open(plan: RunPlan, run: RunDir) -> bool:
    """Make or take up the run folder; return whether the run in it is complete."""
    config = plan.config
    RunDir.create(run.path, config.without_machine(), seed=config.seed)
    check_same_plan(run.path, plan.identity())
    run.event(
        STARTED, **config.parallel.to_dict(), memory=config.memory.to_dict(),
        checkpoint=config.checkpoint.to_dict(), data_root=str(plan.root.resolve()),
        micro_batch_tokens={stage.name: stage.micro_batch_tokens for stage in config.stages},
        plan=plan.identity(),
    )  # fmt: skip
    if not run.is_complete:
        remove_leftovers(run.path / "stages")
        remove_leftovers(run.path / "checkpoints")
    return run.is_complete


class _Stage(NamedTuple):
    """The model of a stage, ready to be trained."""

    model: PreTrainedModel
    trained: ModelWithLoss
    """What to run: the model with its objective, perhaps sharded."""
    optimizers: list[torch.optim.Optimizer]


def _ready(run: _RunContext, stage: StageConfig, state: Checkpoint | None, *, carry: bool) -> _Stage:
    """Return the stage's model with the weights so far; with the moments so far too if they `carry`."""
    config, spread = run.plan.config, run.spread
    # Adapters stand beside frozen weights that no checkpoint holds, so each process reads the base.
    from_first = spread.mesh.world > 1 and config.lora is None
    if from_first:
        model = first_reads(
            lambda: stage_model(config, stage, None, run.plan.model), group=run.checkpointer.group
        ) or empty_stage_model(config, stage, run.plan.model)
    else:
        with reading():
            model = stage_model(config, stage, None, run.plan.model)
    prepare_blocks(model, config)
    trained = spread.shard(model, config.memory, from_first=from_first)
    trained.loss = OBJECTIVES[stage.objective](stage)
    trained.routing = watch_routing(model, aux_loss=config.router.aux_loss, z_loss=config.router.z_loss)
    # Of a model that has values by now, on every process.
    hold_frequencies(model, stage.reach)
    if stage.reach > EXACT_FROM:
        exact_angles(model)
    optimizers = build_optimizers(model, config.optimizer)
    weights = moments = state
    if state is None and config.init_from is not None:
        origin = run.plan.root / config.init_from.path
        if (theirs := find_trainer_checkpoint(origin)) is not None:
            load_optimizer_tensors(optimizers, *read_trainer_moments(theirs, model, config))
        else:
            other = read_checkpoint(origin)
            weights = other if config.init_from.weights else None
            moments = other if config.init_from.optimizer else None
    elif not carry:
        moments = None
    if weights is not None:
        load_tensors(model, weights)
    if moments is not None:
        load_optimizer_tensors(optimizers, moments.optimizer.shapes, moments.optimizer.read)
    return _Stage(model, trained, optimizers)


def _train_stage(
    run: _RunContext, plan: StagePlan, index: int, state: Checkpoint | None, seconds: float
) -> tuple[Checkpoint, float]:
    """Run the steps of one stage that `state` has not done; return its last checkpoint and seconds so far."""
    config, spread, stage = run.plan.config, run.spread, plan.stage
    done = state.progress if state is not None else TrainProgress(0, 0, 0, 0, {})
    resumed = state is not None and done.stage == index
    ready = _ready(run, stage, state, carry=resumed or stage.optimizer_state == "carry")
    if resumed and plan.mixer is not None:
        plan.mixer.check_state(done.loader)
    step, tokens = done.step, done.tokens
    stage_step, weight = (done.stage_step, done.weight) if resumed else (0, 0.0)
    held = 0.0
    with contextlib.ExitStack() as stack:
        report = (
            StageReport(
                stack, run.folder, config, stage, ready.model,
                step=step, stage_step=stage_step, mesh=spread.mesh,
            )
            if spread.is_first else None
        )  # fmt: skip

        def save() -> float:
            """Begin a checkpoint of this moment; return the seconds that training waited."""
            started = time.monotonic()
            spread.beat(f"the checkpoint of step {step}")
            loader = plan.mixer.state(stage_step * stage.rows_per_step) if plan.mixer is not None else {}
            before = run.checkpointer.save(
                TrainProgress(step, index, stage_step, tokens, loader, weight),
                own_tensors(ready.model),
                optimizer_tensors(ready.optimizers),
            )
            if report is not None:
                report.saved(before)
            return time.monotonic() - started

        if step == 0:
            _measure(run, ready, report, step, tokens)

        def read(number: int) -> list[PackedRow]:
            return stage_rows(plan, number * stage.rows_per_step, stage.rows_per_step, seed=config.seed)

        ahead = stack.enter_context(contextlib.closing(rows_ahead(read, range(stage_step, stage.num_steps))))
        while stage_step < stage.num_steps:
            started = time.monotonic()
            spread.beat(f"step {step + 1}")
            rows = next(ahead)
            waited = time.monotonic() - started
            lr = _set_rates(ready.optimizers, stage, stage_step)
            # A model with dropout draws from a stream that is a function of the step, so there is no state.
            others = ("rank", spread.mesh.rank) if spread.mesh.world > 1 else ()
            torch.manual_seed(derive_seed(config.seed, "step", step, *others))
            if stage.loss_average == "steps":
                weight += total_weight(rows)
            result = train_step(
                ready.trained, ready.optimizers, rows, spread=spread, divisor=weight / (stage_step + 1) or None,
                rows_per_micro_batch=stage.rows_per_micro_batch, max_grad_norm=config.optimizer.max_grad_norm,
                chunk_tokens=config.memory.chunk_tokens, offload_chunk_cache=config.memory.offload_chunk_cache,
            )  # fmt: skip
            step, stage_step, tokens = step + 1, stage_step + 1, tokens + result.tokens
            took = time.monotonic() - started
            seconds += took
            if report is not None:
                timing = Timing(took, waited, held, seconds)
                report.write(result, rows, timing, step=step, stage_step=stage_step, tokens=tokens, lr=lr)
            run.after_step()
            _empty_cache(config, step)
            last = stage_step == stage.num_steps
            if config.validation is not None and (last or step % config.validation.every_steps == 0):
                _measure(run, ready, report, step, tokens)
            held = save() if last or stage_step % config.checkpoint.every_steps == 0 else 0.0
        if stage.num_steps == 0 and not resumed:
            save()
        spread.beat("the end of the last checkpoint")
        finished = run.checkpointer.wait()
        if report is not None:
            report.saved(finished)
    found = run.checkpointer.latest() or state
    assert found is not None
    return found, seconds


def _measure(run: _RunContext, ready: _Stage, report: StageReport | None, step: int, tokens: int) -> None:
    if run.plan.validation is not None:
        records = validate(ready.trained, run.plan.validation, run.spread)
        if report is not None:
            report.validated(records, step=step, tokens=tokens)


def _set_rates(optimizers: Sequence[torch.optim.Optimizer], stage: StageConfig, stage_step: int) -> float:
    """Set the learning rates of a step; return the stage's."""
    factor = lr_factor(stage.lr_schedule, stage_step, stage.num_steps)
    set_lr(optimizers, lr=factor * stage.lr, adamw_lr=factor * (stage.adamw_lr or stage.lr))
    return factor * stage.lr


def _empty_cache(config: TrainConfig, step: int) -> None:
    every = config.runtime.empty_cache_every
    if every is not None and step % every == 0 and torch.cuda.is_available():
        torch.cuda.empty_cache()


def train_step(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    rows: Sequence[PackedRow],
    *,
    rows_per_micro_batch: int,
    max_grad_norm: float,
    divisor: float | None = None,
    spread: Spread | None = None,
    chunk_tokens: int | None = None,
    offload_chunk_cache: bool = False,
) -> StepResult:
    """Make one optimizer step on `rows`, accumulated over micro-batches.

    The loss is the weighted sum over all labels of the step divided by their total weight, whatever the
    micro-batches and however `spread` over processes, which all call it with all rows of the step. A step whose
    gradient is not finite changes nothing and is reported.

    Args:
        model: a causal language model, or what `Spread.shard` made of one.
        divisor: what the sum is divided by; None = the total weight of the labels.
        chunk_tokens: walk each micro-batch in chunks of so many tokens (`recurrent_step`); None = all at once.
        offload_chunk_cache: keep what earlier chunks leave for later ones in host memory.
    """
    trained = model if isinstance(model, ModelWithLoss) else ModelWithLoss(model)
    weight = total_weight(rows)
    divisor = divisor or weight
    _check_ids(trained.model, rows)
    # Parameters may be on the host, and computed with elsewhere.
    device = next(model.parameters()).device if spread is None else spread.mesh.device
    share = rows if spread is None else spread.rows(rows)
    parts = [share[i : i + rows_per_micro_batch] for i in range(0, len(share), rows_per_micro_batch)]
    make = collate if spread is None else spread.batch
    losses: list[torch.Tensor] = []
    told: list[tuple[Batch, torch.Tensor, torch.Tensor | None]] = []
    routing = trained.routing
    with contextlib.nullcontext() if routing is None else routing.step():
        # One micro-batch has made its choices when its forward pass ends.
        if routing is not None and weight > 0 and (len(parts) > 1 or chunk_tokens is not None):
            count_choices(
                trained, routing, (make(part) for part in parts),
                chunk_tokens=chunk_tokens, offload=offload_chunk_cache, device=device,
            )  # fmt: skip
        for part in parts:
            beat()
            batch = make(part)
            result = _forward_and_backward(
                trained, batch, weight=weight, divisor=divisor,
                chunk_tokens=chunk_tokens, offload=offload_chunk_cache, device=device,
            )  # fmt: skip
            kl = result.per_token_kl
            losses.append(result.loss.detach().double())
            told.append((batch, to_host(result.per_token_nll), None if kl is None else to_host(kl)))
    no_numbers = torch.zeros(0, dtype=torch.float64, device=losses[0].device)
    routed = no_numbers if routing is None or weight == 0 else routing.numbers()
    if weight > 0:
        # Of gradients on the host it is there already.
        norm_of_all = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
        losses.append(norm_of_all.to(losses[0]))
    # The one place of a step where the host waits for the device; by then all of `told` has arrived.
    numbers = torch.cat((torch.stack(losses), routed)).tolist()
    numbers, routed_numbers = numbers[: len(losses)], numbers[len(losses) :]
    norm = numbers.pop() if weight > 0 else 0.0
    loss_sum, breakdown = sum(numbers), LossBreakdown()
    for each in told:
        breakdown.add(*each)
    if spread is not None:
        loss_sum, breakdown = spread.total(loss_sum, breakdown)
    finite = math.isfinite(norm) and math.isfinite(loss_sum)
    if finite and weight > 0:
        for optimizer in optimizers:
            optimizer.step()
    elif not finite and (spread is None or spread.is_first):
        get_logger("train").warning("a step was skipped: loss %s, gradient norm %s", loss_sum, norm)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return StepResult.of(
        breakdown,
        loss=loss_sum / divisor if finite and weight > 0 else None,
        grad_norm=norm if finite else None,
        tokens=sum(len(row.input_ids) for row in rows),
        routing=None if routing is None or weight == 0 else routing.report(routed_numbers),
    )


def _forward_and_backward(
    trained: ModelWithLoss,
    batch: Batch,
    *,
    weight: float,
    divisor: float,
    chunk_tokens: int | None,
    offload: bool,
    device: torch.device,
) -> LossSum:
    """Return the loss sum of a micro-batch, its gradient added to that of the step unless nothing of that is learnt."""
    if chunk_tokens is not None:
        return recurrent_step(
            trained, batch, chunk_tokens=chunk_tokens, weight=divisor, offload=offload, device=device
        )
    result = trained(batch.to(device))
    if weight > 0:
        if trained.routing is not None:
            trained.routing.settle()
        (result.loss / divisor).backward()
    return result


def _check_ids(model: nn.Module, rows: Sequence[PackedRow]) -> None:
    """Refuse ids without an embedding, of which torch says no more than that an index is out of range."""
    known = vocab_size(model)
    highest = max(int(row.input_ids.max()) for row in rows)
    taught = [row.teacher.ids[row.teacher.logprobs > -np.inf] for row in rows if row.teacher is not None]
    for ids in taught:
        if ids.size and not (ids.min() >= 0 and ids.max() < known):
            raise DataError(
                "the teacher knows words that the student does not",
                found=f"ids from {ids.min()} to {ids.max()}",
                allowed=f"0 to {known - 1}",
                fix="annotate with a teacher that has the student's tokenizer",
            )
    if highest >= known:
        raise DataError(
            "a token of the data lies outside the model's vocabulary",
            found=f"token id {highest}",
            allowed=f"0 to {known - 1}",
            fix="tokenize the data with the model's tokenizer",
        )
