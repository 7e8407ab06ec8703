"""NeedleBench's needle tasks: one fact, a fact at every depth, chains of two to five facts, in English and Chinese.

    DATA/PaulGrahamEssays.jsonl, zh_finance.jsonl      text
    DATA/needles.jsonl                                 needle, retrieval_question, arg1, arg2, language
    DATA/names.json                                    persons of v2's chains
    DATA/multi_needle_reasoning_en.json, _zh.json      v1's: derivations, derivation_count, question, answer

Files are as in the data set `opencompass/NeedleBench` (Li et al. 2024, arXiv 2407.11963); lengths, depths, weights and
prompts are data (needlebench.yaml). Lengths are tokens of the model's own tokenizer, where published ones are GPT-4's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic

from longspan.core.config import Commas, Config
from longspan.core.log import get_logger
from longspan.eval.grid import Depths, Lengths
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.released import needlebench_haystack as placing
from longspan.eval.released.ancestral_trace import Language
from longspan.eval.released.needlebench_needles import KINDS, Kind, NeedlePart, Needles, Version, rules
from longspan.eval.released.row_task import files_of, texts_in
from longspan.eval.released.rows import Rows
from longspan.eval.summaries import mean_by
from longspan.eval.task import Built, Planned, PromptTask

_HAYSTACKS: Mapping[Language, str] = {"English": "PaulGrahamEssays.jsonl", "Chinese": "zh_finance.jsonl"}
_FINE = ("4k", "8k")
"""Sizes that v1 asks at more depths."""


class NeedleBenchConfig(Config):
    """Settings of NeedleBench's needle tasks."""

    version: Version = "v2"
    """Of the benchmark: its prompts, scores, chains and weights."""
    size: Literal["4k", "8k", "32k", "128k", "200k", "256k", "1000k"] = "32k"
    """The published configuration: lengths, depths, and the tokens that it leaves free."""
    lengths: Lengths | None = None
    """Tokens of haystack and needles and of what is left free. None: those of the size."""
    depths: Depths | None = None
    """Where needles stand. None: those of the size."""
    kinds: Annotated[tuple[Kind, ...], Commas] = KINDS
    """What is asked."""
    languages: Annotated[tuple[Language, ...], Commas] = ("English", "Chinese")
    """Of texts, needles and prompts."""
    num_needles: Annotated[tuple[int, ...], Commas] = (2, 3, 4, 5)
    """Facts of a chain, of reasoning."""
    samples: pydantic.PositiveInt | None = None
    """Samples of each cell. None: 10, of multi_retrieval 25."""
    prompts: Path | None = None
    """The released folder opencompass/datasets/needlebench_v2: relations and prompt of v2's reasoning."""

    @pydantic.model_validator(mode="after")
    def _goes_together(self) -> Self:
        if not self.kinds or not self.languages:
            raise ValueError("there is nothing to ask: kinds and languages are needed")
        if "reasoning" not in self.kinds:
            return self
        if not self.num_needles or min(self.num_needles) < 1:
            raise ValueError("a chain has one fact or more (num_needles)")
        if self.version == "v2" and self.prompts is None:
            raise ValueError(
                "v2's reasoning reads the released folder needlebench_v2 (prompts); without it ask "
                "kinds single_retrieval,multi_retrieval"
            )
        return self


class NeedleBench(PromptTask[NeedleBenchConfig]):
    """The task.

    Args:
        files: those of the data set among them.

    Raises:
        DataError: a file is missing or holds something else, or the texts are too short for a length.
    """

    name, scorer = "needlebench", "by_metric"
    answer_tokens = 2048

    def __init__(self, settings: NeedleBenchConfig, form: PromptForm, files: Sequence[Path]) -> None:
        super().__init__(settings, form)
        version, size = settings.version, settings.size
        self._lengths = settings.lengths or tuple(rules()["lengths"][version][size])
        fine = "v1_fine" if version == "v1" and size in _FINE else version
        self._depths = settings.depths or tuple(depth / 100 for depth in rules()["depths"][fine])
        parts = [
            NeedlePart(kind, language, count)
            for language in settings.languages
            for kind in settings.kinds
            for count in (settings.num_needles if kind == "reasoning" else (1,))
        ]
        self._parts = {part.subtask: part for part in parts}
        self._needles = Needles(version, parts, files, depths=len(self._depths), released=settings.prompts)
        self._texts: dict[Language, placing.Texts] = {}
        for language in settings.languages:
            rows = Rows(self._needles.file(_HAYSTACKS[language]))
            texts = [texts_in(rows, number, "text")[0] for number in range(len(rows))]
            self._texts[language] = placing.Texts(texts, form.tokenizer)
            least = min(self._spare(part) for part in parts if part.language == language)
            self._texts[language].require(max(self._lengths) - least)
        most = max(self._samples(kind) for kind in settings.kinds)
        self._orders = {language: texts.orders(most) for language, texts in self._texts.items()}
        self._say_what_is_empty()

    @classmethod
    def from_config(cls, config: NeedleBenchConfig, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task on the files of the data set."""
        return cls(
            config, form, list(files_of(data.named("haystacks and needles"), (".jsonl", ".json")).values())
        )

    def params(self) -> dict[str, Any]:
        """Return what determines the samples."""
        # Of the released folder its texts count, not where it stands.
        own = {"lengths": list(self._lengths), "depths": list(self._depths), "prompts": None}
        return {**super().params(), **own, "data_sha256": self._needles.sha256}

    def plan(self) -> list[Planned]:
        """Return a sample for each part, length, repetition and depth; those of one haystack are a group."""
        return [
            Planned(
                (subtask, length, depth, sample),
                length + self._form.room(self.answer_tokens),
                group=f"{subtask} {length} {sample}",
                fields={
                    "subtask": subtask,
                    "length": length,
                    # Where several needles are asked for, each has a depth of its own.
                    **({} if part.kind == "multi_retrieval" else {"depth": depth}),
                    "sample": sample,
                    "haystack": f"{part.language} {sample}",
                    "metric": rules()["metrics"][self.settings.version][part.kind],
                },
            )
            for subtask, part in self._parts.items()
            for length in self._lengths
            for sample in range(self._samples(part.kind))
            for depth in ((0.0,) if part.kind == "multi_retrieval" else self._depths)
        ]

    def build(self, planned: Planned) -> Built:
        """Compose one sample. Raises DataError: its question does not say how to answer, where that is needed."""
        subtask, length, depth, sample = planned.key
        part, number = self._parts[str(subtask)], int(sample)
        asked = self._needles.asked(part, number)
        needles = [placing.token_texts(self._form.tokenizer, f"\n{needle}\n") for needle in asked.needles]
        room = int(length) - self._spare(part) - sum(map(len, needles))
        haystack = self._texts[part.language].first(self._orders[part.language][number], max(room, 0))
        if part.kind == "multi_retrieval":
            tokens = placing.with_several(haystack, needles, self._depths)
        elif part.kind == "reasoning":
            tokens = placing.with_chain(haystack, needles, float(depth))
        else:
            tokens = placing.with_several(haystack, needles, [float(depth)])
        request = self._form.request(
            asked.prompt.format(context="".join(tokens)), max_new_tokens=self.answer_tokens
        )
        assert request.prompt_ids is not None
        fields = {
            "question": asked.question,
            "needle": "\n".join(asked.needles),
            "haystack_tokens": len(haystack),
            "achieved_length": len(request.prompt_ids),
        }
        return Built(request, fields, asked.answers)

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return means by part and length, of each kind, and weighted as published; `overall`: all kinds are asked."""
        cells = mean_by(samples, "subtask", "length")
        kinds, overall = self._weighted(cells)
        lengths = sorted({row["length"] for row in cells})
        return {
            "cells": cells,
            "by_length": [
                {"length": n, "mean": self._weighted([row for row in cells if row["length"] == n])[1]}
                for n in lengths
            ],
            "by_kind": [{"kind": kind, "mean": mean} for kind, mean in kinds.items()],
            "overall": overall if len(kinds) == len(KINDS) else None,
        }

    def _weighted(self, cells: Sequence[Mapping[str, Any]]) -> tuple[dict[Kind, float], float | None]:
        """Return the mean of each kind, over its parts and their lengths, and that of the kinds by their weights."""
        parts: dict[str, list[float]] = {}
        for row in cells:
            if row["mean"] is not None:
                parts.setdefault(row["subtask"], []).append(row["mean"])
        kinds: dict[Kind, list[float]] = {}
        for subtask, means in parts.items():
            kinds.setdefault(self._parts[subtask].kind, []).append(sum(means) / len(means))
        weights = rules()["weights"][self.settings.version]
        found = {kind: sum(means) / len(means) for kind, means in kinds.items()}
        total = sum(weights[kind] for kind in found)
        return found, sum(weights[kind] * mean for kind, mean in found.items()) / total if total else None

    def _samples(self, kind: Kind) -> int:
        return self.settings.samples or int(rules()["samples"][kind])

    def _spare(self, part: NeedlePart) -> int:
        if part.language == "Chinese":
            return int(rules()["spare_chinese"])
        sizes = rules()["spare"][self.settings.version][part.kind]
        return int(sizes.get(self.settings.size, sizes["rest"]))

    def _say_what_is_empty(self) -> None:
        spare = max(map(self._spare, self._parts.values()))
        if empty := [f"{length:,}" for length in self._lengths if length <= spare]:
            get_logger("eval").warning(
                "needlebench: %s tokens of size %s hold no haystack, as released: %s tokens are left free",
                ", ".join(empty),
                self.settings.size,
                f"{spare:,}",
            )
