"""RULER as a task: every subtask at every length, each sample as long as stated, composed once and kept.

settings = RulerConfig(lengths=("4k", "128k"), samples=100)
task = Ruler(settings, PromptForm(tokenizer), essay=text, cache=SampleCache("cache"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Self

import numpy as np
import pydantic

from longspan.core.config import Commas, Config
from longspan.core.errors import ConfigError, DataError
from longspan.core.files import sha256_bytes
from longspan.core.log import get_logger
from longspan.core.seeds import rng
from longspan.eval.fitting import Fitted, fit_units
from longspan.eval.grid import Lengths, refuse_repeats
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.ruler import compose
from longspan.eval.ruler.cache import CachedSample, SampleCache, cache_key
from longspan.eval.ruler.qa_documents import QaData, read_qa
from longspan.eval.ruler.subtasks import SUBTASKS, Release, Subtask
from longspan.eval.scorers import scorer_named
from longspan.eval.summaries import mean_by
from longspan.eval.task import Built, Mode, Planned
from longspan.eval.word_lists import lists_fingerprint
from longspan.infer.requests import Request

CALIBRATION = "calibration"
_FIRST_UNITS = 24


class RulerConfig(Config):
    """Settings of RULER."""

    lengths: Lengths = pydantic.Field("4k,8k,16k,32k,64k,128k", validate_default=True)
    """Context lengths in tokens, prompt and answer room together, such as 1k,4k or 1k:8k:8."""
    subtasks: Annotated[tuple[str, ...], Commas] = ()
    """Names, such as niah_single_1,vt. Default: all for which there is material."""
    samples: pydantic.PositiveInt = 100
    """Samples of each subtask and length; the paper has 500."""
    release: Release = "2024"
    """RULER's generators of the paper, or those of June 2025; they differ in vt, cwe and fwe."""
    seed: int = 0
    """Seed of every random choice."""

    @pydantic.field_validator("subtasks")
    @classmethod
    def _subtasks_exist(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in SUBTASKS]
        if unknown:
            raise ValueError(f"there is no subtask {unknown[0]!r}; there are {', '.join(SUBTASKS)}")
        return refuse_repeats(names) if names else names


class Ruler:
    """The task; each sample is a pure function of settings, tokenizer, material and its key.

    Args:
        essay: text of the haystacks of `essay` kind; it is repeated where it is short.
        qa: questions for `qa_1`, `qa_2`; a subtask without is left out (`left_out` says why).
        cache: keeps composed samples; None composes them each time.

    Raises:
        ConfigError: a subtask is asked for by name and there is no material for it.
        DataError: the essay holds no sentence.
    """

    name = "ruler"
    mode: Mode = "generate"
    scorer = "by_metric"

    def __init__(
        self,
        settings: RulerConfig,
        form: PromptForm,
        *,
        essay: str,
        qa: Sequence[QaData] = (),
        cache: SampleCache | None = None,
    ) -> None:
        self.settings = settings
        self._form = form
        self._cache = cache
        self._essay = essay
        self._qa: dict[str, QaData] = {data.task: data for data in qa}
        missing = {name: "needs --qa-data" for name in ("qa_1", "qa_2") if name not in self._qa}
        for name, reason in missing.items():
            if name in settings.subtasks:
                raise ConfigError(
                    f"subtask {name} {reason}",
                    fix="name SQuAD's dev-v2.0.json (qa_1), HotpotQA's hotpot_dev_distractor_v1.json (qa_2)",
                )
        self.left_out = {} if settings.subtasks else missing
        """Subtasks that are not part of this evaluation, and why."""
        self.subtasks = [
            subtask
            for subtask in SUBTASKS.values()
            if subtask.name not in missing and (not settings.subtasks or subtask.name in settings.subtasks)
        ]
        if not essay.strip():
            raise DataError("the essay haystack is empty")
        self._essay_sha256 = sha256_bytes(essay.encode("utf-8", "surrogatepass"))
        self._calibrated: dict[tuple[str, int], tuple[float, float]] = {}
        self._example_units: dict[int, int] = {}
        self._shared = {
            "generator": compose.GENERATOR_VERSION,
            "lists": lists_fingerprint(),
            "seed": settings.seed,
            "release": settings.release,
            "tokenizer": form.tokenizer.fingerprint,
            "form": {name: value for name, value in form.params().items() if name != "max_new_tokens"},
        }

    @classmethod
    def from_config(cls, config: RulerConfig, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task on some essays, and questions where files of these are named."""
        task = cls(
            config,
            form,
            essay="\n\n".join(document.text for document in data.documents()),
            qa=[read_qa(path) for path in data.questions],
            cache=None if data.cache is None else SampleCache(data.cache),
        )
        for name, reason in task.left_out.items():
            get_logger("eval").warning("ruler: %s is left out: it %s", name, reason)
        return task

    def params(self) -> dict[str, Any]:
        """Return what determines the samples."""
        metrics = sorted({subtask.metric for subtask in self.subtasks})
        return {
            **self.settings.to_dict(),
            **self._form.params(),
            "subtasks": [subtask.name for subtask in self.subtasks],
            "lists": lists_fingerprint(),
            "essay_sha256": self._essay_sha256,
            "qa_sha256": {name: data.sha256 for name, data in sorted(self._qa.items())},
            "prompt_version": compose.GENERATOR_VERSION,
            "metrics": {name: scorer_named(name).version for name in metrics},
        }

    def plan(self) -> list[Planned]:
        """Return all samples; those that begin alike share a group."""
        return [
            Planned(
                (subtask.name, length, sample),
                length + self._form.beyond(subtask.answer_tokens),
                f"{subtask.name}-{length}" if subtask.shares_start else "",
                {"subtask": subtask.name, "length": length, "sample": sample, "metric": subtask.metric},
            )
            for subtask in self.subtasks
            for length in self.settings.lengths
            for sample in range(self.settings.samples)
        ]

    def build(self, planned: Planned) -> Built:
        """Take one sample from the cache, or compose it. Raises DataError: it does not fit its length."""
        name, length, sample = str(planned.key[0]), int(planned.key[1]), int(planned.key[2])
        subtask = SUBTASKS[name]
        if self._cache is None:
            return self._built(subtask, self._composed(subtask, length, sample))
        key = cache_key({**self._identity(subtask), "length": length, "sample": sample})
        found = self._cache.load(key)
        if found is None:
            found = self._composed(subtask, length, sample)
            self._cache.save(key, found)
        return self._built(subtask, found)

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `cells` by subtask and length, `by_length` over subtasks, as the paper, and `left_out`."""
        cells = mean_by(samples, "subtask", "length")
        by_length = []
        for length in self.settings.lengths:
            means = [cell["mean"] for cell in cells if cell["length"] == length and cell["mean"] is not None]
            # A mean without one of the subtasks is that of an easier or a harder test.
            mean = sum(means) / len(means) if means and len(means) == len(self.subtasks) else None
            by_length.append({"length": length, "subtasks": len(means), "mean": mean})
        return {"cells": cells, "by_length": by_length, "left_out": self.left_out}

    def _identity(self, subtask: Subtask) -> dict[str, Any]:
        """Return what the samples of a subtask depend on beside length and number."""
        material = {}
        if subtask.kind == "niah" and subtask.haystack == "essay":
            material["essay"] = self._essay_sha256
        if subtask.kind == "qa":
            material["qa"] = self._qa[subtask.name].sha256
        return {**self._shared, "subtask": subtask._asdict(), **material}

    def _built(self, subtask: Subtask, sample: CachedSample) -> Built:
        details = sample.details
        request = Request(
            prompt=sample.prompt,
            prompt_ids=sample.prompt_ids,
            messages=details["messages"],
            max_new_tokens=self._form.room(subtask.answer_tokens),
            stop_ids=self._form.stop_ids,
            thinking=details["thinking"],
        )
        fields = {
            "question": details["question"],
            "achieved_length": len(sample.prompt_ids) + subtask.answer_tokens,
        }
        return Built(request, fields, details["answers"])

    def _composed(self, subtask: Subtask, length: int, sample: int) -> CachedSample:
        start, per_unit = self._calibration(subtask, length)
        if subtask.kind == "qa":
            start = self._documents_for(subtask, length, sample)
        draft, request = self._fit(subtask, length, sample, start, per_unit).made
        assert request.prompt_ids is not None
        messages = None if request.messages is None else [dict(message) for message in request.messages]
        details = {
            "answers": draft.answers,
            "question": draft.question,
            "messages": messages,
            "thinking": request.thinking,
        }
        return CachedSample(request.prompt, request.prompt_ids, details)

    def _calibration(self, subtask: Subtask, length: int) -> tuple[float, float]:
        """Return how many units fit into a length, less what samples differ by, and the tokens of one unit."""
        known = self._calibrated.get((subtask.name, length))
        if known is None:
            few, more = self._least(subtask), self._least(subtask) + _FIRST_UNITS
            sizes = [self._draft(subtask, length, CALIBRATION, units)[1] for units in (few, more)]
            per_unit = max(0.2, (sizes[1] - sizes[0]) / _FIRST_UNITS)
            start = (length - subtask.answer_tokens - sizes[0]) / per_unit
            if subtask.kind != "qa":
                fitted = self._fit(subtask, length, CALIBRATION, start, per_unit)
                per_unit = max(0.2, (fitted.tokens - sizes[0]) / max(1, fitted.units - few))
                spare = length - subtask.answer_tokens - fitted.tokens
                start = fitted.units + (spare - _slack(length, per_unit) / 3) / per_unit
            known = start, per_unit
            self._calibrated[subtask.name, length] = known
        return known

    def _fit(
        self, subtask: Subtask, length: int, sample: int | str, start: float, per_unit: float
    ) -> Fitted[tuple[compose.Draft, Request]]:
        try:
            return fit_units(
                lambda units: self._draft(subtask, length, sample, units),
                budget=length - subtask.answer_tokens,
                slack=_slack(length, per_unit),
                start=start,
                tokens_per_unit=per_unit,
                least=self._least(subtask),
            )
        except DataError as error:
            raise DataError(f"{subtask.name} does not fit {length} tokens", found=error) from None

    def _draft(
        self, subtask: Subtask, length: int, sample: int | str, units: int
    ) -> tuple[tuple[compose.Draft, Request], int]:
        """Compose a sample with so many units; return it with its request and tokens."""
        draft = self._text(subtask, length, sample, units)
        request = self._request(draft, subtask)
        assert request.prompt_ids is not None
        return (draft, request), len(request.prompt_ids)

    def _text(self, subtask: Subtask, length: int, sample: int | str, units: int) -> compose.Draft:
        generator = rng(self.settings.seed, "ruler", subtask.name, length, sample)
        release = self.settings.release
        if subtask.kind == "niah":
            return compose.niah(subtask, self._sentences, generator, units)
        if subtask.kind == "vt":
            return compose.variable_tracking(generator, units, self._example(length), release)
        if subtask.kind == "cwe":
            return compose.common_words(generator, units, length, release)
        if subtask.kind == "fwe":
            return compose.frequent_words(generator, units, length, release)
        data = self._qa[subtask.name]
        return compose.question_answering(data, 0 if sample == CALIBRATION else int(sample), generator, units)

    def _request(self, draft: compose.Draft, subtask: Subtask) -> Request:
        """Return the request; where the beginning of the answer stands is the form's to say."""
        return self._form.request(
            draft.prompt, answer_prefix=draft.answer_prefix, max_new_tokens=subtask.answer_tokens
        )

    def _least(self, subtask: Subtask) -> int:
        """Return the units without which there is no sample."""
        if subtask.kind == "niah":
            return subtask.num_keys * subtask.num_values
        return {"qa": 1, "vt": 2, "cwe": compose.COMMON_WORDS + 2, "fwe": 30}[subtask.kind]

    def _example(self, length: int) -> int:
        """Return the lines of noise in the solved example of variable tracking: 500 tokens, or an eighth."""
        if length not in self._example_units:
            budget = min(compose.EXAMPLE_TOKENS, length // 8)

            def make(units: int) -> tuple[None, int]:
                text = compose.variable_example(rng(0, "ruler", CALIBRATION), units, self.settings.release)
                return None, len(self._form.tokenizer.encode(text))

            per_unit = (make(10)[1] - make(6)[1]) / 4
            most = max(1, int((budget - make(1)[1]) / per_unit) + 1)
            self._example_units[length] = most
        return self._example_units[length]

    @cached_property
    def _sentences(self) -> list[str]:
        return compose.sentences_of(self._essay)

    @cached_property
    def _document_tokens(self) -> dict[str, np.ndarray]:
        """Tokens of each document of the QA data, with its heading."""
        encode = self._form.tokenizer.encode
        return {
            name: np.array([len(encode(f"Document 100:\n{text}\n\n")) for text in data.documents])
            for name, data in self._qa.items()
        }

    def _documents_for(self, subtask: Subtask, length: int, sample: int) -> float:
        """Return how many documents a question has room for, by the sizes of those that it takes."""
        data = self._qa[subtask.name]
        if sample >= len(data.questions):
            return 1.0
        generator = rng(self.settings.seed, "ruler", subtask.name, length, sample)
        order = compose.distractors(data, sample, generator)
        tokens = self._document_tokens[subtask.name][order]
        empty = self._form.count(compose.empty_question(data, sample))
        room = length - subtask.answer_tokens - empty - length // 400
        sums = np.cumsum(tokens)
        rounds, rest = divmod(max(0, room), int(sums[-1]))
        return float(rounds * len(order) + np.searchsorted(sums, rest, side="right"))


def _slack(length: int, tokens_per_unit: float) -> int:
    """Return how many tokens a sample may fall short of its length: 1 %, or a unit and a half."""
    return max(length // 100, int(1.5 * tokens_per_unit), 8)
