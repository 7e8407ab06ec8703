"""The RoPE of each stage, checked before any work: does it reach the positions, do all ranks see it alike."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from longspan.core.errors import ConfigError
from longspan.kernels.rope import check_reach, rope_parameters
from longspan.train.config import TrainConfig

__all__ = ["check_ropes", "check_stage_ropes", "own_context"]


def check_ropes(config: TrainConfig, model: PretrainedConfig) -> None:
    """Check the RoPE that each stage sets against its length, the model and the sequence parallelism.

    Raises:
        ConfigError: as `check_stage_ropes`.
    """
    text = model.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    check_stage_ropes(config, own_context=own_context(text), head_dim=head_dim)


def check_stage_ropes(config: TrainConfig, *, own_context: int, head_dim: int) -> None:
    """Check the RoPE of each stage for a model of `own_context` positions, 0 if it does not say how many.

    Raises:
        ConfigError: settings that do not exist, a factor that does not reach the stage's positions, or a RoPE that
            changes with the length of the sequence while ranks hold parts of it.
    """
    shared = config.parallel.cp_ring * config.parallel.cp_ulysses
    for stage in config.stages:
        rope = stage.rope
        if rope is None:
            continue
        where = f"stage {stage.name!r}"
        rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        try:
            # The theta may be the model's own.
            rope_parameters({"rope_theta": 1.0, **rope}, head_dim=rotated)
            # With `rope_falls_short`, only what is no matter of length is checked.
            context = own_context if stage.rope_falls_short or own_context == 0 else stage.reach
            check_reach(rope, own_context=own_context, context=context, head_dim=rotated)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if shared > 1 and _changes_with_length(rope):
            raise ConfigError(
                f"{where}: RoPE of type {rope['rope_type']} depends on the longest position of a sequence, and each "
                "rank would see another",
                found=f"{shared} ranks share a sequence",
                fix="use ntk or yarn, longrope with short_factor equal to long_factor, or cp degrees of 1",
            )


def own_context(model: PretrainedConfig) -> int:
    """Return the positions that a model was made for, before its context was extended; 0 if it does not say."""
    rope = getattr(model, "rope_parameters", None) or {}
    own = getattr(model, "max_position_embeddings", 0) or 0
    # Llama-3's scaling belongs to the model; other types are replaced by the stage's, which count from the original.
    original = rope.get("original_max_position_embeddings") if rope.get("rope_type") != "llama3" else None
    return int(original or own)


def _changes_with_length(rope: dict[str, Any]) -> bool:
    kind = rope.get("rope_type", "default")
    return kind == "dynamic" or (kind == "longrope" and rope["short_factor"] != rope["long_factor"])
