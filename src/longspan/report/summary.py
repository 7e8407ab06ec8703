"""The numbers of a run as JSON, without a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longspan.report.comparison import differing, same_questions
from longspan.report.evaluation import first_with_role
from longspan.report.load import LoadedRun, load_run
from longspan.report.pairs_view import corrected_p
from longspan.report.ppl_tables import PplTable, bits_per_byte, perplexity
from longspan.report.samples import ScoredSample
from longspan.report.tables import Difference, Grid, Tally, by_group, difference, tabulate, tally_of


def summarise(run: str | Path | LoadedRun) -> dict[str, Any]:
    """Return the numbers of a run as JSON: {"needle": {label: ...}, "ppl": {label: ...}, "needle_distractors": ...}.

    needle[label]: mean, by_length {"128": x}, by_length_confidence, grid (rows = depths, columns = lengths, None =
    nothing scored), counts (scored samples, same shape), lengths, depths, samples_per_cell, scored, unscored,
    confidence (95 % interval of the mean), effective_context, effective_text and effective_note (what stands in its
    place and why), no_answer (scored samples with an empty answer, by reason), confidence_by_cluster (the interval
    that takes samples on one text for dependent), thought_tokens (of all thoughts), and where the same was asked
    `difference` from `before` (where no label is called so, from the first), paired by question (value, confidence,
    pairs, texts that these are on, p), and difference_by_length with p_corrected too, by Holm for the number of
    lengths. mean, confidence, scored and unscored are over all lengths, also those beyond the trained one.
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
    further: dict[str, Any] = {
        task: {
            label: {**_grid_summary(grid), **_grid_changes(run, task, grids, label)}
            for label, grid in grids.items()
        }
        for task, grids in tables.grids.items()
    }
    scores: dict[str, Any] = {}
    for task, by_label in tables.scores.items():
        sets = {
            label: by_group(samples, "dataset", "subtask", "metric") for label, samples in by_label.items()
        }
        first = _base(sets)
        paired = {label for label in sets if _are_paired(run, task, first, label)}
        scores[task] = {
            label: {
                "/".join(part for part in key if part) or "all": {
                    **_tally_summary(tally_of(group)),
                    **(_change(first, sets[first].get(key, ()), group) if label in paired else {}),
                }
                for key, group in groups.items()
            }
            for label, groups in sets.items()
        }
    return {
        "needle": {},
        "ppl": {label: _ppl_summary(table) for label, table in tables.ppl.items()},
        "needle_distractors": {
            label: {
                str(count): {
                    **_distractor_summary(table),
                    **_grid_changes(
                        run,
                        "needle_distractors",
                        {name: by[count] for name, by in tables.distractors.items() if count in by},
                        label,
                    ),
                }
                for count, table in by_count.items()
            }
            for label, by_count in tables.distractors.items()
        },
        **further,
        **scores,
    }


def _base(labels: Mapping[str, Any]) -> str:
    """Return the label that others are compared with."""
    return first_with_role("before", labels) or next(iter(labels))


def _are_paired(run: LoadedRun, task: str, one: str, two: str) -> bool:
    return one != two and same_questions(differing(run.records, task, one, two))


def _change(first: str, old: Sequence[ScoredSample], new: Sequence[ScoredSample]) -> dict[str, Any]:
    """Return how samples differ from those of the label `first` on the same questions, if there are such."""
    found = difference(old, new)
    return (
        {"difference": {"from": first, **_listed_change(found)}} if found is not None and found.pairs else {}
    )


def _grid_changes(run: LoadedRun, task: str, grids: Mapping[str, Grid], label: str) -> dict[str, Any]:
    """Return `_change` over all columns, and column by column with p-values corrected for the number of columns."""
    first, grid = _base(grids), grids[label]
    whole = _change(first, grids[first].at(), grid.at()) if _are_paired(run, task, first, label) else {}
    if not whole:
        return {}
    changes = [difference(grids[first].at(column), grid.at(column)) for column in grid.columns]
    by_column = {
        str(column): {**_listed_change(change), "p_corrected": p}
        for column, change, p in zip(grid.columns, changes, corrected_p(changes))
        if change is not None and change.pairs
    }
    return {**whole, f"difference_by_{'length' if grid.by_length else 'column'}": by_column}


def _listed_change(change: Difference) -> dict[str, Any]:
    values = {"value": change.value, "confidence": _listed(change.interval), "pairs": change.pairs}
    return {**values, "texts": change.texts or change.pairs, "p": change.p}


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
