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

import pydantic

from longspan.core.errors import DataError
from longspan.core.seeds import rng
from longspan.eval.fitting import fit_units
from longspan.eval.grid import GridConfig, Lengths
from longspan.eval.prompts import PromptForm
from longspan.eval.task import Built, Planned, PromptTask
from longspan.infer.requests import Request

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


class PasskeyConfig(GridConfig):
    """Settings of a passkey evaluation."""

    lengths: Lengths = pydantic.Field("8192:131072:20", validate_default=True)
    """Context lengths in tokens, prompt and answer room together. Default: 20 lengths, as LongLLM."""
    digits: int = pydantic.Field(default=5, ge=1, le=18)
    """Digits of the key; it does not begin with 0."""


class Passkey(PromptTask[PasskeyConfig]):
    """The task."""

    name = "passkey"
    scorer = "first_number"
    answer_tokens = ANSWER_TOKENS

    def __init__(self, settings: PasskeyConfig, form: PromptForm) -> None:
        super().__init__(settings, form)
        self._unit: tuple[int, float] | None = None

    def plan(self) -> list[Planned]:
        """Return all samples; those of one length share the noise before the key."""
        return [
            Planned(
                (length, depth, sample),
                length + self._form.beyond(ANSWER_TOKENS),
                f"passkey-{length}",
                {"length": length, "depth": depth, "sample": sample},
            )
            for length, depth in self.settings.cells()
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
