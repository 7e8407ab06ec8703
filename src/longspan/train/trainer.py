"""The training loop: stages of optimizer steps, one file, read from top to bottom.

A run can be killed at any moment and started again with the same command: it goes on from the newest whole
checkpoint, and on CPU its losses are the same bits as those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.files import atomic_write, remove_leftovers
from longspan.core.log import get_logger
from longspan.core.progress import progress
from longspan.core.records import JsonlWriter, read_jsonl
from longspan.core.rundir import RunDir
from longspan.core.seeds import derive_seed
from longspan.data.loader import PackedRow
from longspan.data.tokenizer import load_tokenizer
from longspan.kernels.tiled_mlp import enable_tiled_mlp
from longspan.models.checkpointing import enable_checkpointing
from longspan.models.hf import (
    build_model,
    check_model,
    empty_model,
    lm_head_weight,
    load_model,
    rope_fingerprint,
    save_model,
    tokenizer_folder,
)
from longspan.models.lora import apply_lora, check_lora, is_adapted, save_adapter
from longspan.models.rope import EXACT_FROM, exact_angles
from longspan.parallel.fsdp import fill, full_tensor
from longspan.parallel.launch import Watchdog, lost_ranks, on_first_rank, process_group
from longspan.train.batch import collate, total_weight
from longspan.train.checkpoint import Checkpoint, Checkpointer, Progress, Saved, load_latest, read_checkpoint
from longspan.train.config import MemoryConfig, StageConfig, TrainConfig
from longspan.train.metrics import LossBreakdown
from longspan.train.objectives import ModelWithLoss
from longspan.train.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors, set_lr
from longspan.train.rope_schedule import check_ropes
from longspan.train.schedule import lr_factor
from longspan.train.spread import Spread, build_spread
from longspan.train.streams import StagePlan, plan_stages, stage_rows


class TrainResult(NamedTuple):
    """What a finished run leaves."""

    models: dict[str, Path]
    """Hugging Face folder of the model at the end of each stage."""
    steps: int
    tokens: int


def train(config: TrainConfig, out: str | Path, *, data_root: str | Path = ".") -> TrainResult:
    """Train through every stage of `config` in the run folder `out`; go on if it holds a part of this run.

    `data_root` is where relative store paths start. Writes `metrics.jsonl` (one line a step), `checkpoints/`
    and, for each finished stage, `stages/<name>/`: a Hugging Face folder. With several processes every one calls it,
    all see the same folders, and the first one writes.

    Raises:
        ConfigError, DataError: settings, stores or checkpoints do not fit; before the first step.
        ArgumentError: degrees of parallelism that do not fit the processes or the heads; before the first step.
        RunError: the disk is full, or another process is gone or did not answer in time.
    """
    root = Path(data_root) / config.data_root
    with contextlib.ExitStack() as stack:
        timeout = config.parallel.timeout_seconds
        always = config.memory.needs_sharding
        device = stack.enter_context(process_group(timeout_seconds=timeout, always=always))
        several = dist.is_initialized() and dist.get_world_size() > 1
        if several:
            stack.enter_context(lost_ranks("training"))
        watchdog = stack.enter_context(Watchdog(timeout)) if several else None
        spread = build_spread(config.parallel, device, watchdog=watchdog)
        # Planned first: a recipe with a mistake leaves no run folder that would refuse the mended one.
        plans = plan_run(config, data_root=Path(data_root))
        # A stage that counts in epochs has its steps from here on.
        config = config.model_copy(update={"stages": tuple(plan.stage for plan in plans)})
        spread.check(config, *_heads(config, root))
        return _train_stages(config, plans, Path(out), root, spread)


class Trained(NamedTuple):
    """The model of one checkpoint, and where the files beside it are."""

    model: PreTrainedModel
    tokenizer: Path | None
    base: str | None
    """Model that the adapter was trained beside; None = all weights were trained."""


def load_trained(checkpoint: str | Path, *, base: str | None = None) -> Trained:
    """Return the model of a checkpoint in a run folder, with the RoPE of the stage that wrote it.

    `base` replaces the recipe's `model.path`, which is looked for from the working directory.

    Raises:
        DataError: a damaged checkpoint, or no run folder around it.
        ConfigError, ArgumentError: as for training.
    """
    path = Path(checkpoint).resolve()
    config = TrainConfig.from_yaml(path.parent.parent / "config.yaml")
    if base is not None:
        if config.lora is None:
            raise ArgumentError(f"{checkpoint} holds a whole model; a base is for adapters")
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": base})})
    found = read_checkpoint(path)
    root = Path(config.data_root)
    model = _stage_model(config, config.stages[found.progress.stage], found, root)
    return Trained(
        model.eval(),
        _tokenizer_folder(config, root),
        _model_path(config, root) if config.lora is not None else None,
    )


def _train_stages(
    config: TrainConfig, plans: Sequence[StagePlan], out: Path, root: Path, spread: Spread
) -> TrainResult:
    tokenizer = _tokenizer_folder(config, root)
    models = {plan.stage.name: out / "stages" / plan.stage.name for plan in plans}
    run, fingerprint = RunDir(out), config.without_machine().fingerprint()
    if on_first_rank(lambda: _open(config, run)):
        # Its checkpoints may have been removed to save space; without them it would be trained once more.
        last = list(read_jsonl(run.path / "metrics.jsonl"))[-1]
        return TrainResult(models, last["step"], last["tokens"])
    state = load_latest(run.path / "checkpoints", config_fingerprint=fingerprint)
    done = state.progress.step if state else 0
    seconds = on_first_rank(lambda: _rewind_metrics(run.path / "metrics.jsonl", done))
    with Checkpointer(
        run.path / "checkpoints", config_fingerprint=fingerprint, keep=config.checkpoint.keep
    ) as checkpointer:
        for index, plan in enumerate(plans):
            if state is None or state.progress.stage <= index:
                state, seconds = _train_stage(
                    config, plan, index, state, run, root, checkpointer, seconds, spread
                )
                if spread.is_first and not models[plan.stage.name].exists():
                    model = _stage_model(config, plan.stage, state, root)
                    if config.lora is None:
                        save_model(model, models[plan.stage.name], tokenizer=tokenizer)
                    else:
                        base = _model_path(config, root)
                        save_adapter(model, models[plan.stage.name], base=base, tokenizer=tokenizer)
                # The others wait here: reading and writing a whole model takes its time.
                on_first_rank(lambda: None)
    assert state is not None
    on_first_rank(run.mark_complete)
    return TrainResult(models, state.progress.step, state.progress.tokens)


def _open(config: TrainConfig, run: RunDir) -> bool:
    """Make or take up the run folder; return whether the run in it is complete."""
    RunDir.create(run.path, config.without_machine(), seed=config.seed)
    run.event("processes", **config.parallel.to_dict(), memory=config.memory.to_dict())
    if not run.is_complete:
        remove_leftovers(run.path / "stages")
        remove_leftovers(run.path / "checkpoints")
    return run.is_complete


def plan_run(config: TrainConfig, *, data_root: Path) -> list[StagePlan]:
    """Check the model with every stage's RoPE and plan its data; nothing is trained or written."""
    root = data_root / config.data_root
    for stage in config.stages:
        check_model(
            config.model.hf_config or _model_path(config, root),
            rope=_rope_at(config, stage),
            overrides=config.model.config_overrides,
        )
    check_ropes(config, _hf_config(config, root))
    if config.lora is not None:
        check_lora(_model_path(config, root), config.lora)
    plans = plan_stages(config, root, tokenizer=lambda: _tokenizer_folder(config, root))
    _check_tokenizers(config, plans, root)
    return plans


def _check_tokenizers(config: TrainConfig, plans: Sequence[StagePlan], root: Path) -> None:
    """Refuse ids that mean different words in different stores, and a model folder without its tokenizer."""
    made_by = {name: store for plan in plans for name, store in plan.tokenizers.items()}
    if len(made_by) > 1:
        raise DataError(
            "the token stores were made with different tokenizers",
            found="; ".join(f"{store}: {name}" for name, store in made_by.items()),
            fix="tokenize all of them with the model's tokenizer",
        )
    if config.tokenizer is None:
        return
    if not (root / config.tokenizer).is_dir():
        raise ConfigError("the tokenizer of the recipe is not a folder", found=str(root / config.tokenizer))
    if load_tokenizer(root / config.tokenizer, backend="hf").fingerprint not in made_by:
        get_logger("train").warning(
            "the tokenizer in %s, which goes into the model folders, is not the one that made the token stores",
            root / config.tokenizer,
        )


def _train_stage(
    config: TrainConfig,
    plan: StagePlan,
    index: int,
    state: Checkpoint | None,
    run: RunDir,
    root: Path,
    checkpointer: Checkpointer,
    seconds: float,
    spread: Spread,
) -> tuple[Checkpoint, float]:
    """Run the steps of one stage that `state` has not done; return its last checkpoint and seconds so far."""
    stage = plan.stage
    done = state.progress if state is not None else Progress(0, 0, 0, 0, {})
    resumed = state is not None and done.stage == index
    # Adapters stand beside frozen weights that no checkpoint holds, so each process reads the base.
    from_first = spread.mesh.world > 1 and config.lora is None
    model = _empty_stage_model(config, stage, root) if from_first and not spread.is_first else None
    if model is None:
        model = _stage_model(config, stage, None, root)
    _save_memory(model, config.memory)
    trained = spread.shard(model, config.memory, from_first=from_first)
    # Of a model that has values by now, on every process.
    if stage.reach > EXACT_FROM:
        exact_angles(model)
    optimizers = build_optimizers(model, config.optimizer)
    if state is not None:
        _load_tensors(model, state)
        if resumed or stage.optimizer_state == "carry":
            load_optimizer_tensors(optimizers, state.optimizer.shapes, state.optimizer.read)
        if resumed and plan.mixer is not None:
            plan.mixer.check_state(done.loader)
    step, tokens = done.step, done.tokens
    stage_step = done.stage_step if resumed else 0
    rows_per_step = stage.rows_per_step

    def save() -> Saved | None:
        loader = plan.mixer.state(stage_step * rows_per_step) if plan.mixer is not None else {}
        progress = Progress(step, index, stage_step, tokens, loader)
        return checkpointer.save(progress, _tensors(model), optimizer_tensors(optimizers))

    with contextlib.ExitStack() as stack:
        report = (
            _Report(stack, run, stage, model, step=step, stage_step=stage_step) if spread.is_first else None
        )
        while stage_step < stage.num_steps:
            started = time.monotonic()
            spread.beat(f"step {step + 1}")
            rows = stage_rows(plan, stage_step * rows_per_step, rows_per_step, seed=config.seed)
            factor = lr_factor(stage.schedule, stage_step, stage.num_steps)
            lr = factor * stage.lr
            set_lr(optimizers, lr=lr, adamw_lr=factor * (stage.adamw_lr or stage.lr))
            # A model with dropout draws from a stream that is a function of the step, so there is no state.
            others = ("rank", spread.mesh.rank) if spread.mesh.world > 1 else ()
            torch.manual_seed(derive_seed(config.seed, "step", step, *others))
            result = train_step(
                trained, optimizers, rows, spread=spread,
                rows_per_micro_batch=stage.rows_per_micro_batch, max_grad_norm=config.optimizer.max_grad_norm,
            )  # fmt: skip
            step, stage_step, tokens = step + 1, stage_step + 1, tokens + result.tokens
            took = time.monotonic() - started
            seconds += took
            if report is not None:
                report.write(
                    result, step=step, stage_step=stage_step, tokens=tokens, lr=lr, took=took, seconds=seconds
                )
            if stage_step % config.checkpoint.every_steps == 0 or stage_step == stage.num_steps:
                spread.beat(f"the checkpoint of step {step}")
                before = save()
                if report is not None:
                    report.saved(before)
        if stage.num_steps == 0 and not resumed:
            save()
        spread.beat("the end of the last checkpoint")
        last = checkpointer.wait()
        if report is not None:
            report.saved(last)
    found = checkpointer.latest() or state
    assert found is not None
    return found, seconds


class _Report:
    """What one stage says of itself: metrics.jsonl, a log line, the progress bar."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        run: RunDir,
        stage: StageConfig,
        model: nn.Module,
        *,
        step: int,
        stage_step: int,
    ) -> None:
        self._run, self._stage = run, stage
        run.event(
            "stage", stage=stage.name, step=step, rope=rope_fingerprint(model), context=stage.context_length
        )
        get_logger("train").info(
            "stage %s: %d steps of %d rows of %d tokens",
            stage.name, stage.num_steps, stage.rows_per_step, stage.context_length,
        )  # fmt: skip
        self._metrics = stack.enter_context(JsonlWriter(run.path / "metrics.jsonl"))
        self._bar = stack.enter_context(
            progress(stage.name, total=stage.num_steps, unit="steps", done=stage_step)
        )

    def saved(self, saved: Saved | None) -> None:
        """Record what a checkpoint cost that is whole by now."""
        if saved is not None:
            self._run.event("checkpoint", **saved._asdict())

    def write(
        self,
        result: StepResult,
        *,
        step: int,
        stage_step: int,
        tokens: int,
        lr: float,
        took: float,
        seconds: float,
    ) -> None:
        """Record one step."""
        self._metrics.write({
            "step": step, "stage": self._stage.name, "stage_step": stage_step,
            "context_length": self._stage.context_length, "tokens": tokens, "loss": result.loss,
            "lr": lr, "grad_norm": result.grad_norm, "loss_by_source": result.loss_by_source,
            "loss_by_position": result.loss_by_position,
            "tokens_per_s": round(result.tokens / took, 1), "seconds": round(seconds, 3),
        })  # fmt: skip
        self._bar.advance()
        self._bar.note(f"loss {result.loss:.4f}" if result.loss is not None else "skipped a step")


class StepResult(NamedTuple):
    """What one optimizer step says of itself; losses are None when it was skipped or had no labels."""

    loss: float | None
    grad_norm: float | None
    loss_by_source: dict[str, float]
    loss_by_position: dict[str, float]
    tokens: int


def train_step(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    rows: Sequence[PackedRow],
    *,
    rows_per_micro_batch: int,
    max_grad_norm: float,
    spread: Spread | None = None,
) -> StepResult:
    """Make one optimizer step on `rows`, accumulated over micro-batches.

    The loss is the weighted sum over all labels of the step divided by their total weight, whatever the
    micro-batches and however `spread` over processes, which all call it with all rows of the step. A step whose
    gradient is not finite changes nothing and is reported.

    Args:
        model: a causal language model, or what `Spread.shard` made of one.
    """
    trained = model if isinstance(model, ModelWithLoss) else ModelWithLoss(model)
    weight = total_weight(rows)
    _check_ids(trained.model, rows)
    device = next(model.parameters()).device
    breakdown = LossBreakdown()
    loss_sum = 0.0
    share = rows if spread is None else spread.rows(rows)
    for start in range(0, len(share), rows_per_micro_batch):
        part = share[start : start + rows_per_micro_batch]
        batch = collate(part, device=device) if spread is None else spread.batch(part)
        result = trained(batch)
        if weight > 0:
            (result.loss / weight).backward()
        loss_sum += float(result.loss.detach())
        breakdown.add(batch, result.per_token_nll)
    if spread is not None:
        loss_sum, breakdown = spread.total(loss_sum, breakdown)
    norm = _clip(model, max_grad_norm) if weight > 0 else 0.0
    finite = math.isfinite(norm) and math.isfinite(loss_sum)
    if finite and weight > 0:
        for optimizer in optimizers:
            optimizer.step()
    elif not finite and (spread is None or spread.is_first):
        get_logger("train").warning("a step was skipped: loss %s, gradient norm %s", loss_sum, norm)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss_sum / weight if finite and weight > 0 else None,
        grad_norm=norm if finite else None,
        loss_by_source=breakdown.by_source() if finite else {},
        loss_by_position=breakdown.by_position() if finite else {},
        tokens=sum(len(row.input_ids) for row in rows),
    )


def _clip(model: nn.Module, max_grad_norm: float) -> float:
    """Scale the gradients down to `max_grad_norm`; return their norm over all processes."""
    return float(full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))


def _check_ids(model: nn.Module, rows: Sequence[PackedRow]) -> None:
    """Refuse ids without an embedding, of which torch says no more than that an index is out of range."""
    known = lm_head_weight(model).shape[0]
    highest = max(int(row.input_ids.max()) for row in rows)
    if highest >= known:
        raise DataError(
            "a token of the data lies outside the model's vocabulary",
            found=f"token id {highest}",
            allowed=f"0 to {known - 1}",
            fix="tokenize the data with the model's tokenizer",
        )


def _save_memory(model: nn.Module, memory: MemoryConfig) -> None:
    if memory.tiled_mlp is not None:
        enable_tiled_mlp(model, memory.tiled_mlp)
    enable_checkpointing(model, memory.activation_checkpointing)


def _heads(config: TrainConfig, root: Path) -> tuple[int, int]:
    """Return the query and the key/value heads of the recipe's model."""
    text = _hf_config(config, root).get_text_config(decoder=True)
    return text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def _hf_config(config: TrainConfig, root: Path) -> PretrainedConfig:
    """Return the configuration of the recipe's model as it was before training."""
    if config.model.hf_config is not None:
        return AutoConfig.for_model(**config.model.hf_config)
    return AutoConfig.from_pretrained(_model_path(config, root))


def _stage_model(
    config: TrainConfig, stage: StageConfig, state: Checkpoint | None, root: Path
) -> PreTrainedModel:
    """Return the model with the stage's RoPE; weights from `state`, else from the recipe's origin."""
    dtype = getattr(torch, config.model.dtype)
    rope = _rope_at(config, stage)
    if config.model.path is not None:
        path = _model_path(config, root)
        model = load_model(
            path,
            rope=rope,
            max_position_embeddings=_context_at(config, stage),
            dtype=dtype,
            overrides=config.model.config_overrides,
        )
    else:
        model = build_model(_hf_config_at(config, stage), seed=config.seed, rope=rope, init=config.model.init)
    if config.lora is not None:
        apply_lora(model, config.lora, seed=config.seed)
    if state is not None:
        _load_tensors(model, state)
    return model.train()


def _empty_stage_model(config: TrainConfig, stage: StageConfig, root: Path) -> PreTrainedModel:
    """Return the same modules without values: the first process sends those when the model is sharded."""
    origin = _hf_config_at(config, stage) if config.model.path is None else _model_path(config, root)
    return empty_model(origin, rope=_rope_at(config, stage), overrides=config.model.config_overrides).train()


def _hf_config_at(config: TrainConfig, stage: StageConfig) -> dict[str, Any]:
    """Return the transformers configuration of a model made from scratch, with room for the stage's context."""
    assert config.model.hf_config is not None
    fields = {**config.model.hf_config, "dtype": config.model.dtype}
    context = _context_at(config, stage)
    if context is not None:
        fields["max_position_embeddings"] = max(fields.get("max_position_embeddings", 0), context)
    return fields


def _context_at(config: TrainConfig, stage: StageConfig) -> int | None:
    """Return the longest context up to a stage; None leaves the model's own, by which dynamic NTK works."""
    if (_rope_at(config, stage) or {}).get("rope_type") == "dynamic":
        return None
    return max(each.reach for each in config.stages[: config.stages.index(stage) + 1])


def _model_path(config: TrainConfig, root: Path) -> str:
    """Return the model's folder below `root`, else the path as it is: a hub name, or from the working directory."""
    assert config.model.path is not None
    folder = root / config.model.path
    return str(folder) if folder.is_dir() else config.model.path


def _tokenizer_folder(config: TrainConfig, root: Path) -> Path | None:
    if config.tokenizer is not None:
        return root / config.tokenizer
    return tokenizer_folder(_model_path(config, root)) if config.model.path is not None else None


def _rope_at(config: TrainConfig, stage: StageConfig) -> dict | None:
    """Return the RoPE of a stage: its own, or that of the last stage before it that sets one."""
    index = config.stages.index(stage)
    return next((s.rope for s in reversed(config.stages[: index + 1]) if s.rope is not None), None)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by name, shared ones once, sharded ones as they are.

    Of a model with an adapter, only what is trained.
    """
    own = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    if is_adapted(model):
        own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value.detach() for name, value in model.state_dict().items() if name in own}


def _load_tensors(model: nn.Module, state: Checkpoint) -> None:
    """Put the weights of a checkpoint into a model; each process reads what it holds."""
    own, saved = _tensors(model), state.model.shapes
    wrong = {name for name in own.keys() & saved.keys() if tuple(own[name].shape) != saved[name]}
    if wrong or own.keys() != saved.keys():
        names = sorted(wrong | (own.keys() ^ saved.keys()))
        raise DataError(f"the checkpoint {state.path} does not fit the model", found=names[:4])
    for name, tensor in own.items():
        fill(tensor, partial(state.model.read, name))


def _rewind_metrics(path: Path, step: int) -> float:
    """Drop the lines of steps after the checkpoint, which will be made again; return the seconds of the rest."""
    if not path.exists():
        return 0.0
    kept = [record for record in read_jsonl(path) if record["step"] <= step]
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
    return float(kept[-1]["seconds"]) if kept else 0.0
