"""How much a shared prefix saves on needle grids as they were published, in closed form (`infer/flops.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from longspan.infer.flops import GridPrompt, ModelFlops, Work, ladder, work_by_themselves, work_shared


class Factor(NamedTuple):
    """How many times more the cells cost by themselves than with a shared prefix."""

    linear: float
    attention: float
    all: float


def reuse_factor(cells: Sequence[GridPrompt], model: ModelFlops) -> Factor:
    """Return by how much a shared prefix makes the cells cheaper."""
    alone, shared = work_by_themselves(cells), work_shared(cells)
    return Factor(
        alone.tokens / shared.tokens,
        alone.pairs / shared.pairs,
        _flops(alone, model) / _flops(shared, model),
    )


def _flops(work: Work, model: ModelFlops) -> float:
    return model.per_token * work.tokens + model.per_pair * work.pairs + model.per_logit_row * work.logit_rows


PUBLISHED_GRIDS: dict[str, list[GridPrompt]] = {
    # 50K to 1M in steps of 50K, 11 depths, 2 samples: 440 prompts.
    "easycontext": ladder(range(50_000, 1_000_001, 50_000), [tenth / 10 for tenth in range(11)] * 2),
    # 40 even lengths from 1000 to 128000, 10 even depths: 400 prompts.
    "fu-2024": ladder(
        [round(1000 + 127_000 * step / 39) for step in range(40)], [step / 9 for step in range(10)]
    ),
}
"""The cells of needle grids as they were published, needles and questions left out; for one haystack."""

LLAMA_2_7B = ModelFlops(
    per_token=2.0 * 32 * (4 * 4096**2 + 3 * 4096 * 11008),
    per_pair=4.0 * 32 * 4096,
    per_logit_row=2.0 * 4096 * 32000,
)
"""Of the model that both were published for."""
