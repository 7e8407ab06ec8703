"""Shapes of the models of published rows."""

from __future__ import annotations

from functools import cache

from longspan.models.shape import shape_of_fields
from longspan.plan.models import MODELS, ModelShape, published_configs

K, M = 2**10, 2**20
# Qwen's first generation: Llama-2-7B's sizes with more words.
OTHERS = {"qwen-7b": ModelShape("qwen-7b", 32, 4096, 32, 32, 128, 11008, 151936)}


@cache
def shape(name: str) -> ModelShape:
    """Return the shape of a model by its name."""
    return {**MODELS, **OTHERS}.get(name) or shape_of_fields(published_configs()[name], name)
