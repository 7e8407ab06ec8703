"""Calls of an agent in a long history: which one was made at a given step, and what came back.

    Step 1: {"name": "read_file", "arguments": {"path": "src/kivo.py", "line": 48}} -> {"result": "tarane 7313"}
    Step 2: {"name": "run", ...}                                                      x 2,000
    Which call was made at step 1, and what was its result? ... Answer: | {"name": "read_file", ...}

Every step is a candidate, and the same tools are called over and over, so the answer is found by its number alone. It
is right if name, arguments and result are, as JSON values. Prompt and answer room together have the stated length,
less up to one step. The history of a length and sample is the same at every depth, so that it is read once.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pydantic

from longspan.core.errors import DataError
from longspan.core.seeds import rng
from longspan.eval.fitting import fit_units
from longspan.eval.grid import GridConfig, Lengths
from longspan.eval.prompts import PromptForm
from longspan.eval.task import Built, Planned, PromptTask
from longspan.infer.requests import Request

ANSWER_TOKENS = 96
INTRODUCTION = (
    "Below is the log of an agent: each step is one call of a tool and what it returned. Remember all of them. I will "
    "ask you about one step afterwards.\n"
)
QUESTION = "Which call was made at step {step}, and what was its result?"
FORM = (
    ' Answer with one line of JSON that has the keys "name", "arguments" and "result", with the values of the log.\n'
    "Answer: "
)
TOOLS = {
    "read_file": ("path", "line"),
    "search": ("query", "limit"),
    "run": ("command", "seconds"),
    "write_row": ("table", "row"),
}
_MEASURED_STEPS = 64


class ToolCallsConfig(GridConfig):
    """Settings of an evaluation of calls in long histories."""

    lengths: Lengths = pydantic.Field("4k,16k,64k,128k", validate_default=True)
    """Context lengths in tokens, prompt and answer room together."""


class ToolCalls(PromptTask[ToolCallsConfig]):
    """The task."""

    name = "tool_calls"
    scorer = "call_match"
    answer_tokens = ANSWER_TOKENS

    def __init__(self, settings: ToolCallsConfig, form: PromptForm) -> None:
        super().__init__(settings, form)
        self._unit: tuple[int, float] | None = None

    def plan(self) -> list[Planned]:
        """Return all samples; those of one history follow one another."""
        return [
            Planned(
                (length, depth, sample),
                length + self._form.beyond(ANSWER_TOKENS),
                f"calls-{length}-{sample}",
                {"length": length, "depth": depth, "sample": sample},
            )
            for length in self.settings.lengths
            for sample in range(self.settings.samples)
            for depth in self.settings.depths
        ]

    def build(self, planned: Planned) -> Built:
        """Compose one sample. Raises DataError when its length has no room for two steps and the question."""
        length, depth, sample = planned.key
        history = History(self.settings.seed, int(length), int(sample))
        budget = int(length) - ANSWER_TOKENS

        def make(steps: int) -> tuple[tuple[Request, int], int]:
            asked = 1 + round(float(depth) * (steps - 1))
            text = f"{INTRODUCTION}{history.text(steps)}{QUESTION.format(step=asked)}{FORM}"
            request = self._form.request(text, max_new_tokens=ANSWER_TOKENS)
            assert request.prompt_ids is not None
            return (request, asked), len(request.prompt_ids)

        fixed, per_step = self._sizes()
        try:
            found = fit_units(
                make,
                budget=budget,
                slack=2 * int(per_step) + 1,
                start=(budget - fixed) / per_step,
                tokens_per_unit=per_step,
                least=2,
            )
        except DataError as error:
            raise DataError(f"a history and its answer do not fit into {length} tokens: {error}") from None
        request, asked = found.made
        fields = {
            "question": QUESTION.format(step=asked),
            "step": asked,
            "steps": found.units,
            "achieved_length": found.tokens + ANSWER_TOKENS,
            "achieved_depth": round((asked - 1) / (found.units - 1), 6),
        }
        return Built(request, fields, json.dumps(history.step(asked)))

    def _sizes(self) -> tuple[int, float]:
        """Return the tokens of a prompt without steps, and those of one step."""
        if self._unit is None:
            history = History(self.settings.seed, 0, 0)
            none, some = (
                self._form.count(f"{INTRODUCTION}{history.text(steps)}{QUESTION.format(step=10)}{FORM}")
                for steps in (0, _MEASURED_STEPS)
            )
            self._unit = none, (some - none) / _MEASURED_STEPS
        return self._unit


class History:
    """The steps of one history, drawn in their order as far as they are asked for."""

    def __init__(self, seed: int, length: int, sample: int) -> None:
        self._generator = rng(seed, "tool_calls", length, sample)
        self._steps: list[dict[str, Any]] = []
        self._lines: list[str] = []

    def step(self, number: int) -> dict[str, Any]:
        """Return name, arguments and result of a step, from 1."""
        while len(self._steps) < number:
            self._steps.append(_drawn(self._generator))
        return self._steps[number - 1]

    def text(self, steps: int) -> str:
        """Return the log of the first steps."""
        for number in range(len(self._lines) + 1, steps + 1):
            step = self.step(number)
            call = json.dumps({"name": step["name"], "arguments": step["arguments"]})
            self._lines.append(f"Step {number}: {call} -> {json.dumps({'result': step['result']})}\n")
        return "".join(self._lines[:steps])


def _drawn(generator: np.random.Generator) -> dict[str, Any]:
    name = str(generator.choice(list(TOOLS)))
    text, number = TOOLS[name]
    arguments = {text: _word(generator), number: int(generator.integers(1, 1000))}
    result = f"{_word(generator)} {generator.integers(1000, 10000)}"
    return {"name": name, "arguments": arguments, "result": result}


def _word(generator: np.random.Generator) -> str:
    return "".join(
        f"{'bdfgklmnprstvz'[first]}{'aeiou'[second]}"
        for first, second in zip(generator.integers(0, 14, 3), generator.integers(0, 5, 3))
    )
