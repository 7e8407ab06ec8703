"""An evaluation task of one's own, whole: a value is asked for by its key among many pairs of a dictionary.

    from longspan.eval.registry import register

    from own_task import ENTRY

    register(ENTRY)      # or an entry point of the group `longspan.tasks`: then `longspan eval kv_retrieval` works

Each sample is a pure function of settings and its key, so a killed evaluation goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pydantic

from longspan.core.config import Config
from longspan.core.seeds import rng
from longspan.eval.fitting import fit_units
from longspan.eval.grid import depths_from, lengths_from, refuse_outside, refuse_repeats
from longspan.eval.held_out import TaskData
from longspan.eval.prompts import PromptForm
from longspan.eval.registry import Axes, TaskEntry
from longspan.eval.summaries import mean_by
from longspan.eval.task import Built, Mode, Planned
from longspan.infer.requests import Request

ENTRY = TaskEntry(
    "kv_retrieval",
    "A value is asked for by its key among many pairs.",
    config=f"{__name__}:KvConfig",
    task=f"{__name__}:KvRetrieval",
    axes=Axes(rows="depth", columns="length"),
    scorers=("contains",),
    heading="Keys and values",
    short="keys and values",
)
PROMPT_VERSION = 1
"""Raised whenever the same settings would ask something else."""
ANSWER_TOKENS = 16


class KvConfig(Config):
    """Settings of key-value retrieval."""

    lengths: tuple[pydantic.PositiveInt, ...]
    """Context lengths in tokens, prompt and room for the answer together."""
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Where the pair stands that is asked for: 0 is the first, 1 the last."""
    samples: pydantic.PositiveInt = 10
    """Samples per cell."""
    seed: int = 0

    _read_lengths = pydantic.field_validator("lengths", mode="before")(lengths_from)
    _read_depths = pydantic.field_validator("depths", mode="before")(depths_from)
    _no_repeats = pydantic.field_validator("lengths", "depths")(refuse_repeats)
    _fractions = pydantic.field_validator("depths")(refuse_outside)


class KvRetrieval:
    """The task."""

    name = ENTRY.name
    mode: Mode = "generate"
    scorer = "contains"

    def __init__(self, settings: KvConfig, form: PromptForm) -> None:
        self.settings, self.form = settings, form

    @classmethod
    def from_config(cls, config: KvConfig, data: TaskData, form: PromptForm) -> Self:
        """Return the task; it reads no files."""
        return cls(config, form)

    def params(self) -> dict[str, Any]:
        """Return what determines the samples, for the header of the records."""
        return {**self.settings.to_dict(), **self.form.params(), "prompt_version": PROMPT_VERSION}

    def plan(self) -> list[Planned]:
        """Return every sample: its key, about how long it is, what shares a prefix, and its place in the grid."""
        return [
            Planned(
                (length, depth, sample),
                length + self.form.beyond(ANSWER_TOKENS),
                f"{length}-{sample}",
                {"length": length, "depth": depth, "sample": sample},
            )
            for length in self.settings.lengths
            for sample in range(self.settings.samples)
            for depth in self.settings.depths
        ]

    def build(self, planned: Planned) -> Built:
        """Compose one sample. Raises DataError: its length has no room for two pairs."""
        length, depth, sample = planned.key

        def make(pairs: int) -> tuple[tuple[Request, str, str], int]:
            # One dictionary for all depths, so that it is read once.
            drawn = rng(self.settings.seed, "kv", length, sample).integers(10**7, 10**8, size=(pairs, 2))
            values = {str(key): str(value) for key, value in drawn.tolist()}
            key = list(values)[round(float(depth) * (len(values) - 1))]
            text = f'JSON data:\n{json.dumps(values)}\nThe value of the key "{key}" is'
            request = self.form.request(text, max_new_tokens=ANSWER_TOKENS)
            assert request.prompt_ids is not None
            return (request, key, values[key]), len(request.prompt_ids)

        per_pair = (make(20)[1] - make(10)[1]) / 10
        budget = int(length) - ANSWER_TOKENS
        found = fit_units(
            make,
            budget=budget,
            slack=int(2 * per_pair),
            start=budget / per_pair,
            tokens_per_unit=per_pair,
            least=2,
        )
        request, key, value = found.made
        return Built(request, {"question": key, "achieved_length": found.tokens + ANSWER_TOKENS}, value)

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the numbers that the command prints."""
        return {"cells": mean_by(samples, "length", "depth")}
