"""Read a run folder into typed records, and refuse what is malformed by file and line.

RUN/records/*.jsonl, metrics.jsonl, lengths/*.json, events.jsonl, env.json and config.yaml are all optional: a
folder with none of them is refused, a folder with some gives a report of those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import read_json
from longspan.core.records import read_jsonl
from longspan.report.layouts import Layout, layout_of
from longspan.report.samples import PplSample, ScoredSample, number, parse_sample, text


@dataclass(frozen=True)
class RecordFile:
    """One evaluation: its header and its samples. `label` is the header's until several runs need telling apart.

    `complete` says whether a footer counts these samples; an evaluation that was killed has none.
    """

    path: Path
    layout: Layout
    label: str
    header: dict[str, Any]
    samples: tuple[Any, ...]
    """`ScoredSample`, or `PplSample` where the task is ppl."""
    complete: bool = True
    footer: dict[str, Any] = field(default_factory=dict)
    run: str = ""

    @property
    def task(self) -> str:
        """Its name in the records."""
        return self.layout.task

    @property
    def params(self) -> dict[str, Any]:
        """Settings of the task, as they were recorded."""
        found = self.header.get("params")
        return found if isinstance(found, dict) else {}

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
        note = self.header.get("note") or self.params.get("note")
        return str(note) if note else None

    @property
    def scorer(self) -> str:
        """What gave the scores, name and version first, such as `exact_match 1`; empty where not recorded."""
        scorer = self.params.get("scorer")
        if isinstance(scorer, dict):
            named = sorted(scorer, key=lambda key: (key != "name", key != "version", key))
            return " ".join(str(scorer[key]) for key in named if isinstance(scorer[key], (str, int, float)))
        return str(scorer or "")

    @property
    def rescored(self) -> bool:
        """Whether these are the answers of another file with the scores of another scorer."""
        return "rescored_from" in self.header

    @property
    def mode(self) -> str:
        """How answers were taken: generate, teacher_forced; empty where not recorded."""
        return str(self.params.get("mode") or "")

    @property
    def scored_by(self) -> str:
        """Scorer and mode in a line; a mode that is the scorer's name is said once."""
        mode = "" if self.mode == self.scorer.partition(" ")[0] else self.mode
        return ", ".join(filter(None, (self.scorer, mode)))


@dataclass(frozen=True)
class LoadedRun:
    """Everything one run folder holds; an absent file is an empty list or None."""

    path: Path
    name: str
    records: list[RecordFile] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    lengths: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    env: dict[str, Any] | None = None
    config: str | None = None
    empty: list[Path] = field(default_factory=list)
    """Record files that do not even hold a header yet."""

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        """What `config` says; None where there is none, or it is no mapping."""
        try:
            settings = None if self.config is None else yaml.safe_load(self.config)
        except yaml.YAMLError:
            return None
        return settings if isinstance(settings, dict) else None


def load_runs(paths: Sequence[str | Path]) -> list[LoadedRun]:
    """Read several run folders; folders of one name are told apart by the folders above them.

    Raises:
        ArgumentError: a folder is named twice.
        DataError: see `load_run`.
    """
    runs = [load_run(path) for path in paths]
    parts = [run.path.resolve().parts for run in runs]
    for place, count in Counter(parts).items():
        if count > 1:
            raise ArgumentError("a run is named twice", found=Path(*place), fix="name every folder once")
    names = [run.name for run in runs]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        counts = Counter(names)
        names = ["/".join(p[-depth:]) if counts[n] > 1 else n for n, p in zip(names, parts)]
    return [replace(run, name=name) for run, name in zip(runs, names)]


def load_run(path: str | Path) -> LoadedRun:
    """Read a run folder.

    Raises:
        DataError: the folder is missing or holds nothing to report, or a record is malformed (file and line named).
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a run folder", fix="name a folder that training or evaluation wrote")
    config = path / "config.yaml"
    env = read_json(path / "env.json") if (path / "env.json").exists() else None
    read = {name: _record_file(name) for name in sorted((path / "records").glob("*.jsonl"))}
    run = LoadedRun(
        path=path,
        name=path.resolve().name,
        records=_scorers_apart([file for file in read.values() if file is not None]),
        metrics=_metrics(path / "metrics.jsonl"),
        lengths=[_length_summary(name) for name in sorted((path / "lengths").glob("*.json"))],
        events=list(read_jsonl(path / "events.jsonl")) if (path / "events.jsonl").exists() else [],
        env=env if isinstance(env, dict) else None,
        config=_text_of(config) if config.exists() else None,
        empty=[name for name, file in read.items() if file is None],
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


def _scorers_apart(records: list[RecordFile]) -> list[RecordFile]:
    """Give a rescored evaluation a label of its own: its samples are those of the file it was made from.

    What was not rescored keeps the label, the file named <task>-<label>.jsonl before others; the rest carry
    scorer or mode.
    """
    first: dict[tuple[str, str], RecordFile] = {}
    for file in sorted(records, key=lambda f: (f.rescored, f.path.stem != f"{f.task}-{f.label}")):
        first.setdefault((file.task, file.label), file)
    apart = []
    for file in records:
        other = first[file.task, file.label]
        differing = [
            mine for mine, its in ((file.scorer, other.scorer), (file.mode, other.mode)) if mine != its
        ]
        label = f"{file.label} ({', '.join(differing)})" if differing else file.label
        apart.append(replace(file, label=label))
    return apart


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
    """Read one evaluation; None for a file that was killed before its header was whole."""
    lines = list(_numbered(path))
    if not lines:
        return None
    where, header = lines.pop(0)
    if header.get("kind") != "header":
        raise DataError(
            f"{where} is not a header line",
            found=f"kind={header.get('kind')!r}",
            allowed="header",
            fix="take this file out of records/, or evaluate again",
        )
    _, label = text(header, "task", where), text(header, "label", where)
    for name in ("model", "params"):
        if not isinstance(header.get(name, {}), dict):
            raise DataError(f"{where} field {name!r} is not an object", found=repr(header[name])[:80])
    layout = layout_of(header, [line for _, line in lines], where)
    samples: dict[tuple[Any, ...], ScoredSample | PplSample] = {}
    footer: dict[str, Any] = {}
    for where, line in lines:
        footer = line if line.get("kind") == "footer" else {}
        if footer:
            continue
        if line.get("kind") != "sample":
            raise DataError(
                f"{where} is not a sample line", found=f"kind={line.get('kind')!r}", allowed="sample"
            )
        sample = parse_sample(layout, line, where)
        key = _key(sample)
        # A sample counted twice would silently shrink every interval; of one tried again the last record counts.
        if key in samples and samples[key].unscored is None:
            raise DataError(
                f"{where} repeats an earlier sample", found=f"id={sample.id!r}, length={sample.length}"
            )
        samples[key] = sample
    complete = footer.get("samples") == len(samples)
    return RecordFile(path, layout, label, header, tuple(samples.values()), complete, footer)


def _key(sample: ScoredSample | PplSample) -> tuple[Any, ...]:
    if isinstance(sample, PplSample):
        return (sample.id, sample.length)
    return (*sample[:6], sample.dataset, sample.subtask, sample.metric)


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    steps = []
    for where, line in _numbered(path):
        for name in ("step", "tokens"):
            number(line, name, where)
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


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", found=str(error)) from None


def _numbered(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", record); blank lines are counted, as an editor counts them."""
    with open(path, "rb") as file:
        numbers = (place for place, line in enumerate(file, 1) if line.strip())
        for record in read_jsonl(path):
            yield f"{path}:{next(numbers)}", record
