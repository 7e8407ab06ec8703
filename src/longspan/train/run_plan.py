"""The plan of a run, made once: the dry run shows it, the trainer carries it out, a resumed run checks it.

Every mistake that can be known before the first step is found here, and everything on disk is read once: the model's
config, each store, the documents of validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import ConfigError, DataError
from longspan.core.log import get_logger
from longspan.data.readers.hub import SCHEME as HUB
from longspan.data.store import TokenStore
from longspan.data.tokenizer import load_tokenizer
from longspan.models.families import refuse_quantized
from longspan.models.head import output_head
from longspan.models.hf_config import changed_config
from longspan.models.lora import check_lora
from longspan.models.mixers import check_states, mixers
from longspan.models.routing import check_router_losses
from longspan.models.shape import model_shape
from longspan.models.stand_in import check_forward
from longspan.train.config import StageConfig, TrainConfig
from longspan.train.fit import MemoryBudget, fit_memory
from longspan.train.known_models import KnownModel, known_model
from longspan.train.record_files import DATA_ROOT_PREFIX, parse_records
from longspan.train.spread import check_parallel, check_rows
from longspan.train.stage_model import empty_stage_model, tokenizer_source
from longspan.train.stage_rope import check_ropes, check_stage_ropes, rope_notes, stage_rope_notes
from longspan.train.streams import Opened, StagePlan, plan_stages, unplanned
from longspan.train.tracking import check_trackers
from longspan.train.trainer_moments import check_init
from longspan.train.validation import ValidationPlan, check_tokenizers, plan_validation

__all__ = ["RunPlan", "plan_run"]


class RunPlan(NamedTuple):
    """What a run will do, known before its first step."""

    config: TrainConfig
    """The recipe, with the steps of stages that count in epochs."""
    root: Path
    """Where relative paths start."""
    model: KnownModel
    stages: list[StagePlan]
    """Of a stage whose data are not at hand: as of one that reads none."""
    validation: ValidationPlan | None
    notes: list[str]
    """What is to be said of the model."""
    missing: list[str]
    """Data that are not at hand."""
    memory: tuple[str, ...] = ()
    """What `memory: auto` chose and why, a line each."""

    def fitted(self, budget: MemoryBudget) -> RunPlan:
        """Return the plan of a recipe with `memory: auto` with the settings that it stands for.

        Raises:
            ArgumentError: nothing fits.
            DataError: there is no estimate for such a model.
        """
        assert self.model.config is not None
        shape = model_shape(changed_config(self.model.config, overrides=self.config.model.config_overrides))
        memory, choice = fit_memory(self.config, shape, budget)
        config = self.config.model_copy(update={"memory": memory})
        if _has_trees(self.stages):
            _refuse_trees(config, self.model)
        return self._replace(config=config, memory=tuple(choice.reasons()))

    def identity(self) -> dict[str, Any]:
        """Return what a run that goes on must find again: the model's sizes and RoPE, and the data of each stage."""
        data = {plan.stage.name: plan.mixer.fingerprint for plan in self.stages if plan.mixer is not None}
        return {"model": self.model.identity(), "data": data}


def plan_run(
    config: TrainConfig,
    *,
    data_root: Path,
    model: KnownModel | None = None,
    at_hand: bool = False,
    say: Callable[[str], None] | None = None,
) -> RunPlan:
    """Check a recipe and plan its data; nothing is trained.

    Records of the recipe become stores, as when it runs.

    Args:
        data_root: where the recipe's own `data_root` starts.
        model: the recipe's, where it is known already.
        at_hand: plan what is on this machine and fetch nothing; what is not is named in the plan.
        say: is given what is to be said of the model, before any data are read: records may take hours.

    Raises:
        ConfigError, DataError, ArgumentError, MissingDependencyError: what training cannot do.
    """
    root = data_root / config.data_root
    check_rows(config)
    if model is None:
        model = known_model(config.model, root, fetch=not at_hand)
    if model.sizes is not None:
        check_parallel(config.parallel, model.sizes.heads, model.sizes.kv_heads)
    notes = _check_model(config, model)
    for note in notes:
        if say is not None:
            say(note)
    missing = _missing(config, root) if at_hand else []
    whole = not missing and model.config is not None
    if whole:
        check_trackers(config.tracking)
    if (
        config.init_from is not None
        and model.config is not None
        and (whole or (root / config.init_from.path).exists())
    ):
        check_init(config, root, model)
    opened = Opened()
    ready = [whole or not _waits(stage, missing) for stage in config.stages]
    planned = iter(
        plan_stages(
            [stage for stage, is_ready in zip(config.stages, ready) if is_ready],
            data_root=root,
            seed=config.seed,
            tokenizer=lambda: tokenizer_source(config, root),
            opened=opened,
        )
    )
    stages = [
        next(planned) if is_ready else unplanned(stage) for stage, is_ready in zip(config.stages, ready)
    ]
    if _has_trees(stages):
        _refuse_trees(config, model)
    validation = None
    if whole:
        made_by = {name: store for plan in stages for name, store in plan.tokenizers.items()}
        _check_tokenizers(config, model, made_by, root)
        if config.validation is not None:
            validation = plan_validation(
                config.validation, data_root=root, seed=config.seed, opened=opened.stores
            )
            check_tokenizers(validation, made_by)
    # A stage that counts in epochs has its steps from here on.
    config = config.model_copy(update={"stages": tuple(plan.stage for plan in stages)})
    return RunPlan(config, root, model, stages, validation, notes, missing)


def _check_model(config: TrainConfig, known: KnownModel) -> list[str]:
    """Check the model, its forward pass, every stage's RoPE and the adapters; return what is to be said of them."""
    if known.config is None:
        if known.own_context is None:
            return []
        if known.named is not None:
            check_ropes(config, known.named)
            return rope_notes(config, known.named)
        if known.shape is not None:
            check_stage_ropes(config, own_context=known.own_context, head_dim=known.shape.head_dim)
        return stage_rope_notes(config, max_positions=known.own_context)
    for stage in config.stages:
        model = empty_stage_model(config, stage, known)
        output_head(model)
        check_states(model, config.parallel.cp)
    if known.path is not None:
        refuse_quantized(known.config, known.path, verb="trained")
    check_forward(model.config)
    check_router_losses(model, aux_loss=config.router.aux_loss, z_loss=config.router.z_loss)
    check_ropes(config, known.config)
    adapters = [] if config.lora is None else check_lora(model, config.lora)
    return rope_notes(config, known.config) + adapters


def _missing(config: TrainConfig, root: Path) -> list[str]:
    """Return the data of a recipe that are not on this machine."""
    paths = {path for stage in config.stages for path in _data_of(stage)}
    if config.validation is not None:
        for stores in config.validation.stores.values():
            paths.update((stores,) if isinstance(stores, str) else stores)
    # A data set that is read where it is counts as missing: nothing is asked of the network here.
    return sorted(path for path in paths if path.startswith(HUB) or not (root / path).exists())


def _data_of(stage: StageConfig) -> list[str]:
    paths = []
    for stream in stage.streams.values():
        stores = (stream.store,) if isinstance(stream.store, str) else stream.store or ()
        records = [parse_records(entry).path.removeprefix(DATA_ROOT_PREFIX) for entry in stream.records or ()]
        teachers = (stream.teacher,) if isinstance(stream.teacher, str) else stream.teacher or ()
        paths += [*stores, *records, *teachers, *([stream.rows] if stream.rows is not None else [])]
    return paths


def _waits(stage: StageConfig, missing: Sequence[str]) -> bool:
    """Whether a stage cannot be planned before something is fetched: records need the tokenizer beside the model."""
    return any(stream.records for stream in stage.streams.values()) or not set(missing).isdisjoint(
        _data_of(stage)
    )


def _has_trees(stages: Sequence[StagePlan]) -> bool:
    return any(getattr(rows, "has_trees", False) for plan in stages for rows in plan.sources.values())


def _refuse_trees(config: TrainConfig, model: KnownModel) -> None:
    """Refuse a run whose rows branch and cannot be computed as they are. Raises ConfigError."""
    empty = None if model.config is None else empty_stage_model(config, config.stages[0], model)
    kinds = set() if empty is None else {type(mixer).__name__ for mixer, _ in mixers(empty)}
    if kinds:
        raise ConfigError(
            "rows that branch (true_prefixes, records with branches) are computed by attention alone: a layer with a "
            "state has it behind a document's last token, and a branch goes on from one in the middle",
            found=f"layers with a state ({', '.join(sorted(kinds))})",
            fix="make records without branches, and tokenize them without true_prefixes",
        )


def _check_tokenizers(
    config: TrainConfig, model: KnownModel, made_by: dict[str, TokenStore], root: Path
) -> None:
    """Refuse ids that mean different words in different stores, and a model folder without its tokenizer."""
    if len(made_by) > 1:
        raise DataError(
            "the token stores were made with different tokenizers",
            found="; ".join(f"{store.path}: {name}" for name, store in made_by.items()),
            fix="tokenize all of them with the model's tokenizer",
        )
    assert model.config is not None
    known = model.config.get_text_config(decoder=True).vocab_size
    for store in made_by.values():
        if store.vocab_size > known:
            # Not an error: of added tokens, as those of Gemma 3 for images, texts may hold none.
            get_logger("train").warning(
                "%s was made with a tokenizer of %d tokens, the model has %d: an id beyond them ends the run",
                store.path, store.vocab_size, known,
            )  # fmt: skip
    if config.tokenizer is None:
        return
    if not (root / config.tokenizer).is_dir():
        raise ConfigError("the tokenizer of the recipe is not a folder", found=str(root / config.tokenizer))
    if made_by and load_tokenizer(root / config.tokenizer, backend="hf").fingerprint not in made_by:
        get_logger("train").warning(
            "the tokenizer in %s, which goes into the model folders, is not the one that made the token stores",
            root / config.tokenizer,
        )
