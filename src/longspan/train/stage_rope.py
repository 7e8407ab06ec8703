"""The RoPE of each stage, checked before any work: does it reach the positions, wherever it was set.

A stage has the frequencies of its context length (PoSE: of its target), fixed for every document, micro-batch, rank,
validation and resumed run. A RoPE that does not depend on the length has them anyway; dynamic NTK and LongRoPE are
held there (`models.rotary.hold_frequencies`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from longspan.core.errors import ConfigError
from longspan.kernels.rope import REACHING_TYPES, check_reach, rope_parameters
from longspan.models.hf import rope_of
from longspan.models.hf_config import head_dim
from longspan.train.config import StageConfig, TrainConfig
from longspan.train.stage_model import rope_at

__all__ = ["check_ropes", "check_stage_ropes", "own_context", "rope_notes", "stage_rope_notes"]


def check_ropes(config: TrainConfig, model: PretrainedConfig) -> None:
    """Check the RoPE that each stage trains with against its length and the model.

    Raises:
        ConfigError: as `check_stage_ropes`.
    """
    text = model.get_text_config(decoder=True)
    check_stage_ropes(config, own_context=own_context(text), head_dim=head_dim(text), own_rope=rope_of(model))


def check_stage_ropes(
    config: TrainConfig, *, own_context: int, head_dim: int, own_rope: Mapping[str, Any] | None = None
) -> None:
    """Check the RoPE of each stage: its own, an earlier stage's that it keeps, or the model's.

    Args:
        own_context: positions that the model was made for, 0 if it does not say how many.
        own_rope: the model's `rope_parameters`; None: it has no RoPE, or its config is not at hand.

    Raises:
        ConfigError: settings that do not exist, or a factor that does not reach the stage's positions.
    """
    for stage in config.stages:
        rope = rope_at(config, stage)
        try:
            if stage.rope is not None:
                # What it does not say is the model's own.
                partial = (own_rope or {}).get("partial_rotary_factor", 1.0)
                rotated = int(head_dim * stage.rope.get("partial_rotary_factor", partial))
                rope_parameters({"rope_theta": 1.0, **stage.rope}, head_dim=rotated)
            used = own_rope if rope is None else rope
            # With `rope_falls_short`, only what does not depend on the length is checked.
            if used is not None and own_context and not stage.rope_falls_short:
                check_reach(used, own_context=own_context, context=stage.reach)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name!r}{_whose(config, stage)}: {error}") from None


def rope_notes(config: TrainConfig, model: PretrainedConfig) -> list[str]:
    """Return warnings about stages that reach beyond the model with an unchanged RoPE, or one that counts from less."""
    text = model.get_text_config(decoder=True)
    learnt = 0 if config.model.path is None else getattr(text, "max_position_embeddings", None) or 0
    return stage_rope_notes(config, max_positions=learnt, own_rope=rope_of(model))


def stage_rope_notes(
    config: TrainConfig, *, max_positions: int, own_rope: Mapping[str, Any] | None = None
) -> list[str]:
    """Return the notes of `rope_notes`.

    Args:
        max_positions: the model's `max_position_embeddings`; 0: it has none, or has learnt nothing yet.
        own_rope: as for `check_stage_ropes`.
    """
    notes = []
    known = max_positions
    scaled = (own_rope or {}).get("rope_type") in REACHING_TYPES
    said = None
    for stage in config.stages:
        rope = stage.rope or {}
        original = rope.get("original_max_position_embeddings", max_positions)
        counts = not scaled and rope.get("rope_type") in REACHING_TYPES
        if counts and original != said and original < max_positions < stage.reach:
            said = original
            notes.append(
                f"the rope of stage {stage.name!r} counts from {original:,} positions, the model has "
                f"{max_positions:,}: as Qwen3's own YaRN does, a slip elsewhere"
            )
        if stage.steps == 0 or rope_at(config, stage) is not None:
            continue
        # Types with a factor are checked by it.
        if 0 < known < stage.reach and not scaled:
            notes.append(
                f"stage {stage.name!r} has {stage.reach:,} positions, the model {known:,}, and no stage sets a rope: "
                "its own is trained as it is"
            )
        known = max(known, stage.reach)
    return notes


def own_context(model: PretrainedConfig) -> int:
    """Return the positions that a model was made for, before its context was extended; 0 if it does not say."""
    rope = rope_of(model) or {}
    own = getattr(model, "max_position_embeddings", 0) or 0
    # Llama-3's scaling belongs to the model; other types are replaced by the stage's, which count from the original.
    original = rope.get("original_max_position_embeddings") if rope.get("rope_type") != "llama3" else None
    return int(original or own)


def _whose(config: TrainConfig, stage: StageConfig) -> str:
    if stage.rope is not None:
        return ""
    setter = next(
        (s for s in reversed(config.stages[: config.stages.index(stage)]) if s.rope is not None), None
    )
    return f", which keeps the rope of {'the model' if setter is None else f'stage {setter.name!r}'}"
