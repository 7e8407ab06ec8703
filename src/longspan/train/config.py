"""The training recipe: a model, an optimizer and stages, each with its context length, RoPE, data and schedule.

seed: 0
model: {path: meta-llama/Llama-2-7b-hf}
stages:
  - name: 80k
    context_length: 80k
    tokens: 5B
    lr: 2e-5
    rope: {rope_type: default, rope_theta: 5e6}
    batch_tokens: 4M
    streams:
      web: {store: stores/slimpajama, mixture: {mode: per_source}}
"""

from __future__ import annotations

from typing import Any, Literal, Self

import pydantic

from longspan.core.config import Config, Length, TokenBudget
from longspan.core.errors import ConfigError
from longspan.core.mesh_config import MeshConfig
from longspan.models.lora_config import LoraConfig
from longspan.parallel.layout import Layout
from longspan.plan.training_step import MemoryConfig
from longspan.train.loop_config import (
    DistillConfig,
    InitConfig,
    LossAverage,
    RouterConfig,
    RuntimeConfig,
    TrackingConfig,
    ValidationConfig,
)
from longspan.train.stream_config import StreamConfig


class ModelConfig(Config):
    """Where the weights come from: a pretrained model, or a configuration to start from scratch."""

    path: str | None = None
    """Folder, relative to the recipe's `data_root`, or hub name of a pretrained causal language model."""
    hf_config: dict[str, Any] | None = None
    """A transformers configuration, `model_type` included, for a model made from scratch."""
    config_overrides: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Fields of the transformers configuration that replace those at `path`, such as `rms_norm_eps: 1e-6`; RoPE and
    lengths belong to the stages, and attention has no dropout."""
    init: Literal["default", "zero_residual"] = "default"
    """First weights of a model made from scratch: transformers' own, or models/init.py's for small models."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the weights are kept. To train in bfloat16 leave this and set `memory.compute_dtype`, which on a
    GPU is bfloat16 by default. bfloat16 here loses updates below about 0.4 % of a weight, which at fine-tuning rates
    is most of them; it is right for weights that are frozen beside adapters, and there the default on a GPU."""

    @pydantic.model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.hf_config is None):
            raise ValueError("a model has either a path or an hf_config")
        reserved = {"rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings"}
        if wrong := sorted(reserved & self.config_overrides.keys()):
            raise ValueError(f"{', '.join(wrong)} follows from the stages: set their rope and context_length")
        if self.hf_config is not None and self.config_overrides:
            raise ValueError("config_overrides changes a model at a path; write the fields into hf_config")
        if self.path is not None and self.init != "default":
            raise ValueError("init has no effect on a model that is loaded from a path")
        return self


class OptimizerConfig(Config):
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    weight_decay: float = pydantic.Field(0.0, ge=0)
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""
    momentum: float = pydantic.Field(0.95, ge=0, lt=1)
    """Muon's Nesterov momentum."""
    max_grad_norm: float = pydantic.Field(1.0, gt=0, allow_inf_nan=True)
    """Gradient clipping: gradients are scaled down to this global 2-norm; `.inf`: never."""


class LrScheduleConfig(Config):
    """Learning rate over a stage, as a factor of its peak."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay: half a cosine, a straight line, none."""
    warmup_steps: int | float = pydantic.Field(0, ge=0)
    """Optimizer steps of linear rise from 0; a number below 1, such as 0.03, is a share of the stage's steps."""
    decay_fraction: float = pydantic.Field(1.0, gt=0, le=1)
    """Last part of the stage over which the rate decays; before it the rate stays at its peak (WSD)."""
    floor: float = pydantic.Field(0.1, ge=0, le=1)
    """Factor at the end of the stage."""

    @pydantic.field_validator("warmup_steps")
    @classmethod
    def _steps_are_whole(cls, steps: int | float) -> int | float:
        if steps >= 1 and steps != int(steps):
            raise ValueError("warm-up is a whole number of steps, or a share of the stage's below 1")
        return steps if 0 < steps < 1 else int(steps)

    @pydantic.model_validator(mode="after")
    def _constant_does_not_decay(self) -> Self:
        changed = [
            name for name in ("decay_fraction", "floor")
            if getattr(self, name) != type(self).model_fields[name].default
        ]  # fmt: skip
        if self.kind == "constant" and changed:
            raise ValueError(
                f"{' and '.join(changed)} has no effect on a constant rate: set kind to cosine or linear"
            )
        return self


class PoseConfig(Config):
    """Training for a long context on short rows, with skipped positions (PoSE, arXiv:2309.10400)."""

    target_length: Length = pydantic.Field(ge=2)
    """Context whose positions are trained."""
    chunks: int = pydantic.Field(2, ge=2)
    """Pieces of each document between which positions are skipped."""


class StageConfig(Config):
    """One stretch of training at one context length."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    context_length: Length = pydantic.Field(ge=2)
    """Tokens in a row, the sequence length."""
    tokens: TokenBudget | None = pydantic.Field(None, gt=0)
    """Length of the stage in tokens, rounded to whole steps; a stage has this, `steps` or `epochs`."""
    steps: int | None = pydantic.Field(None, ge=0)
    """Length of the stage in optimizer steps. 0: nothing is trained, the model only gets the stage's RoPE."""
    epochs: float | None = pydantic.Field(None, gt=0)
    """Length of the stage in passes over the rows of the stream that ends first."""
    batch_tokens: TokenBudget = pydantic.Field(gt=0)
    """Tokens in one optimizer step (the global batch), rounded down to whole rows."""
    micro_batch_tokens: TokenBudget | None = pydantic.Field(None, gt=0)
    """Tokens in one forward and backward pass of a data-parallel group; over the rest of the step gradients are
    accumulated (gradient accumulation). None: the whole step at once."""
    lr: float = pydantic.Field(gt=0)
    """Peak learning rate (Muon's, if the optimizer is Muon)."""
    adamw_lr: float | None = pydantic.Field(None, gt=0)
    """Peak rate of what AdamW trains beside Muon. None: `lr`."""
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    """Warm-up and decay of the learning rate; `schedule` is an older name of this key."""
    rope: dict[str, Any] | None = None
    """transformers `rope_parameters` of this stage. None: as they are."""
    rope_falls_short: bool = False
    """Train although the RoPE's factor times the model's own context is less than `context_length`: the positions
    beyond are then new to the model."""
    pose: PoseConfig | None = None
    """Positions are skipped, so that short rows reach far ones. None: positions count on."""
    document_mask: bool = True
    """Intra-document masking: keep the documents of a row apart. None sees another, each begins at position 0, and its
    first token is never a label. false: attention, positions and labels run over the whole row. A stream may say
    otherwise."""
    objective: Literal["lm", "sft", "distill"] = "lm"
    """lm: every token; `loss_weights` that texts carry count, masks of conversations and of packed rows do not. sft:
    what the assistant wrote; a stream without masks is refused. distill: cross-entropy mixed with a teacher's
    predictions, by the mask where there is one; every stream names its `teacher`."""
    loss_mask: bool | None = None
    """Loss mask: whether only what a mask marks is learnt, or every token; a stream may say otherwise. None: as the
    objective."""
    loss_average: LossAverage = "tokens"
    """What the loss of a step is a mean of. tokens: all trained tokens of the step count the same. samples: the mean
    of each document first, then of these, as a trainer with one conversation a batch does: four tokens of an answer
    weigh what a thousand of another text weigh. rows: the same by rows. steps: the sum over a step's tokens divided by
    the mean weight of the stage's steps so far (ProLong's token-scaled loss): a step with few labels moves little."""
    distill: DistillConfig | None = None
    """Of `objective: distill`. None: its defaults."""
    optimizer_state: Literal["fresh", "carry"] = "fresh"
    """Whether the moments of the stage before are kept."""
    max_epochs: int = pydantic.Field(1, ge=1)
    """How often the rows of a stream may be seen; a stage that needs more is refused before it starts."""
    streams: dict[str, StreamConfig] = pydantic.Field(default_factory=dict)
    """Sources of rows, by a name of your choice."""
    shares: Literal["weights", "rows"] = "weights"
    """Streams are drawn from by their weights, or by how many rows each has, so that all end together."""

    @pydantic.model_validator(mode="after")
    def _whole_rows(self) -> Self:
        for name in ("batch_tokens", "micro_batch_tokens"):
            tokens = getattr(self, name)
            if tokens is not None and tokens < self.context_length:
                raise ValueError(f"{name} ({tokens}) is less than one row of {self.context_length} tokens")
        return self

    @pydantic.model_validator(mode="after")
    def _one_duration(self) -> Self:
        given = [name for name in ("tokens", "steps", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"a stage is so many tokens, steps or epochs long: set one; found: {found}")
        if self.steps != 0 and not self.streams:
            raise ValueError("a stage that trains needs streams")
        if self.shares == "rows" and any(stream.weight != 1 for stream in self.streams.values()):
            raise ValueError("the weight of a stream has no effect with shares: rows")
        if self.epochs is not None and self.max_epochs != 1:
            raise ValueError("max_epochs has no effect on a stage that says its epochs")
        return self

    @pydantic.model_validator(mode="after")
    def _teachers_are_asked(self) -> Self:
        taught = [name for name, stream in self.streams.items() if stream.teacher is not None]
        alone = sorted(self.streams.keys() - set(taught))
        if self.objective == "distill" and alone:
            raise ValueError(
                f"objective distill needs the teacher of every stream; none of {', '.join(alone)}"
            )
        if self.objective != "distill" and (taught or self.distill is not None):
            found = ", ".join(
                [*(f"streams.{name}.teacher" for name in taught), *(["distill"] if self.distill else [])]
            )
            raise ValueError(f"{found} has no effect with objective {self.objective}: set it to distill")
        return self

    @pydantic.model_validator(mode="after")
    def _teachers_read_documents(self) -> Self:
        if self.objective == "distill" and not all(map(self.keeps_apart, self.streams)):
            raise ValueError("document_mask: false: a teacher has read each document by itself")
        return self

    @pydantic.model_validator(mode="after")
    def _positions_reach_out(self) -> Self:
        if self.pose is not None and self.pose.target_length <= self.context_length:
            raise ValueError(
                f"pose.target_length ({self.pose.target_length}) is not beyond the rows of {self.context_length}"
            )
        return self

    @pydantic.model_validator(mode="before")
    @classmethod
    def _older_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        older, newer = value.get("schedule"), value.get("lr_schedule", {})
        if not isinstance(older, dict) or not isinstance(newer, dict):
            return value
        rest = {name: setting for name, setting in value.items() if name != "schedule"}
        return {**rest, "lr_schedule": {**newer, **older}}

    def keeps_apart(self, stream: str) -> bool:
        """Whether the documents in the rows of a stream are kept apart."""
        own = self.streams[stream].document_mask
        return self.document_mask if own is None else own

    def learns_by_mask(self, stream: str) -> bool:
        """Whether of a stream only what its masks mark is learnt, where it has some."""
        own = self.streams[stream].loss_mask
        own = self.loss_mask if own is None else own
        return self.objective != "lm" if own is None else own

    def needs_mask(self, stream: str) -> bool:
        """Whether a stream without masks is refused."""
        own = self.streams[stream].loss_mask
        return self.learns_by_mask(stream) if own is None and self.objective == "sft" else bool(own)

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimizer step."""
        return self.batch_tokens // self.context_length

    @property
    def rows_per_micro_batch(self) -> int:
        """Rows in one forward and backward pass."""
        return min(self.rows_per_step, (self.micro_batch_tokens or self.batch_tokens) // self.context_length)

    @property
    def reach(self) -> int:
        """Highest number of positions that the stage trains: `context_length`, or PoSE's target."""
        return self.context_length if self.pose is None else self.pose.target_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage: its tokens rounded to whole steps, at least one.

        Raises:
            ConfigError: the stage counts in epochs, and its data are not planned; `plan_stage` fills in the steps.
        """
        if self.steps is not None:
            return self.steps
        if self.tokens is None:
            raise ConfigError(
                f"the steps of stage {self.name!r} follow from its data", found=f"{self.epochs} epochs"
            )
        return max(1, round(self.tokens / (self.rows_per_step * self.context_length)))


class CheckpointConfig(Config):
    """When training state is saved."""

    every_steps: int = pydantic.Field(100, ge=1)
    keep: int = pydantic.Field(2, ge=1)
    """Newest checkpoints that stay."""


class ParallelConfig(MeshConfig):
    """Parallelism: the processes of a run. The degrees multiply to their number, which torchrun starts.

    A run can go on with other degrees than it began with: its data and their order stay the same.
    """

    layout: Layout | None = None
    """Load balancing of context parallelism: which tokens of a sequence each process holds. None: the schedule's
    own."""
    timeout_seconds: float = pydantic.Field(600.0, gt=0)
    """A process that makes no progress for so long, or loses the others, ends with a message. Longer than a step."""


class TrainConfig(Config):
    """A whole recipe."""

    ADDED_LATER = frozenset({"router"})

    seed: int = 0
    """Of initialisation, mixture, packing and row order."""
    data_root: str = "."
    """Folder from which relative store paths start; itself relative to the recipe file."""
    tokenizer: str | None = None
    """Folder, relative to `data_root`, whose tokenizer files go into each stage's model folder. None: those beside
    the weights at `model.path`."""
    model: ModelConfig
    lora: LoraConfig | None = None
    """Train adapters beside frozen weights, which may be quantised. None: train all weights."""
    router: RouterConfig = RouterConfig()
    """Losses that keep the experts of a mixture in balance."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    init_from: InitConfig | None = None
    """Begin with the weights or the optimizer of another run's checkpoint. None: with `model` and a fresh one."""
    validation: ValidationConfig | None = None
    """Perplexity by length while the run goes on. None: none."""
    tracking: TrackingConfig = TrackingConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    stages: tuple[StageConfig, ...] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _rates_have_effect(self) -> Self:
        if self.optimizer.name == "adamw" and any(stage.adamw_lr is not None for stage in self.stages):
            raise ValueError("adamw_lr is the rate beside Muon; with optimizer adamw everything trains at lr")
        return self

    @pydantic.model_validator(mode="after")
    def _adapters_have_a_base(self) -> Self:
        if self.lora is not None and self.model.path is None:
            raise ValueError("lora trains beside a pretrained model: set model.path")
        return self

    @pydantic.model_validator(mode="after")
    def _chunks_are_of_whole_rows(self) -> Self:
        if self.memory.chunk_tokens is not None and self.parallel.cp > 1:
            raise ValueError("memory.chunk_tokens walks whole rows: set parallel.cp_ring and cp_ulysses to 1")
        return self

    @pydantic.model_validator(mode="after")
    def _first_stage_trains(self) -> Self:
        if self.stages[0].steps == 0:
            raise ValueError(f"stage {self.stages[0].name!r} trains nothing, and there is no model before it")
        return self

    @pydantic.model_validator(mode="after")
    def _different_names(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names are unique; found {names}")
        return self

    def without_machine(self) -> TrainConfig:
        """Return the recipe without how it is run and what it permits: what makes two runs the same run.

        A run may go on with another spread over processes, other micro-batches (equal but for rounding), other
        checkpoints, and limits that it keeps to.
        """
        numeric = {name: getattr(self.memory, name) for name in ("compute_dtype", "reduce_dtype")}
        machine = {
            "parallel": ParallelConfig(),
            "memory": MemoryConfig(**numeric),
            "checkpoint": CheckpointConfig(),
            "tracking": TrackingConfig(),
            "runtime": RuntimeConfig(),
            "stages": tuple(
                stage.model_copy(
                    update={"micro_batch_tokens": None, "max_epochs": 1, "rope_falls_short": False}
                )
                for stage in self.stages
            ),
        }
        return self.model_copy(update=machine)
