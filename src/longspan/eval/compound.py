"""Samples that take several requests: a multiple-choice question is one request for each choice.

All requests of a part of the samples are handed over as one list, so that a shared prefix (few-shot examples,
the question itself) is read once; a sample is recorded as soon as its last answer is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from longspan.core.errors import DataError
from longspan.core.files import sha256_bytes
from longspan.core.progress import Progress
from longspan.eval.records import RecordsWriter
from longspan.eval.runner import PART_TOKENS, advancing, fill_records, said, sample_record
from longspan.eval.summaries import mean_score
from longspan.infer.requests import NOT_FINITE, Answer, Answerer, Request, copies_of

PART_REQUESTS = 1024
"""Requests that are composed and handed over at once, if they have no more than `PART_TOKENS` tokens."""


class Judged(NamedTuple):
    """What the answers of a sample come to."""

    output: str
    score: float | None
    """0..1; None: the sample has no score, for this reason:"""
    unscored: str | None = None
    fields: Mapping[str, Any] = {}
    """What else is recorded."""


class Compound(NamedTuple):
    """A composed sample."""

    mode: Literal["generate", "score"]
    requests: Sequence[Request]
    expected: str | list[str]
    judge: Callable[[Sequence[Answer]], Judged]
    fields: Mapping[str, Any]
    """What is recorded of it beside output and score."""


class PlannedCompound(NamedTuple):
    """A sample before it is composed."""

    id: str
    tokens: int
    """About how long its requests are together."""
    fields: Mapping[str, Any]
    build: Callable[[], Compound]
    """Raises DataError: the sample is unscored, with that reason."""


def run_compounds(
    planned: Sequence[PlannedCompound],
    answerer: Answerer,
    *,
    header: Mapping[str, Any],
    out: str | Path,
    retry_unscored: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask for what is missing in `out`; return the summary that all evaluations have, and the records."""

    def ask(missing: Sequence[PlannedCompound], writer: RecordsWriter, bar: Progress) -> None:
        for part in _parts(missing, writer, copies_of(answerer)):
            for record in _run_part(part, answerer, bar):
                writer.write(record)

    summary, records = fill_records(header, out, planned, ask, retry_unscored=retry_unscored)
    return {**summary, **mean_score(records)}, records


Composed = list[tuple[PlannedCompound, Compound]]


def _parts(samples: Sequence[PlannedCompound], writer: RecordsWriter, copies: int) -> Iterator[Composed]:
    """Compose samples until there is enough to hand over; one that cannot be composed is recorded at once."""
    part: Composed = []
    requests = tokens = 0
    for sample in samples:
        try:
            compound = sample.build()
        except DataError as error:
            writer.write(_record(sample, {"unscored": str(error)}))
            continue
        part.append((sample, compound))
        requests += len(compound.requests)
        tokens += sum(_size(request) for request in compound.requests)
        if requests >= PART_REQUESTS * copies or tokens >= PART_TOKENS * copies:
            yield part
            part, requests, tokens = [], 0, 0
    if part:
        yield part


def _run_part(part: Composed, answerer: Answerer, bar: Progress) -> Iterator[dict[str, Any]]:
    for mode in ("score", "generate"):
        chosen = [pair for pair in part if pair[1].mode == mode]
        owners = [number for number, (_, compound) in enumerate(chosen) for _ in compound.requests]
        places = [place for _, compound in chosen for place in range(len(compound.requests))]
        requests = [request for _, compound in chosen for request in compound.requests]
        if not requests:
            continue
        answers: list[dict[int, Answer]] = [{} for _ in chosen]
        with advancing(bar, answerer, sum(sample.tokens for sample, _ in chosen)) as answered:
            given = answerer.score(requests) if mode == "score" else answerer.generate(requests)
            for index, answer in given:
                owner = owners[index]
                sample, compound = chosen[owner]
                answers[owner][places[index]] = answer
                if len(answers[owner]) == len(compound.requests):
                    ordered = [answers[owner][place] for place in range(len(compound.requests))]
                    yield _judged(sample, compound, ordered)
                    answered(sample.tokens)


def _judged(sample: PlannedCompound, compound: Compound, answers: Sequence[Answer]) -> dict[str, Any]:
    prompts = "\0".join(request.prompt for request in compound.requests)
    measured: dict[str, Any] = {
        **compound.fields,
        "expected": compound.expected,
        "prompt_sha256": sha256_bytes(prompts.encode("utf-8", "surrogatepass")),
        "prompt_tokens": max(
            answer.prompt_tokens or _prompt_tokens(request)
            for request, answer in zip(compound.requests, answers)
        ),
        "completion_tokens": sum(answer.completion_tokens for answer in answers) or None,
        "seconds": round(sum(answer.seconds for answer in answers), 6),
    }
    if len(answers) == 1:
        measured |= said(answers[0])
    costs = [answer.cost for answer in answers if answer.cost is not None]
    if costs:
        measured["cost"] = math.fsum(costs)
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        return _record(sample, {**measured, "unscored": errors[0]})
    if compound.mode == "score" and not all(_is_finite(answer) for answer in answers):
        return _record(sample, {**measured, "unscored": NOT_FINITE})
    judged = compound.judge(answers)
    measured |= {**judged.fields, "output": judged.output, "score": judged.score, "unscored": judged.unscored}
    if judged.score is not None and not math.isfinite(judged.score):
        measured |= {"score": None, "unscored": NOT_FINITE}
    return _record(sample, measured)


def _is_finite(answer: Answer) -> bool:
    return answer.nll is not None and bool(np.isfinite(answer.nll).all())


def _record(sample: PlannedCompound, measured: Mapping[str, Any]) -> dict[str, Any]:
    return sample_record(sample.id, sample.fields, measured)


def _size(request: Request) -> int:
    answer = 0 if request.answer_ids is None else len(request.answer_ids)
    return _prompt_tokens(request) + answer


def _prompt_tokens(request: Request) -> int:
    return len(request.prompt) // 4 if request.prompt_ids is None else len(request.prompt_ids)
