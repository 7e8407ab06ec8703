"""An evaluation task of one's own, whole: a value is asked for by its key among many pairs of a dictionary.

    from longspan.eval.registry import register

    from own_task import ENTRY

    register(ENTRY)      # or an entry point of the group `longspan.tasks`: then `longspan eval kv_retrieval` works

Each sample is a pure function of settings and its key, so a killed evaluation goes on where it stopped.
"""

from __future__ import annotations

import json

from longspan.core.seeds import rng
from longspan.eval.fitting import fit_units
from longspan.eval.grid import GridConfig
from longspan.eval.registry import Axes, TaskEntry
from longspan.eval.task import Built, Planned, PromptTask
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
ANSWER_TOKENS = 16


class KvConfig(GridConfig):
    """Settings of key-value retrieval: lengths, depths (0 is the first pair, 1 the last), samples, seed."""


class KvRetrieval(PromptTask[KvConfig]):
    """The task."""

    name = ENTRY.name
    scorer = "contains"
    answer_tokens = ANSWER_TOKENS

    def plan(self) -> list[Planned]:
        """Return every sample: its key, about how long it is, what shares a prefix, and its place in the grid."""
        return [
            Planned(
                (length, depth, sample),
                length + self._form.beyond(ANSWER_TOKENS),
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
            request = self._form.request(text, max_new_tokens=ANSWER_TOKENS)
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
