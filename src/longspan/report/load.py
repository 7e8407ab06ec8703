"""Read a run folder into typed records, and refuse what is malformed by file and line.

RUN/records/*.jsonl, metrics.jsonl, lengths/*.json, events.jsonl, env.json and config.yaml are all optional: a
folder with none of them is refused, a folder with some gives a report of those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import DataError
from longspan.core.files import read_json
from longspan.core.records import read_jsonl

NEEDLE_TASKS = ("needle", "needle_distractors")


class NeedleSample(NamedTuple):
    """One needle question; `score` is None when it could not be scored, which is not a score of zero."""

    id: str
    length: int
    depth: float
    sample: int
    prompt: str
    achieved_length: int | None
    achieved_depth: float | None
    question: str
    expected: str
    output: str
    score: float | None
    unscored: str | None
    window: str
    distractors: int


class Bucket(NamedTuple):
    """Summed negative log-likelihood (nats) of the tokens at positions [start, end)."""

    start: int
    end: int
    tokens: int
    nll: float


class PplSample(NamedTuple):
    """One perplexity window of `length` tokens."""

    id: str
    source: str
    length: int
    buckets: tuple[Bucket, ...]
    unscored: str | None


@dataclass(frozen=True)
class RecordFile:
    """One evaluation: its header and its samples. `label` is the header's until several runs need telling apart.

    `complete` says whether a footer counts these samples; an evaluation that was killed has none.
    """

    path: Path
    task: str
    label: str
    header: dict[str, Any]
    samples: tuple[Any, ...]
    complete: bool = True

    @property
    def trained_length(self) -> int | None:
        """Context length the evaluated model was trained for, in tokens."""
        length = self.header.get("model", {}).get("trained_length")
        return int(length) if isinstance(length, (int, float)) and length > 0 else None

    @property
    def model(self) -> str | None:
        """Fingerprint of the evaluated model."""
        fingerprint = self.header.get("model", {}).get("fingerprint")
        return str(fingerprint) if fingerprint else None

    @property
    def note(self) -> str | None:
        """What this evaluation does and does not show, in the words of whoever ran it."""
        note = self.header.get("note") or self.header.get("params", {}).get("note")
        return str(note) if note else None


@dataclass(frozen=True)
class Run:
    """Everything one run folder holds; an absent file is an empty list or None."""

    path: Path
    name: str
    records: list[RecordFile] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    lengths: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    env: dict[str, Any] | None = None
    config: str | None = None


def load_run(path: str | Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: the folder is missing or holds nothing to report, or a record is malformed (file and line named).
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a run folder", fix="name a folder that training or evaluation wrote")
    config = path / "config.yaml"
    env = read_json(path / "env.json") if (path / "env.json").exists() else None
    run = Run(
        path=path,
        name=path.resolve().name,
        records=[file for name in sorted((path / "records").glob("*.jsonl")) if (file := _record_file(name))],
        metrics=_metrics(path / "metrics.jsonl"),
        lengths=[_length_summary(name) for name in sorted((path / "lengths").glob("*.json"))],
        events=list(read_jsonl(path / "events.jsonl")) if (path / "events.jsonl").exists() else [],
        env=env if isinstance(env, dict) else None,
        config=config.read_text(encoding="utf-8") if config.exists() else None,
    )
    _refuse_mixed_models(run.records)
    if not (run.records or run.metrics or run.lengths):
        raise DataError(
            f"{path} holds nothing to report",
            found=", ".join(sorted(entry.name for entry in path.iterdir())) or "an empty folder",
            allowed="records/*.jsonl, metrics.jsonl or lengths/*.json",
            fix="run `longspan eval` or `longspan train` with this folder as --out",
        )
    return run


def _refuse_mixed_models(records: list[RecordFile]) -> None:
    """Samples of one task and label are pooled, so they must come from one model."""
    first: dict[tuple[str, str], RecordFile] = {}
    for file in records:
        other = first.setdefault((file.task, file.label), file)
        if other.model != file.model:
            raise DataError(
                f"{file.path} and {other.path} have one label and two models",
                found=f"label {file.label!r}, fingerprints {file.model} and {other.model}",
                fix="evaluate the model again, or give one of them another label",
            )


def _record_file(path: Path) -> RecordFile | None:
    """Read one evaluation; None for a task the report does not draw."""
    lines = _numbered(path)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{path} is empty", fix="delete it, or run the evaluation again")
    where, header = first
    if header.get("kind") != "header":
        raise DataError(
            f"{where} is not a header line", found=f"kind={header.get('kind')!r}", allowed="header"
        )
    task, label = _text(header, "task", where), _text(header, "label", where)
    for name in ("model", "params"):
        if not isinstance(header.get(name, {}), dict):
            raise DataError(f"{where} field {name!r} is not an object", found=repr(header[name])[:80])
    if task not in (*NEEDLE_TASKS, "ppl"):
        return None
    parse = _ppl_sample if task == "ppl" else _needle_sample
    samples: dict[tuple[Any, ...], Any] = {}
    complete = False
    for where, line in lines:
        complete = line.get("kind") == "footer" and line.get("samples") == len(samples)
        if line.get("kind") == "footer":
            continue
        if line.get("kind") != "sample":
            raise DataError(
                f"{where} is not a sample line", found=f"kind={line.get('kind')!r}", allowed="sample"
            )
        sample = parse(line, where)
        # A sample counted twice would shrink every interval without a word.
        key = (sample.id, sample.length, getattr(sample, "depth", None), getattr(sample, "sample", None))
        if key in samples:
            raise DataError(
                f"{where} repeats an earlier sample", found=f"id={sample.id!r}, length={sample.length}"
            )
        samples[key] = sample
    return RecordFile(path, task, label, header, tuple(samples.values()), complete)


def _needle_sample(line: dict[str, Any], where: str) -> NeedleSample:
    score = line.get("score")
    unscored = line.get("unscored")
    if score is not None and not (_is_number(score) and 0 <= score <= 1):
        raise DataError(
            f"{where} field 'score' is out of range", found=repr(score), allowed="0 to 1, or null"
        )
    if (score is None) == (unscored is None):
        raise DataError(
            f"{where} a sample has either a score or a reason why it has none",
            found=f"score={score!r}, unscored={unscored!r}",
        )
    depth = _number(line, "depth", where)
    if not 0 <= depth <= 1:
        raise DataError(f"{where} field 'depth' is out of range", found=repr(depth), allowed="0 to 1")
    return NeedleSample(
        id=_text(line, "id", where),
        length=_count(line, "length", where, least=1),
        depth=round(depth, 4),
        sample=_count(line, "sample", where),
        prompt=str(line.get("prompt_sha256", "")),
        achieved_length=int(line["achieved_length"]) if _is_number(line.get("achieved_length")) else None,
        achieved_depth=float(line["achieved_depth"]) if _is_number(line.get("achieved_depth")) else None,
        question=str(line.get("question", "")),
        expected=str(line.get("expected", "")),
        output=str(line.get("output") or ""),
        score=None if score is None else float(score),
        unscored=None if unscored is None else str(unscored),
        window=str(line.get("needle_window", "")),
        distractors=int(line["num_distractors"]) if _is_number(line.get("num_distractors")) else 0,
    )


def _ppl_sample(line: dict[str, Any], where: str) -> PplSample:
    raw = line.get("buckets", [])
    if not isinstance(raw, list) or not all(isinstance(bucket, dict) for bucket in raw):
        raise DataError(f"{where} field 'buckets' is not a list of objects", found=repr(raw)[:80])
    buckets = []
    for bucket in raw:
        start, end = _count(bucket, "start", where), _count(bucket, "end", where)
        if end <= start:
            raise DataError(f"{where} a bucket ends before it starts", found=f"{start}-{end}")
        buckets.append(Bucket(start, end, _count(bucket, "tokens", where), _number(bucket, "nll", where)))
    unscored = line.get("unscored")
    return PplSample(
        id=_text(line, "id", where),
        source=str(line.get("source") or "unknown"),
        length=_count(line, "length", where, least=1),
        buckets=tuple(buckets) if unscored is None else (),
        unscored=None if unscored is None else str(unscored),
    )


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    steps = []
    for where, line in _numbered(path):
        for name in ("step", "tokens"):
            _number(line, name, where)
        loss = line.get("loss")
        if loss is not None and not isinstance(loss, (int, float)):
            raise DataError(f"{where} field 'loss' is not a number", found=repr(loss)[:80])
        steps.append(line)
    return steps


def _length_summary(path: Path) -> dict[str, Any]:
    summary = read_json(path)
    if not isinstance(summary, dict) or not isinstance(summary.get("sources"), dict):
        raise DataError(f"{path} is not a length summary", allowed='{"name": ..., "sources": {...}}')
    for source, entry in summary["sources"].items():
        histogram = entry.get("histogram") if isinstance(entry, dict) else None
        if not isinstance(histogram, dict):
            raise DataError(f"{path} source {source!r} has no histogram")
        edges, tokens = histogram.get("edges", []), histogram.get("tokens", [])
        if len(edges) != len(tokens) + 1:
            raise DataError(
                f"{path} source {source!r}: a histogram has one edge more than bins",
                found=f"{len(edges)} edges, {len(tokens)} bins",
            )
    return {"name": path.stem, "title": path.stem.replace("_", " "), **summary}


def _numbered(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", record); blank lines are counted, as an editor counts them."""
    with open(path, "rb") as file:
        numbers = (number for number, line in enumerate(file, 1) if line.strip())
        for record in read_jsonl(path):
            yield f"{path}:{next(numbers)}", record


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(line: dict[str, Any], name: str, where: str) -> float:
    value = line.get(name)
    if not _is_number(value):
        raise DataError(f"{where} field {name!r} is not a number", found=repr(value)[:80])
    return float(value)  # type: ignore[arg-type]


def _count(line: dict[str, Any], name: str, where: str, least: int = 0) -> int:
    value = _number(line, name, where)
    if value != int(value) or value < least:
        raise DataError(f"{where} field {name!r} is not a whole number >= {least}", found=repr(value))
    return int(value)


def _text(line: dict[str, Any], name: str, where: str) -> str:
    value = line.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where} field {name!r} is missing or not text", found=repr(value)[:80])
    return value
