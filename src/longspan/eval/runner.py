"""Run an evaluation: plan the samples, skip those recorded, ask the model for the others, write records.

Any task (`eval.task.Task`) on anything that answers (`infer.requests.Answerer`):

    summary = run_task(task, answerer, tokenizer=tokenizer, label="before", out="run/records/needle-before.jsonl")

A killed run goes on where it stopped when the same call is made again: every answer is a line in the file as
soon as it is there. A sample that cannot be composed, answered or scored is recorded as unscored with the
reason; it never counts as zero and is never left out of the counts.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from longspan.core.errors import ConfigError, DataError
from longspan.core.files import sha256_bytes
from longspan.core.log import get_logger
from longspan.core.progress import Progress, progress
from longspan.core.units import format_count
from longspan.data.tokenizer import Tokenizer
from longspan.eval.forecast import Forecast
from longspan.eval.records import RecordsWriter, make_header, sample_id
from longspan.eval.registry import entry_of
from longspan.eval.scorers import Scorer, scorer_named
from longspan.eval.summaries import clustered, cost_of_thoughts, count_no_answer, mean_score
from longspan.eval.task import Built, Planned, Task
from longspan.eval.until_width import UntilWidth
from longspan.infer.requests import (
    NOT_FINITE,
    Answer,
    Answerer,
    Request,
    Watched,
    copies_of,
    no_answer,
    work_of,
)

TooLong = Literal["refuse", "skip"]
PART_TOKENS = 4_000_000
"""Prompts are composed this many tokens at a time (8 bytes each), so that memory does not grow with the task."""
PART_SAMPLES = 256
GROUP_TOKENS = 64_000_000
"""A group is kept together for its shared prefix up to this many tokens, half a gigabyte of ids."""

_log = get_logger("eval")


class _PendingSample(NamedTuple):
    id: str
    planned: Planned

    @property
    def tokens(self) -> int:
        return self.planned.tokens


def run_task(
    task: Task,
    answerer: Answerer,
    *,
    tokenizer: Tokenizer,
    label: str,
    out: str | Path,
    note: str | None = None,
    used: Mapping[str, Any] | None = None,
    retry_unscored: bool = False,
    too_long: TooLong = "refuse",
    until_width: float | None = None,
) -> dict[str, Any]:
    """Evaluate; write one record a sample to `out`, return a summary.

    Args:
        tokenizer: what the task composes its prompts with; its fingerprint goes into the header.
        label: names the state of the model in reports: `before`, `after`, `theta_only`, ...
        note: a remark for readers, kept in the header.
        used: the settings of the command, kept there too.
        retry_unscored: ask again for recorded samples that have no score.
        too_long: what to do where the plan holds samples longer than the model can read; `skip` records
            them as unscored.
        until_width: stop asking where the 95 % interval of a mean is no wider; see `eval.until_width`.

    Returns:
        task, label, records (the path), samples, scored, unscored (reason -> count), no_answer (the same of scored
        samples whose answer is empty: cut while thinking, ...), mean, interval (95 %), interval_by_cluster where
        samples share texts (`registry.TaskEntry.cluster`), thoughts (samples with such, their tokens, the most of
        one) where the model thought, until_width with samples planned and columns that are narrow enough and wider
        where that was asked for, samples_per_s of this call, and the task's own numbers (`Task.summary`).

    Raises:
        ArgumentError: no such width.
        ConfigError: `out` holds an evaluation with other settings; or samples are too long for the model.
    """
    scorer = scorer_named(task.scorer)
    params = task.params()
    header = make_header(
        task.name,
        label,
        model_info=answerer.identity,
        note=note,
        used=used,
        higher_is_better=scorer.higher_is_better,
        tokenizer=tokenizer.fingerprint,
        seed=int(params.get("seed", 0)),
        params={**params, "mode": task.mode, "scorer": scorer.named()},
    )
    samples = [_PendingSample(sample_id(header, *planned.key), planned) for planned in task.plan()]
    _check_ids(samples)
    if too_long == "refuse":
        _refuse_too_long(samples, answerer.max_length)

    looks = None if until_width is None else UntilWidth(task.name, samples, until_width)

    def ask(missing: Sequence[_PendingSample], writer: RecordsWriter, bar: Progress) -> None:
        total = sum(work_of(answerer, sample.planned.tokens) for sample in missing)
        forecast = Forecast(f"{task.name} {label}{'' if looks is None else ', until its next look'}", total)
        for part in _parts(missing, copies_of(answerer)):
            _run_part(
                part,
                task,
                answerer,
                scorer=scorer,
                writer=writer,
                bar=bar,
                tokenizer=tokenizer,
                forecast=forecast,
            )

    summary, records = fill_records(header, out, samples, ask, retry_unscored=retry_unscored, looks=looks)
    entry = entry_of(task.name)
    by_cluster = clustered(records, "" if entry is None else entry.cluster)
    return {
        **summary,
        **mean_score(records),
        **by_cluster,
        **cost_of_thoughts(records),
        **task.summary(records),
    }


class Fillable(Protocol):
    """A sample before it is recorded."""

    @property
    def id(self) -> str:
        """Names its record."""
        ...

    @property
    def tokens(self) -> int:
        """About how long it is, for the bar."""
        ...


FillableT = TypeVar("FillableT", bound=Fillable)


def fill_records(
    header: Mapping[str, Any],
    out: str | Path,
    planned: Sequence[FillableT],
    fill: Callable[[Sequence[FillableT], RecordsWriter, Progress], None],
    *,
    retry_unscored: bool = False,
    looks: UntilWidth | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let `fill` write the records that `out` lacks, with a bar, or as many as `looks` asks for; finish the file.

    Returns:
        what every summary holds (`summarise_records`), and all records in the order of the plan.
    """
    started = time.monotonic()
    title = f"{header['task']} {header['label']}"
    with RecordsWriter(out, header, retry_unscored=retry_unscored) as writer:
        missing = [sample for sample in planned if sample.id not in writer.recorded]
        if len(missing) < len(planned):
            _log.info(
                "%s: %d of %d samples stand in %s", title, len(planned) - len(missing), len(planned), out
            )
        total, left = (sum(sample.tokens for sample in samples) for samples in (planned, missing))
        said: dict[str, Any] = {}
        with progress(title, total=total, unit="tokens", done=total - left) as bar:
            if looks is None:
                fill(missing, writer, bar)
            else:
                while due := set(looks.due(writer.recorded)):
                    fill([sample for sample in missing if sample.id in due], writer, bar)
                    assert due <= writer.recorded.keys()
                said = looks.said(writer.recorded)
        writer.finish(said)
        records = [
            writer.recorded[sample.id] for sample in planned if looks is None or sample.id in writer.recorded
        ]
        asked = sum(sample.id in writer.recorded for sample in missing)
    if said:
        _log.info(
            "%s: %d of %d samples asked; %d of %d means have an interval of %g points at most. The mean of all counts "
            "every sample the same, and there are more where it was harder to tell",
            title,
            len(records),
            len(planned),
            said["narrow"],
            said["narrow"] + said["wider"],
            100 * said["until_width"],
        )
    seconds = time.monotonic() - started
    rate = asked / seconds if seconds > 0 else 0.0
    return {**summarise_records(header, out, records, rate), **said}, records


def summarise_records(
    header: Mapping[str, Any], out: str | Path, samples: Sequence[Mapping[str, Any]], rate: float
) -> dict[str, Any]:
    """Return the counts that every summary holds; warn of samples without a score."""
    reasons = Counter(sample["unscored"] for sample in samples if sample["unscored"] is not None)
    empty = count_no_answer(samples)
    for kind, counts in (("unscored", reasons), ("scored without an answer", empty)):
        for reason, count in counts.items():
            _log.warning(
                "%s %s: %d of %d %s: %s", header["task"], header["label"], count, len(samples), kind, reason
            )
    return {
        "task": header["task"],
        "label": header["label"],
        "records": str(out),
        "samples": len(samples),
        "scored": len(samples) - sum(reasons.values()),
        "unscored": dict(reasons),
        "no_answer": empty,
        "samples_per_s": rate,
    }


def _check_ids(samples: Sequence[_PendingSample]) -> None:
    """Refuse a plan in which two samples have one key: the second would be taken for recorded."""
    twice = [id_ for id_, count in Counter(sample.id for sample in samples).items() if count > 1]
    if twice:
        key = next(sample.planned.key for sample in samples if sample.id == twice[0])
        raise ConfigError("a sample is planned twice", found=key)


def _refuse_too_long(samples: Sequence[_PendingSample], max_length: int | None) -> None:
    if max_length is None:
        return
    lengths = sorted({sample.planned.tokens for sample in samples if sample.planned.tokens > max_length})
    if lengths:
        shown = [f"{length:,}" for length in (lengths if len(lengths) <= 6 else [*lengths[:5], lengths[-1]])]
        raise ConfigError(
            "some contexts are longer than the model can read",
            found=f"{', '.join(shown)} tokens",
            allowed=f"at most {max_length:,} tokens, prompt and answer together",
            fix="leave out these lengths, raise --max-length if the model can do more, or pass "
            "--too-long skip to record them as unscored",
        )


def _parts(samples: Sequence[_PendingSample], copies: int = 1) -> Iterator[list[_PendingSample]]:
    """Cut the samples into what is composed and handed to the model at once.

    Whole groups together, the longest first, because what does not fit into memory should fail at once; a
    group that is too large by itself is cut. Copies of a model are given as many times as much.
    """
    groups: dict[object, list[_PendingSample]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(sample.planned.group or number, []).append(sample)
    longest_first = sorted(groups.values(), key=lambda group: -max(each.planned.tokens for each in group))
    part: list[_PendingSample] = []
    tokens = 0
    for group in longest_first:
        for piece in _pieces(group):
            size = sum(sample.planned.tokens for sample in piece)
            if part and (
                tokens + size > PART_TOKENS * copies or len(part) + len(piece) > PART_SAMPLES * copies
            ):
                yield part
                part, tokens = [], 0
            part = part + piece
            tokens += size
    if part:
        yield part


def _pieces(group: list[_PendingSample]) -> Iterator[list[_PendingSample]]:
    piece: list[_PendingSample] = []
    tokens = 0
    for sample in group:
        if piece and tokens + sample.planned.tokens > GROUP_TOKENS:
            yield piece
            piece, tokens = [], 0
        piece.append(sample)
        tokens += sample.planned.tokens
    yield piece


def _run_part(
    part: Sequence[_PendingSample],
    task: Task,
    answerer: Answerer,
    *,
    scorer: Scorer,
    writer: RecordsWriter,
    bar: Progress,
    tokenizer: Tokenizer,
    forecast: Forecast,
) -> None:
    """Compose a part of the samples, ask for the answers, and write each as it comes."""
    asked: list[tuple[_PendingSample, Built]] = []
    for number, sample in enumerate(part, 1):
        bar.note(f"composing {number} of {len(part)}")
        bar.advance(0)  # millions of tokens may be composed before the first is read
        try:
            built = task.build(sample.planned)
            _check_fits(built.request, answerer.max_length)
        except DataError as error:
            writer.write(_record(sample, {}, unscored=str(error)))
            bar.advance(sample.planned.tokens)
        else:
            asked.append((sample, built))
    bar.note("")
    if not asked:
        return
    teacher_forced = task.mode == "teacher_forced"
    first: list[tuple[_PendingSample, Built, Answer]] = []

    def write(sample: _PendingSample, built: Built, answer: Answer) -> None:
        record = _answered(sample, built, answer, scorer=scorer, teacher_forced=teacher_forced)
        if answer.thoughts:
            record["thought_tokens"] = len(tokenizer.encode(answer.thoughts))
        writer.write(record)

    requests = [built.request for _, built in asked]
    work = sum(work_of(answerer, sample.planned.tokens) for sample in part)
    tokens = sum(sample.planned.tokens for sample, _ in asked)
    with advancing(bar, answerer, tokens, lambda share: forecast.reach(share * work)) as answered:
        answers = answerer.score(requests) if teacher_forced else answerer.generate(requests)
        for index, answer in answers:
            sample, built = asked[index]
            if built.then is None or answer.error is not None:
                write(sample, built, answer)
            else:
                first.append((sample, built, answer))
            answered(sample.planned.tokens)
    if first:
        bar.note(f"asking {len(first)} again")
        requests = [built.then(answer.text) for _, built, answer in first if built.then is not None]
        for index, answer in answerer.generate(requests):
            sample, built, reasoning = first[index]
            fields = {**built.fields, "reasoning": reasoning.text}
            write(sample, built._replace(fields=fields), _together(reasoning, answer))
        bar.note("")
    forecast.end_part(work)


def _together(first: Answer, second: Answer) -> Answer:
    """Return the second answer with what both cost."""
    costs = [answer.cost for answer in (first, second) if answer.cost is not None]
    return second._replace(
        prompt_tokens=first.prompt_tokens,
        completion_tokens=first.completion_tokens + second.completion_tokens,
        cost=math.fsum(costs) if costs else None,
        seconds=first.seconds + second.seconds,
        thoughts=first.thoughts + second.thoughts,
    )


@contextlib.contextmanager
def advancing(
    bar: Progress, answerer: Answerer, tokens: int, on_share: Callable[[float], None] = lambda share: None
) -> Iterator[Callable[[int], None]]:
    """Advance a bar by `tokens` while samples of so many tokens are answered; tell `on_share` the share that is done.

    By the work that the answerer says is done, which goes on between two answers; or by what the function that is
    yielded is told of each answer.
    """
    done = 0

    def reach(amount: float) -> None:
        nonlocal done
        if int(amount) > done:
            bar.advance(int(amount) - done)
            done = int(amount)
            on_share(amount / tokens)

    watched = answerer if isinstance(answerer, Watched) else None
    told = watched is not None and watched.watch(lambda share: reach(share * tokens))
    try:
        yield lambda amount: None if told else reach(done + amount)
        reach(tokens)
    finally:
        if watched is not None:
            watched.watch(None)


def _check_fits(request: Request, max_length: int | None) -> None:
    if max_length is None or request.prompt_ids is None:
        return
    answer = request.max_new_tokens if request.answer_ids is None else len(request.answer_ids)
    if len(request.prompt_ids) + answer > max_length:
        raise DataError(
            f"{format_count(len(request.prompt_ids))} tokens and an answer of {answer} are longer than the "
            f"{format_count(max_length)} tokens that the model can read"
        )


def _answered(
    sample: _PendingSample, built: Built, answer: Answer, *, scorer: Scorer, teacher_forced: bool
) -> dict[str, Any]:
    request = built.request
    measured: dict[str, Any] = {
        "expected": built.expected,
        "prompt_sha256": sha256_bytes(request.prompt.encode("utf-8", "surrogatepass")),
        "prompt_tokens": answer.prompt_tokens
        or (0 if request.prompt_ids is None else len(request.prompt_ids)),
        "completion_tokens": answer.completion_tokens or None,
        "seconds": round(answer.seconds, 6),
        **({} if answer.cost is None else {"cost": answer.cost}),
        **said(answer),
        **built.fields,
    }
    unscored = answer.error
    if unscored is None and teacher_forced:
        if answer.nll is None or not np.isfinite(answer.nll).all():
            unscored = NOT_FINITE
        else:
            measured["answer_nll"] = float(np.sum(answer.nll, dtype=np.float64))
            measured["answer_tokens"] = len(answer.nll)
    if unscored is not None:
        return _record(sample, measured, unscored=unscored)
    fields = {**sample.planned.fields, **built.fields}
    score = float(scorer.score(built.expected, answer.text, fields))
    if not math.isfinite(score):
        return _record(sample, {**measured, "output": answer.text}, unscored=NOT_FINITE)
    return _record(sample, {**measured, "output": answer.text, "score": score}, unscored=None)


def said(answer: Answer) -> dict[str, Any]:
    """Return what is recorded of how an answer ended: finish, thoughts, and why it is empty, where there is such."""
    fields = {"finish": answer.finish, "thoughts": answer.thoughts or None}
    if answer.error is None and answer.nll is None:
        fields["no_answer"] = no_answer(answer)
    return {name: value for name, value in fields.items() if value is not None}


def _record(sample: _PendingSample, measured: Mapping[str, Any], *, unscored: str | None) -> dict[str, Any]:
    return sample_record(sample.id, sample.planned.fields, {**measured, "unscored": unscored})


def sample_record(id_: str, planned: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a sample: what was planned and what was measured; fields without a value are empty."""
    return {
        "kind": "sample",
        "id": id_,
        **planned,
        "output": "",
        "expected": "",
        "score": None,
        "prompt_sha256": "",
        "prompt_tokens": None,
        "completion_tokens": None,
        "seconds": None,
        "unscored": None,
        **measured,
    }
