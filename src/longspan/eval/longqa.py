"""Questions on long documents from local files, by the prompts and metrics of LongBench.

    {"context": "...", "input": "Who wrote it?", "answers": ["Ada"], "dataset": "hotpotqa"}

LongBench's released files are read as they are. A data set that it does not know has a plain prompt and
`qa_f1`, or the `metric` that its samples name. A prompt that is too long loses its middle: instructions stand
at its head, the question at its tail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import pydantic

from longspan.core.config import Commas, Config, Length, parse_yaml
from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import sha256_bytes, sha256_file
from longspan.core.log import get_logger
from longspan.data.readers import ReadReport, read_objects
from longspan.data.readers.fields import printable
from longspan.data.readers.opening import COMPRESSION
from longspan.eval.fitting import cut_prompt
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.scorers import scorer_named
from longspan.eval.summaries import mean_by, means_of_means
from longspan.eval.task import Built, Mode, Planned

PROMPT_VERSION = 1
"""Raised whenever the same settings would compose another prompt."""
_CHARS_PER_TOKEN = 4
_FIELDS = "context and input (or question) as texts, answers (or answer)"


class DatasetRule(Config):
    """How one data set is asked and scored."""

    kind: str
    prompt: str
    metric: str
    max_new_tokens: Length = pydantic.Field(ge=1)
    chat: bool = True
    first_line: bool = False


class LongQaSample(NamedTuple):
    """A question with its document."""

    dataset: str
    number: int
    """Among those of its data set."""
    context: str
    question: str
    answers: list[str]
    metric: str | None
    all_classes: list[str] | None


class LongQaData(NamedTuple):
    """What was read."""

    samples: list[LongQaSample]
    sha256: dict[str, str]
    """Of each file, by name."""
    left_out: int = 0
    """Records that are not questions."""


class LongQaConfig(Config):
    """Settings of an evaluation on local questions."""

    datasets: Annotated[tuple[str, ...], Commas] = ()
    """Names of data sets. Default: all that the files hold."""
    samples: pydantic.PositiveInt | None = None
    """The first so many of each data set. None: all."""
    max_length: Length | None = None
    """Tokens of prompt and answer, such as 128k; a longer prompt loses its middle, and its record says how many tokens
    that were. None: nothing is cut."""


class LongQa:
    """The task; each sample is a pure function of settings, tokenizer and data.

    Few-shot examples and code are put as plain text, to chat models too.

    Raises:
        DataError: no sample is left, or one that is a choice of classes does not name them.
        ArgumentError: a sample names a metric that there is not.
    """

    name = "longqa"
    mode: Mode = "generate"
    scorer = "by_metric"

    def __init__(self, settings: LongQaConfig, form: PromptForm, data: LongQaData) -> None:
        self.settings = settings
        self._form = form
        self._plain = form.plain()
        self._data = data
        self._samples = {
            (sample.dataset, sample.number): sample
            for sample in data.samples
            if (not settings.datasets or sample.dataset in settings.datasets)
            and (settings.samples is None or sample.number < settings.samples)
        }
        if not self._samples:
            names = sorted({sample.dataset for sample in data.samples})
            raise DataError("no sample is left to ask", found=settings.datasets, allowed=names)
        for sample in self._samples.values():
            scorer_named(self._metric(sample))
            if self._metric(sample).startswith("classification") and not sample.all_classes:
                raise DataError(f"sample {sample.number} of {sample.dataset} names no all_classes")

    @classmethod
    def from_config(cls, config: LongQaConfig, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task on the questions of some files. Raises as `read_longqa`; ArgumentError: no such data set."""
        read = read_longqa(data.named("questions"), strict=data.strict)
        known = {sample.dataset for sample in read.samples}
        if unknown := [name for name in config.datasets if name not in known]:
            raise ArgumentError("the files hold no such data set", found=unknown, allowed=sorted(known))
        return cls(config, form, read)

    def params(self) -> dict[str, Any]:
        """Return what determines the samples."""
        names = sorted({sample.dataset for sample in self._samples.values()})
        metrics = sorted({self._metric(sample) for sample in self._samples.values()})
        return {
            **self.settings.to_dict(),
            **self._form.params(),
            "datasets": names,
            "metrics": {name: scorer_named(name).version for name in metrics},
            "data_sha256": self._data.sha256,
            **({"left_out_records": self._data.left_out} if self._data.left_out else {}),
            "prompts_sha256": sha256_bytes(_rules_text().encode())[:16],
            "prompt_version": PROMPT_VERSION,
        }

    def plan(self) -> list[Planned]:
        """Return all samples; questions on one document stand together."""
        groups: dict[str, list[Planned]] = {}
        for (dataset, number), sample in self._samples.items():
            rule = rule_for(dataset)
            tokens = len(sample.context) // _CHARS_PER_TOKEN
            if self.settings.max_length is not None:
                tokens = min(tokens, self.settings.max_length - self._form.room(rule.max_new_tokens))
            group = sha256_bytes(f"{dataset}\0{sample.context}".encode("utf-8", "surrogatepass"))[:16]
            fields = {"dataset": dataset, "sample": number, "metric": self._metric(sample)}
            planned = Planned((dataset, number), tokens + self._form.room(rule.max_new_tokens), group, fields)
            groups.setdefault(group, []).append(planned)
        return [planned for group in groups.values() for planned in group]

    def build(self, planned: Planned) -> Built:
        """Compose one sample. Raises DataError: its data set's answer leaves no room for a prompt."""
        sample = self._samples[str(planned.key[0]), int(planned.key[1])]
        rule = rule_for(sample.dataset)
        form = self._form if rule.chat else self._plain
        prompt = rule.prompt.format(context=sample.context, input=sample.question)
        removed = 0
        if self.settings.max_length is not None:
            room = self.settings.max_length - form.room(rule.max_new_tokens)
            prompt, removed = cut_prompt(prompt, form, room)
        request = form.request(prompt, max_new_tokens=rule.max_new_tokens)
        assert request.prompt_ids is not None
        fields: dict[str, Any] = {
            "question": sample.question,
            "category": rule.kind,
            "length": len(request.prompt_ids),
            "removed_tokens": removed,
        }
        if rule.first_line:
            fields["postprocess"] = "first_line"
        if sample.all_classes:
            fields["all_classes"] = sample.all_classes
        return Built(request, fields, sample.answers)

    def summary(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `by_dataset`, and as in LongBench's tables `by_kind` and `averages`: means over data sets' means."""
        by_dataset = mean_by(samples, "dataset")
        kinds: dict[str, list[float]] = {}
        for row in by_dataset:
            if row["mean"] is not None:
                kinds.setdefault(rule_for(row["dataset"]).kind, []).append(row["mean"])
        by_kind = [
            {"kind": kind, "datasets": len(means), "mean": sum(means) / len(means)}
            for kind, means in kinds.items()
        ]
        return {"by_dataset": by_dataset, "by_kind": by_kind, "averages": means_of_means(by_dataset)}

    def _metric(self, sample: LongQaSample) -> str:
        return sample.metric or rule_for(sample.dataset).metric


def read_longqa(paths: Sequence[str | Path], *, strict: bool = False) -> LongQaData:
    """Read records with context, input (or question), answers (or answer), and optional fields.

    JSON lines, or another format by its ending. `dataset` is the file's name where samples do not say; `metric` and
    `all_classes` are optional. What is not a question is left out, counted and named in a warning.

    Raises:
        DataError: a file is missing or damaged, or none holds a question; (`strict`) a record is none.
    """
    samples: list[LongQaSample] = []
    counts: Counter[str] = Counter()
    report = ReadReport()
    for path in map(Path, paths):
        for place, record in read_objects(path, strict=strict, report=report):
            try:
                dataset = str(record.get("dataset") or printable(_name_of(path)))
                samples.append(_sample(record, dataset, counts[dataset]))
            except _NoQuestionError as error:
                if strict:
                    raise DataError(
                        f"{place}: {error}", fix="mend the record, or leave out --strict to skip it"
                    ) from None
                report.skip("wrong_types", place, str(error))
                continue
            counts[dataset] += 1
            report.documents += 1
    warning = report.warning()
    if not samples:
        raise DataError(
            "the files hold no samples", found=warning or ", ".join(map(str, paths)), allowed=_FIELDS
        )
    if warning is not None:
        get_logger("eval").warning(warning)
    sha256 = {Path(path).name: sha256_file(path) for path in paths}
    return LongQaData(samples, sha256, report.num_skipped)


def _name_of(path: Path) -> str:
    """Return the name of a file without the endings of its format and compression."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSION else path.stem


class _NoQuestionError(Exception):
    """Why a record is not a question on a document."""


def _sample(record: Mapping[str, Any], dataset: str, number: int) -> LongQaSample:
    question = record.get("input", record.get("question"))
    answers = record.get("answers", record.get("answer"))
    context, classes, metric = record.get("context"), record.get("all_classes"), record.get("metric")
    several = [
        str(each) for each in (answers if isinstance(answers, list) else [answers]) if _is_answer(each)
    ]
    if not isinstance(context, str) or not isinstance(question, str) or not several:
        raise _NoQuestionError(
            f"not a question on a document (fields {', '.join(map(str, sorted(record)))[:200]})"
        )
    if not (
        classes is None or (isinstance(classes, list) and all(isinstance(each, str) for each in classes))
    ):
        raise _NoQuestionError("all_classes is not a list of texts")
    if not (metric is None or isinstance(metric, str)):
        raise _NoQuestionError("metric is not a name")
    for text in (context, question, *several):
        if printable(text) != text:
            raise _NoQuestionError("a text with half of a surrogate pair")
    return LongQaSample(dataset, number, context, question, several, metric, classes)


def _is_answer(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and value != ""


def rule_for(dataset: str) -> DatasetRule:
    """Return how a data set is asked; LongBench-E's `hotpotqa_e` as `hotpotqa`, an unknown one plainly."""
    rules, default = _rules()
    return rules.get(dataset, rules.get(dataset.removesuffix("_e"), default))


def longbench_names() -> list[str]:
    """Return the names of LongBench's data sets."""
    return list(_rules()[0])


@cache
def _rules() -> tuple[dict[str, DatasetRule], DatasetRule]:
    content = parse_yaml(_rules_text(), where="longbench.yaml")
    rules = {
        name: DatasetRule.from_dict(rule, where=f"longbench.yaml: {name}")
        for name, rule in content["datasets"].items()
    }
    return rules, DatasetRule.from_dict(content["default"], where="longbench.yaml: default")


@cache
def _rules_text() -> str:
    return files("longspan.eval").joinpath("longbench.yaml").read_text(encoding="utf-8")
