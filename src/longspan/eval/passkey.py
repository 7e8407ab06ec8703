"""Passkey retrieval: a number stated among the same few sentences over and over, asked back at the end.

    There is an important piece of information hidden inside a lot of irrelevant text. ...
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.     x 3,000
    The pass key is 48213. Remember it. 48213 is the pass key.
    The grass is green. ...
    What is the pass key? The pass key is| 48213

The prompt family is that of landmark attention (Mohtashami and Jaggi, arXiv 2305.16300), with which FlagEmbedding,
LongLoRA and others evaluate. Prompt and answer room together have the stated length, less up to one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import pydantic

from longspan.core.config import Config
from longspan.core.errors import DataError
from longspan.core.seeds import rng
from longspan.eval.fitting import fit_units
from longspan.eval.grid import depths_from, lengths_from, refuse_outside, refuse_repeats
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.summaries import mean_by
from longspan.eval.task import Built, Mode, Planned
from longspan.infer.requests import Request

PROMPT_VERSION = 1
"""Raised whenever the same settings would compose another prompt."""
ANSWER_TOKENS = 32
INTRODUCTION = (
    "There is an important piece of information hidden inside a lot of irrelevant text. Find it and memorize "
    "it. I will quiz you about it afterwards.\n"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
KEY = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
_MEASURED_UNITS = 64
FARTHEST = 0.2
"""How far off its depth the key may stand: with fewer than 3 lines of noise some depths have no place."""


class PasskeyConfig(Config):
    """Settings of a passkey evaluation: every length with every depth is a cell of `samples` samples."""

    lengths: tuple[pydantic.PositiveInt, ...] = pydantic.Field("8192:131072:20", validate_default=True)
    """Context lengths in tokens, prompt and answer room together. Default: 20 lengths, as LongLLM."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the key stands: 0 is the start of the noise, 1 its end; such as 0,0.5,1 or 0:1:11."""
    samples: pydantic.PositiveInt = 10
    """Samples of each length and depth."""
    digits: int = pydantic.Field(default=5, ge=1, le=18)
    """Digits of the key; it does not begin with 0."""
    seed: int = 0
    """Seed of every random choice."""

    _read_lengths = pydantic.field_validator("lengths", mode="before")(lengths_from)
    _read_depths = pydantic.field_validator("depths", mode="before")(depths_from)
    _no_repeats = pydantic.field_validator("lengths", "depths")(refuse_repeats)
    _fractions = pydantic.field_validator("depths")(refuse_outside)


class Passkey:
    """The task; each sample is a pure function of settings, tokenizer and its key."""

    name = "passkey"
    mode: Mode = "generate"
    scorer = "first_number"

    def __init__(self, settings: PasskeyConfig, form: PromptForm) -> None:
        self.settings = settings
        self._form = form
        self._unit: tuple[int, float] | None = None

    @classmethod
    def from_config(cls, config: PasskeyConfig, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task; it reads nothing."""
        return cls(config, form)

    def params(self) -> dict[str, Any]:
        """Return what determines the samples."""
        return {
            **self.settings.to_dict(),
            **self._form.params(),
            "prompt_version": PROMPT_VERSION,
            "max_new_tokens": self._form.room(ANSWER_TOKENS),
        }

    def plan(self) -> list[Planned]:
        """Return all samples; those of one length share the noise before the key."""
        return [
            Planned(
                (length, depth, sample),
                length + self._form.beyond(ANSWER_TOKENS),
                f"passkey-{length}",
                {"length": length, "depth": depth, "sample": sample},
            )
            for length in self.settings.lengths
            for depth in self.settings.depths
            for sample in range(self.settings.samples)
        ]

    def build(self, planned: Planned) -> Built:
        """Compose one sample. Raises DataError when its length has no room for the key and the question."""
        length, depth, sample = planned.key
        generator = rng(self.settings.seed, "passkey", length, depth, sample)
        low = 10 ** (self.settings.digits - 1)
        key = str(generator.integers(low, 10 * low))
        budget = int(length) - ANSWER_TOKENS

        def make(units: int) -> tuple[tuple[Request, int], int]:
            before = round(float(depth) * units)
            text = passkey_prompt(key, before=before, after=units - before)
            request = self._form.request(text, max_new_tokens=ANSWER_TOKENS)
            assert request.prompt_ids is not None
            return (request, before), len(request.prompt_ids)

        fixed, per_unit = self._sizes()
        slack = int(per_unit) + 1
        start = (budget - fixed) / per_unit
        try:
            found = fit_units(make, budget=budget, slack=slack, start=start, tokens_per_unit=per_unit)
        except DataError as error:
            raise DataError(
                f"a passkey prompt and its answer do not fit into {length} tokens: {error}"
            ) from None
        request, before = found.made
        if abs(before / found.units - float(depth)) > FARTHEST:
            raise DataError(
                f"{found.units} lines of noise in {length} tokens have no place at depth {depth}",
                allowed=f"{FARTHEST} off",
            )
        fields = {
            "question": QUESTION,
            "achieved_length": found.tokens + ANSWER_TOKENS,
            "achieved_depth": round(before / found.units, 6),
        }
        return Built(request, fields, key)

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `cells`: the mean score of each length and depth."""
        return {"cells": mean_by(samples, "length", "depth")}

    def _sizes(self) -> tuple[int, float]:
        """Return the tokens of a prompt without noise, and those of one unit of noise."""
        if self._unit is None:
            key = "9" * self.settings.digits
            none, some = (
                self._form.count(passkey_prompt(key, before=units, after=0)) for units in (0, _MEASURED_UNITS)
            )
            self._unit = none, (some - none) / _MEASURED_UNITS
        return self._unit


def passkey_prompt(key: str, *, before: int, after: int) -> str:
    """Return the prompt with so many units of noise before and after the key."""
    return f"{INTRODUCTION}{NOISE * before}{KEY.format(key=key)}{NOISE * after}{QUESTION}"
