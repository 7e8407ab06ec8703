"""The numbers of a run as JSON, without a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.report.evaluation import first_with_role
from longspan.report.load import LoadedRun, load_run
from longspan.report.tables import (
    Grid,
    PplTable,
    Tally,
    bits_per_byte,
    by_group,
    difference,
    perplexity,
    tabulate,
    tally_of,
)


def summarise(run: str | Path | LoadedRun) -> dict[str, Any]:
    """Return the numbers of a run as JSON: {"needle": {label: ...}, "ppl": {label: ...}, "needle_distractors": ...}.

    needle[label]: mean, by_length {"128": x}, by_length_confidence, grid (rows = depths, columns = lengths, None =
    nothing scored), counts (scored samples, same shape), lengths, depths, samples_per_cell, scored, unscored,
    confidence (95 % interval of the mean), effective_context, effective_text and effective_note (what stands in its
    place and why), no_answer (scored samples with an empty answer, by reason), confidence_by_cluster (the interval
    that takes samples on one text for dependent), thought_tokens (of all thoughts), and `difference` from `before`
    (where no label is called so, from the first), paired by question (value, confidence, pairs). mean, confidence,
    scored and unscored are over all lengths, also those beyond the trained one.
    ppl[label]: by_length {"128": x}, bits_per_byte {"128": x or None}, by_position {"0-128": x}, by_source {source: x}
    (the last two over the longest windows), tokens, unscored.
    needle_distractors[label]: {"3": {mean, confidence, by_length, scored, unscored}}.
    Further tasks stand under their names when they were recorded: those with axes as needle, with `rows` in the place
    of depths and `columns` in that of lengths where they are others; all others as
    {label: {"dataset/subtask/metric": {mean, ...}}}.

    Raises:
        DataError: see `load_run`.
    """
    run = run if isinstance(run, LoadedRun) else load_run(run)
    tables = tabulate(run.records)
    further = {
        task: {label: {**_grid_summary(grid), **_differs(grids, label)} for label, grid in grids.items()}
        for task, grids in tables.grids.items()
    }
    scores = {
        task: {
            label: {
                "/".join(part for part in key if part) or "all": _tally_summary(tally_of(group))
                for key, group in by_group(samples, "dataset", "subtask", "metric").items()
            }
            for label, samples in by_label.items()
        }
        for task, by_label in tables.scores.items()
    }
    return {
        "needle": {},
        "ppl": {label: _ppl_summary(table) for label, table in tables.ppl.items()},
        "needle_distractors": {
            label: {str(count): _distractor_summary(table) for count, table in by_count.items()}
            for label, by_count in tables.distractors.items()
        },
        **further,
        **scores,
    }


def _differs(grids: Mapping[str, Grid], label: str) -> dict[str, Any]:
    """Return how a label differs from `before`, or from the first one, on the questions that both were asked."""
    base = first_with_role("before", grids) or next(iter(grids))
    old, new = ([s for group in grids[name].cells.values() for s in group] for name in (base, label))
    found = None if label == base else difference(old, new)
    if found is None or not found.pairs:
        return {}
    values = {"value": found.value, "confidence": _listed(found.interval), "pairs": found.pairs}
    return {"difference": {"from": base, **values}}


def _grid_summary(table: Grid) -> dict[str, Any]:
    tallies = [[table.tally(row, column) for column in table.columns] for row in table.rows]
    columns = "length" if table.by_length else "column"
    summary = {
        **_tally_summary(table.total),
        f"by_{columns}": {str(column): table.by_column[column].mean for column in table.columns},
        f"by_{columns}_confidence": {
            str(column): _listed(table.by_column[column].interval) for column in table.columns
        },
        "grid": [[tally.mean for tally in row] for row in tallies],
        "counts": [[tally.scored for tally in row] for row in tallies],
        f"{columns}s": table.columns,
        "depths" if table.layout.rows == "depth" else "rows": table.rows,
        "samples_per_cell": table.samples_per_cell,
    }
    if table.by_length:
        summary["effective_context"] = table.effective.length
        summary["effective_text"] = table.effective.text
        summary["effective_note"] = table.effective.note
    return summary


def _ppl_summary(table: PplTable) -> dict[str, Any]:
    return {
        "by_length": {str(length): perplexity(sums) for length, sums in table.by_length.items()},
        "bits_per_byte": {str(length): bits_per_byte(sums) for length, sums in table.by_length.items()},
        "by_position": {f"{a}-{b}": perplexity(sums) for (a, b), sums in table.by_position.items()},
        "by_source": {source: perplexity(sums) for source, sums in table.by_source.items()},
        "tokens": sum(sums.tokens for sums in table.by_length.values()),
        "unscored": table.unscored,
    }


def _distractor_summary(table: Grid) -> dict[str, Any]:
    by_length = {str(length): table.by_column[length].mean for length in table.columns}
    return {**_tally_summary(table.total), "by_length": by_length}


def _tally_summary(tally: Tally) -> dict[str, Any]:
    return {
        "mean": tally.mean,
        "confidence": _listed(tally.interval),
        "confidence_by_cluster": _listed(tally.interval_by_cluster),
        "scored": tally.scored,
        "unscored": tally.unscored,
        "no_answer": dict(tally.no_answer),
        "thought_tokens": tally.thought_tokens,
    }


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
