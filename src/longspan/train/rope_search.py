"""LongRoPE factors for a stage of a recipe: candidates are scored by the loss of some of the stage's own rows.

The result is a `rope` to write into the recipe: what a run trains with stands in its settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from longspan.core.errors import ConfigError
from longspan.core.log import get_logger
from longspan.data.rows.loader import PackedRow
from longspan.kernels.longrope import PAPER, LongRopeResult, LongRopeSearch, attention_scaling, search_factors
from longspan.kernels.rope import inv_freq
from longspan.models.hf import evaluated_dtype, load_model, rope_of, usable_device
from longspan.models.hf_config import head_dim
from longspan.train.batch import collate, total_weight
from longspan.train.config import TrainConfig
from longspan.train.known_models import known_model
from longspan.train.objectives import ModelWithLoss
from longspan.train.stage_model import tokenizer_source
from longspan.train.stage_rope import own_context
from longspan.train.streams import plan_stages, stage_rows

__all__ = ["FoundRope", "score_factors", "search_rope"]


class FoundRope(NamedTuple):
    """What a search found for a stage."""

    rope: dict[str, Any]
    """The stage's `rope_parameters`."""
    result: LongRopeResult
    """With scores in nats a token."""


def search_rope(
    config: TrainConfig,
    stage_name: str,
    *,
    data_root: str | Path = ".",
    rows: int = 8,
    search: LongRopeSearch = PAPER,
) -> FoundRope:
    """Search LongRoPE factors for a stage on its first `rows` rows.

    Raises:
        ConfigError: no such stage, a model from scratch, or one whose RoPE is scaled already.
    """
    stage = next((stage for stage in config.stages if stage.name == stage_name), None)
    if stage is None:
        raise ConfigError("no such stage", found=stage_name, allowed=[each.name for each in config.stages])
    if config.model.path is None:
        raise ConfigError(
            "a model from scratch has no trained RoPE for the factors to preserve", fix="set model.path"
        )
    root = Path(data_root) / config.data_root
    origin = known_model(config.model, root, fetch=True)
    assert origin.path is not None and origin.config is not None
    dtype = evaluated_dtype(origin.path, usable_device())
    model = load_model(origin.path, max_position_embeddings=stage.reach, dtype=dtype, config=origin.as_saved)
    model = model.to(usable_device()).eval()
    rope = rope_of(model.config) or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError("LongRoPE is searched for a model with plain RoPE", found=rope)
    known = own_context(origin.config.get_text_config(decoder=True))
    rotated = int(head_dim(model.config) * rope.get("partial_rotary_factor", 1.0))
    plans = plan_stages(
        [stage], data_root=root, seed=config.seed, tokenizer=lambda: tokenizer_source(config, root)
    )
    calibration = stage_rows(plans[0], 0, rows, seed=config.seed)
    theta = float(rope["rope_theta"])
    scaling = attention_scaling(stage.reach / known, known)

    def score(factors: Sequence[float]) -> float:
        return score_factors(model, calibration, factors, theta=theta, scaling=scaling)

    result = search_factors(
        score,
        theta=theta,
        head_dim=rotated,
        own_context=known,
        context=stage.reach,
        search=search,
        seed=config.seed,
    )
    get_logger("train").info(
        "LongRoPE for stage %s: %.4f nats a token after %d candidates; %s",
        stage.name, result.score, result.evaluations,
        ", ".join(f"{name} {value:.4f}" for name, value in result.started_at.items()),
    )  # fmt: skip
    return FoundRope(result.rope(theta=theta, own_context=known, context=stage.reach), result)


@torch.no_grad()
def score_factors(
    model: nn.Module, rows: Sequence[PackedRow], factors: Sequence[float], *, theta: float, scaling: float
) -> float:
    """Return the mean loss of `rows` in nats a token with the frequencies divided by `factors`.

    The model's frequencies are as before afterwards.
    """
    device = next(model.parameters()).device
    plain = inv_freq({"rope_theta": theta}, head_dim=2 * len(factors)).double()
    frequencies = (plain / torch.tensor(factors, dtype=torch.float64)).float().to(device)
    with _frequencies(model, frequencies, scaling):
        root = ModelWithLoss(model)
        losses = sum(float(root(collate([row]).to(device)).loss) for row in rows)
    return losses / max(total_weight(rows), 1.0)


@contextmanager
def _frequencies(model: nn.Module, frequencies: torch.Tensor, scaling: float) -> Iterator[None]:
    places = [
        (module, module.inv_freq, getattr(module, "attention_scaling", 1.0))
        for module in model.modules()
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor)
    ]
    try:
        for module, _, _ in places:
            rotary = cast(Any, module)
            rotary.inv_freq, rotary.attention_scaling = frequencies, scaling
        yield
    finally:
        for module, before, factor in places:
            rotary = cast(Any, module)
            rotary.inv_freq, rotary.attention_scaling = before, factor
