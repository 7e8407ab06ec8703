"""lm-eval's tasks as evaluations of ours: records that resume, one sample a question.

    tasks = load_tasks(["mmlu"], data_root="evaluation", num_fewshot=5)
    run_harness(tasks, answerer, form=PromptForm(tokenizer), label="before", out="run/records/mmlu.jsonl")

lm-eval composes the prompts and scores the answers; asking, batching and recording are ours. A question whose
answer is recorded is not asked again: its record is named by the text of all its requests. Needs the extra
`harness`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.core.errors import DataError
from longspan.core.files import sha256_bytes
from longspan.core.optional import require
from longspan.eval.compound import Compound, Judged, PlannedCompound, run_compounds
from longspan.eval.prompts import PromptForm
from longspan.eval.records import make_header, sample_id
from longspan.eval.summaries import mean_by, means_of_means
from longspan.infer.requests import Answer, Answerer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

    from longspan.eval.harness_lm import Asked, HarnessLM

BRIDGE_VERSION = 1
"""Raised whenever the same task would be asked or recorded in another way."""


def run_harness(
    tasks: Mapping[str, ConfigurableTask],
    answerer: Answerer,
    *,
    form: PromptForm,
    label: str,
    out: str | Path,
    chat: bool = False,
    limit: int | None = None,
    max_length: int | None = None,
    note: str | None = None,
    used: Mapping[str, Any] | None = None,
    retry_unscored: bool = False,
) -> dict[str, Any]:
    """Ask lm-eval's tasks; write one record a question to `out`, return a summary.

    Args:
        tasks: as `harness_data.load_tasks` returns them.
        form: how text becomes ids.
        chat: put questions as a chat by the form's template, save where the benchmark wants none.
        limit: the first so many questions of each task.
        max_length: tokens of prompt and answer; a longer prompt loses its middle. None: see `HarnessLM`.

    Returns:
        what every summary holds, by_dataset and by_subtask (samples, scored, mean, interval), averages (over the
        means of a data set's subtasks) and truncated, the number of questions whose prompt was cut.

    Raises:
        ConfigError: `out` holds an evaluation with other settings.
        MissingDependencyError: lm-eval is not installed.
    """
    version = require("lm_eval", extra="harness", feature="the bridge to lm-eval").__version__
    from longspan.eval.harness_data import family_of, takes_chat_template
    from longspan.eval.harness_lm import HarnessLM

    lm = HarnessLM(answerer, form, max_length=max_length)
    header = make_header(
        "harness",
        label,
        model_info=answerer.identity,
        note=note,
        used=used,
        tokenizer=form.tokenizer.fingerprint,
        seed=0,
        params={
            "tasks": {name: _settings(task) for name, task in tasks.items()},
            "limit": limit,
            "chat": chat,
            **form.params(),
            "max_length": lm.max_length,
            "truncation": "middle",
            "mode": "lm-eval",
            "scorer": {"name": "lm-eval", "version": version},
            "bridge_version": BRIDGE_VERSION,
        },
    )
    planned = []
    for name, task in tasks.items():
        dataset, subtask = family_of(name)
        as_chat = chat and takes_chat_template(name)
        fields = {"dataset": dataset, "subtask": subtask, "metric": _main_metric(task)}
        for number, instances in enumerate(_questions(task, lm, limit=limit, chat=as_chat)):
            digest = sha256_bytes(repr([each.args for each in instances]).encode("utf-8", "surrogatepass"))
            planned.append(
                PlannedCompound(
                    sample_id(header, name, number, digest),
                    sum(len(each.args[0]) for each in instances) // 4,
                    {**fields, "sample": number},
                    _builder(task, lm, instances),
                )
            )
    summary, records = run_compounds(planned, answerer, header=header, out=out, retry_unscored=retry_unscored)
    subtasks = mean_by(records, "dataset", "subtask")
    return {
        **summary,
        "by_dataset": mean_by(records, "dataset"),
        "by_subtask": subtasks,
        "averages": means_of_means(subtasks, by="dataset"),
        "truncated": sum(bool(record.get("truncated")) for record in records),
    }


def _settings(task: ConfigurableTask) -> dict[str, Any]:
    return {"version": str(task.VERSION), "num_fewshot": int(task.get_config("num_fewshot") or 0)}


def _main_metric(task: ConfigurableTask) -> str:
    """Return the first metric; "score" is what LongBench calls each of its metrics a second time."""
    names = list(task.higher_is_better())
    return next((name for name in names if name != "score"), names[0])


def _questions(
    task: ConfigurableTask, lm: HarnessLM, *, limit: int | None, chat: bool
) -> list[list[Instance]]:
    """Return the requests of each question, in order."""
    task.set_fewshot_seed(1234)  # lm-eval's own default
    task.build_all_requests(
        limit=limit,
        apply_chat_template=chat,
        chat_template=lm.apply_chat_template if chat else None,
        tokenizer_name=lm.tokenizer_name if chat else "",
    )
    questions: dict[int, list[Instance]] = {}
    for instance in task.instances:
        questions.setdefault(instance.doc_id, []).append(instance)
    return [sorted(instances, key=lambda each: each.idx) for _, instances in sorted(questions.items())]


def _builder(task: ConfigurableTask, lm: HarnessLM, instances: Sequence[Instance]) -> Callable[[], Compound]:
    def build() -> Compound:
        kind = instances[0].request_type
        asked = [_asked(lm, kind, instance) for instance in instances]
        requests = [request for each in asked for request in each.requests]
        return Compound(
            "generate" if kind == "generate_until" else "score",
            requests,
            _expected(task, instances[0].doc),
            lambda answers: _judge(task, instances, asked, answers),
            {"truncated": sum(each.truncated for each in asked)},
        )

    return build


def _asked(lm: HarnessLM, kind: str, instance: Instance) -> Asked:
    if kind == "generate_until":
        return lm.ask_generation(*instance.args[:2])
    if kind == "loglikelihood":
        return lm.ask_likelihood(*instance.args)
    if kind == "loglikelihood_rolling":
        return lm.ask_rolling(instance.args[0])
    raise DataError("lm-eval asks in a way that is not known here", found=kind)


def _judge(
    task: ConfigurableTask, instances: Sequence[Instance], asked: Sequence[Asked], answers: Sequence[Answer]
) -> Judged:
    """Score the answers to one question by the task's own rules."""
    from longspan.eval.harness_lm import likelihood

    rest = iter(answers)
    responses: list[Any] = []
    for instance, each in zip(instances, asked):
        given = [next(rest) for _ in each.requests]
        if instance.request_type == "generate_until":
            responses.append(given[0].text)
        else:
            total, greedy = likelihood(each, given)
            responses.append(total if instance.request_type == "loglikelihood_rolling" else (total, greedy))
    for instance, response in zip(instances, responses):
        instance.resps = [response]
    filtered = task._filters[0]
    filtered.apply(list(instances))
    results = [instance.filtered_resps[filtered.name] for instance in instances]
    metrics = {
        name: float(value)
        for name, value in task.process_results(instances[0].doc, results).items()
        if isinstance(value, bool | int | float) or hasattr(value, "__float__")
    }
    fields = {"metrics": metrics}
    main = metrics.get(_main_metric(task))
    output = _output(instances, responses)
    if main is None or not math.isfinite(main) or not 0.0 <= main <= 1.0:
        return Judged(output, None, "the task's metric is not a share between 0 and 1", fields)
    return Judged(output, main, None, fields)


def _output(instances: Sequence[Instance], responses: Sequence[Any]) -> str:
    """Return what the model said: its answer, the likeliest choice, or a log-likelihood."""
    kind = instances[0].request_type
    if kind == "generate_until":
        return str(responses[0])
    if kind == "loglikelihood_rolling":
        return f"{responses[0]:.6f}"
    best = max(range(len(responses)), key=lambda number: responses[number][0])
    return str(instances[best].args[1]).strip()


def _expected(task: ConfigurableTask, doc: Mapping[str, Any]) -> str | list[str]:
    target = task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        wanted = target if isinstance(target, list) else [target]
        texts = [str(choices[each]) if isinstance(each, int) else str(each) for each in wanted]
    else:
        texts = [str(each) for each in target] if isinstance(target, list) else [str(target)]
    return texts[0] if len(texts) == 1 else texts
