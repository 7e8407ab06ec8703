"""Numbers from records: needle grids with intervals, token-weighted perplexity, CSV tables.

A sample without a score is counted as unscored and left out of every mean; it is never a zero. A cell without
a scored sample is None.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longspan.core.intervals import wilson_interval
from longspan.report.load import NeedleSample, PplSample, RecordFile, Run, load_run


@dataclass
class Tally:
    """Scores of a group of samples."""

    correct: float = 0.0
    scored: int = 0
    unscored: int = 0

    def add(self, sample: NeedleSample) -> None:
        """Count one sample."""
        if sample.score is None:
            self.unscored += 1
        else:
            self.scored += 1
            self.correct += sample.score

    @property
    def mean(self) -> float | None:
        """Mean score of the scored samples, None without any."""
        return self.correct / self.scored if self.scored else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the mean, None without a scored sample."""
        return wilson_interval(self.correct, self.scored)


@dataclass
class NeedleTable:
    """One label's needle results by cell, by length and in all."""

    lengths: list[int] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)
    cells: dict[tuple[float, int], list[NeedleSample]] = field(default_factory=dict)
    tallies: dict[tuple[float, int], Tally] = field(default_factory=dict)
    by_length: dict[int, Tally] = field(default_factory=dict)
    total: Tally = field(default_factory=Tally)

    @property
    def samples_per_cell(self) -> int:
        """Samples in the fullest cell, scored or not."""
        return max((len(samples) for samples in self.cells.values()), default=0)


def needle_table(samples: Iterable[NeedleSample], target: int | None = None) -> NeedleTable:
    """Group samples by (depth, length); `total` is over lengths up to `target`, unless all are longer."""
    samples = list(samples)
    table = NeedleTable()
    inside = [sample for sample in samples if target is None or sample.length <= target]
    for sample in samples:
        key = (sample.depth, sample.length)
        table.cells.setdefault(key, []).append(sample)
        table.tallies.setdefault(key, Tally()).add(sample)
        table.by_length.setdefault(sample.length, Tally()).add(sample)
    for sample in inside or samples:
        table.total.add(sample)
    table.lengths = sorted(table.by_length)
    table.depths = sorted({depth for depth, _ in table.cells})
    return table


@dataclass
class PplTable:
    """One label's (tokens, nll) sums; perplexity = exp(nll / tokens)."""

    by_length: dict[int, tuple[int, float]] = field(default_factory=dict)
    by_position: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    by_source: dict[str, tuple[int, float]] = field(default_factory=dict)
    unscored: int = 0

    def short(self, length: int) -> float | None:
        """Perplexity in windows of `length` tokens; without such windows, of the positions below `length`."""
        if length in self.by_length:
            return perplexity(self.by_length[length])
        early = [sums for (_, end), sums in self.by_position.items() if end <= length]
        return perplexity((sum(t for t, _ in early), sum(n for _, n in early)))

    def last(self) -> tuple[tuple[int, int], float | None] | None:
        """The last position bucket and its perplexity."""
        if not self.by_position:
            return None
        bucket = max(self.by_position)
        return bucket, perplexity(self.by_position[bucket])


def ppl_table(samples: Iterable[PplSample]) -> PplTable:
    """Sum tokens and nll by window length; by position and by source over the longest windows alone."""
    samples = list(samples)
    longest = max((sample.length for sample in samples if sample.buckets), default=0)
    by_length: dict[int, list[float]] = defaultdict(lambda: [0, 0.0])
    by_position: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0, 0.0])
    by_source: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for sample in samples:
        for bucket in sample.buckets:
            groups = [by_length[sample.length]]
            if sample.length == longest:
                groups += [by_position[bucket.start, bucket.end], by_source[sample.source]]
            for sums in groups:
                sums[0] += bucket.tokens
                sums[1] += bucket.nll
    return PplTable(
        by_length={key: (int(n), nll) for key, (n, nll) in sorted(by_length.items())},
        by_position={key: (int(n), nll) for key, (n, nll) in sorted(by_position.items())},
        by_source={key: (int(n), nll) for key, (n, nll) in sorted(by_source.items())},
        unscored=sum(sample.unscored is not None for sample in samples),
    )


def perplexity(sums: tuple[int, float]) -> float | None:
    """Return exp(nll / tokens), None without tokens or beyond what a float holds."""
    tokens, nll = sums
    if tokens == 0 or nll / tokens > 700:
        return None
    return math.exp(nll / tokens)


@dataclass
class Tables:
    """The tables of every label; files of one task and label are pooled."""

    needle: dict[str, NeedleTable] = field(default_factory=dict)
    distractors: dict[str, dict[int, NeedleTable]] = field(default_factory=dict)
    ppl: dict[str, PplTable] = field(default_factory=dict)


def tabulate(records: Iterable[RecordFile]) -> Tables:
    """Pool the samples of every label; needles among other needles are kept apart from single ones."""
    records = list(records)
    target = max((file.trained_length or 0 for file in records), default=0) or None
    needle: dict[str, list[NeedleSample]] = {}
    distractors: dict[str, dict[int, list[NeedleSample]]] = {}
    ppl: dict[str, list[PplSample]] = {}
    for file in records:
        if file.task == "ppl":
            ppl.setdefault(file.label, []).extend(file.samples)
            continue
        for sample in file.samples:
            if sample.distractors > 0 or file.task == "needle_distractors":
                distractors.setdefault(file.label, {}).setdefault(sample.distractors, []).append(sample)
            else:
                needle.setdefault(file.label, []).append(sample)
    return Tables(
        needle={label: needle_table(samples, target) for label, samples in needle.items()},
        distractors={
            label: {count: needle_table(by_count[count], target) for count in sorted(by_count)}
            for label, by_count in distractors.items()
        },
        ppl={label: ppl_table(samples) for label, samples in ppl.items()},
    )


def summarise(run: str | Path | Run) -> dict[str, Any]:
    """Return the numbers of a run as JSON: {"needle": {label: ...}, "ppl": {label: ...}, "needle_distractors": ...}.

    needle[label]: mean, by_length {"128": x}, by_length_confidence, grid (rows = depths, columns = lengths, None =
    nothing scored), counts (scored samples, same shape), lengths, depths, samples_per_cell, scored, unscored,
    confidence (95 % Wilson interval of the mean). mean, confidence, scored and unscored are over lengths up to the
    longest trained length in the run; longer ones stand in by_length and grid.
    ppl[label]: by_length {"128": x}, by_position {"0-128": x}, by_source {source: x} (the last two over the
    longest windows), tokens, unscored.
    needle_distractors[label]: {"3": {mean, confidence, by_length, scored, unscored}}.

    Raises:
        DataError: see `load_run`.
    """
    run = run if isinstance(run, Run) else load_run(run)
    tables = tabulate(run.records)
    return {
        "needle": {label: _needle_summary(table) for label, table in tables.needle.items()},
        "ppl": {label: _ppl_summary(table) for label, table in tables.ppl.items()},
        "needle_distractors": {
            label: {str(count): _distractor_summary(table) for count, table in by_count.items()}
            for label, by_count in tables.distractors.items()
        },
    }


def _needle_summary(table: NeedleTable) -> dict[str, Any]:
    tallies = [
        [table.tallies.get((depth, length), Tally()) for length in table.lengths] for depth in table.depths
    ]
    return {
        "mean": table.total.mean,
        "confidence": _listed(table.total.interval),
        "by_length": {str(length): table.by_length[length].mean for length in table.lengths},
        "by_length_confidence": {
            str(length): _listed(table.by_length[length].interval) for length in table.lengths
        },
        "grid": [[tally.mean for tally in row] for row in tallies],
        "counts": [[tally.scored for tally in row] for row in tallies],
        "lengths": table.lengths,
        "depths": table.depths,
        "samples_per_cell": table.samples_per_cell,
        "scored": table.total.scored,
        "unscored": table.total.unscored,
    }


def _ppl_summary(table: PplTable) -> dict[str, Any]:
    return {
        "by_length": {str(length): perplexity(sums) for length, sums in table.by_length.items()},
        "by_position": {f"{a}-{b}": perplexity(sums) for (a, b), sums in table.by_position.items()},
        "by_source": {source: perplexity(sums) for source, sums in table.by_source.items()},
        "tokens": sum(tokens for tokens, _ in table.by_length.values()),
        "unscored": table.unscored,
    }


def _distractor_summary(table: NeedleTable) -> dict[str, Any]:
    return {
        "mean": table.total.mean,
        "confidence": _listed(table.total.interval),
        "by_length": {str(length): table.by_length[length].mean for length in table.lengths},
        "scored": table.total.scored,
        "unscored": table.total.unscored,
    }


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def needle_csv(tables: dict[str, NeedleTable]) -> str:
    """Return one CSV line per label and cell; an empty mean is a cell without a scored sample."""
    rows: list[list[Any]] = []
    for label, table in tables.items():
        for depth in table.depths:
            for length in table.lengths:
                tally = table.tallies.get((depth, length), Tally())
                low, high = tally.interval or ("", "")
                rows.append(
                    [label, length, depth, _blank(tally.mean), low, high, tally.scored, tally.unscored]
                )
    return _csv(["label", "length", "depth", "mean", "low95", "high95", "scored", "unscored"], rows)


def ppl_csv(tables: dict[str, PplTable]) -> str:
    """Return one CSV line per label and group (window length, position bucket or source)."""
    rows: list[list[Any]] = []
    for label, table in tables.items():
        groups = [("length", str(length), sums) for length, sums in table.by_length.items()]
        groups += [("position", f"{a}-{b}", sums) for (a, b), sums in table.by_position.items()]
        groups += [("source", source, sums) for source, sums in table.by_source.items()]
        rows += [[label, by, group, _blank(perplexity(sums)), sums[0]] for by, group, sums in groups]
    return _csv(["label", "by", "group", "perplexity", "tokens"], rows)


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


def _csv(columns: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    # A text cell that starts like a formula would run when a spreadsheet opens the file.
    writer.writerows(
        [f"'{v}" if isinstance(v, str) and v[:1] in "=+-@" and v else v for v in row] for row in rows
    )
    return text.getvalue()
