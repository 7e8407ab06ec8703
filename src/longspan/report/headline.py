"""The result in one sentence, the key-figure tiles, and the models side by side with their effective context."""

from __future__ import annotations

from longspan.core.intervals import EFFECTIVE_THRESHOLD
from longspan.core.units import format_count, format_seconds
from longspan.report.charts import length_text
from longspan.report.evaluation import Evaluation, first_with_role
from longspan.report.scores_view import dataset_differences
from longspan.report.tables import Grid, Tally
from longspan.report.view import (
    ARROW,
    MISSING,
    ZERO_SHOT,
    Cell,
    Section,
    Table,
    change,
    decimal,
    interval_text,
    percent,
    points,
    role_of,
    short_name,
)

Clause = list[tuple[str, bool]]
_EFFECTIVE_TASKS = {
    "needle": "needle",
    "needle_distractors": "distractors",
    "needle_multi": "several needles",
    "needle_multikey": "multi-key",
    "passkey": "passkey",
    "topics": "topics",
    "lines": "lines",
    "ruler": "RULER",
}
_MOST_NAMED = 3


def headline(ev: Evaluation, training: dict[str, float]) -> tuple[Clause, list[dict[str, str]]]:
    """Return the result as one sentence (text, is a number) and the key-figure tiles.

    `training` may hold tokens, seconds and steps.
    """
    clauses: list[Clause] = []
    tiles: list[dict[str, str]] = []
    opening: Clause = []
    old, new = ev.before_length, ev.after_length
    if old and new and old != new:
        factor = f"{new / old:.3g}\u00d7"
        opening = [(f"{length_text(old)} {ARROW} {length_text(new)} tokens", True), (f" ({factor}): ", False)]
        tiles.append(
            _tile("Context length, tokens", length_text(new), f"{factor} the original {length_text(old)}")
        )
    _effective_headline(ev, clauses, tiles)
    _needle_headline(ev, clauses, tiles)
    _ppl_headline(ev, clauses, tiles)
    _short_headline(ev, tiles)
    if training:
        parts = [format_seconds(training["seconds"])] if "seconds" in training else []
        parts.append(f"{training['steps']:,.0f} steps")
        tiles.append(_tile("Training tokens", format_count(training["tokens"]), ", ".join(parts)))
        if not clauses:
            clauses.append(
                [("trained on ", False), (format_count(training["tokens"]), True), (" tokens", False)]
            )
    after = ev.after
    if opening and after is not None and role_of(after) != after:
        # Several runs have a model of this name: the sentence is about the first.
        opening = [(f"{after.removeprefix('after (').removesuffix(')')}: ", False), *opening]
    sentence = list(opening)
    for number, clause in enumerate(clauses):
        sentence += ([("; ", False)] if number else []) + clause
    return [*sentence, (".", False)] if clauses else [], tiles


def _tile(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def effective_grids(ev: Evaluation) -> dict[str, dict[str, Grid]]:
    """Return task -> label -> grid of everything that has an effective context; controls are left out."""
    grids = {task: ev.grids[task] for task in _EFFECTIVE_TASKS if task in ev.grids}
    if ev.distractors:
        # The most distractors: the hardest of what was asked.
        grids["needle_distractors"] = {label: by[max(by)] for label, by in ev.distractors.items()}
    return {
        task: {label: grid for label, grid in grids[task].items() if not label.startswith("ablate_")}
        for task in _EFFECTIVE_TASKS
        if task in grids
    }


def effective_text(grid: Grid) -> str:
    """Write an effective context, `< 1,024` where the shortest measured length does not hold."""
    if not grid.lengths:
        return MISSING
    return length_text(grid.effective) if grid.effective else f"< {length_text(grid.lengths[0])}"


def _effective_headline(ev: Evaluation, clauses: list[Clause], tiles: list[dict[str, str]]) -> None:
    grids = effective_grids(ev)
    if not grids:
        return
    task, by_label = next(iter(grids.items()))
    before, after = first_with_role("before", by_label), first_with_role("after", by_label)
    clause: Clause
    what = f"Effective context, {_EFFECTIVE_TASKS[task]}"
    rule = f"lower 95% bound above {EFFECTIVE_THRESHOLD:.0%}"
    if after:
        note = f"before {effective_text(by_label[before])}; {rule}" if before else rule
        reached = effective_text(by_label[after])
        tiles.append(_tile(what, reached, note))
        if task != "needle":
            clause = [(f"effective context, {_EFFECTIVE_TASKS[task]}, ", False)]
            clause += [(f"{effective_text(by_label[before])} {ARROW} ", True)] if before else []
            clauses.append([*clause, (reached, True), (" tokens", False)])
        return
    best = max(by_label, key=lambda label: by_label[label].effective or 0)
    tiles.append(_tile(what, effective_text(by_label[best]), f"{short_name(best)}; {rule}"))
    if len(by_label) > 1:
        named = sorted(by_label, key=lambda label: -(by_label[label].effective or 0))[:_MOST_NAMED]
        clause = [("effective context ", False)]
        for number, label in enumerate(named):
            text = f"{', ' if number else ''}{short_name(label)} "
            clause += [(text, False), (effective_text(by_label[label]), True)]
        clauses.append([*clause, (" tokens", False)])


def _needle_headline(ev: Evaluation, clauses: list[Clause], tiles: list[dict[str, str]]) -> None:
    names = first_with_role("before", ev.needle), first_with_role("after", ev.needle)
    before, after = (ev.needle[name] if name else None for name in names)
    main = after or before or next(iter(ev.needle.values()), None)
    if main is None or not main.lengths:
        return
    target = max(
        (n for n in main.lengths if ev.after_length is None or n <= ev.after_length), default=main.lengths[0]
    )
    tally = main.by_length[target]
    first = before.by_length.get(target, Tally()) if before is not None and main is not before else Tally()
    where = f"needle accuracy at {length_text(target)} tokens"
    if first.mean is not None and tally.mean is not None:
        from_to = [(" to ", False), (percent(tally.mean), True)]
        clauses.append([(f"{where} from ", False), (percent(first.mean), True), *from_to])
    elif len(ev.needle) == 1 or after is not None:
        clauses.append([(f"{where} ", False), (percent(tally.mean), True)])
    if after is None and len(ev.needle) > 1:
        return
    notes = [f"before {percent(first.mean)}"] if first.mean is not None else []
    notes.append(f"95% interval {interval_text(tally)}, n = {tally.scored}")
    tiles.append(_tile(f"Needle accuracy at {length_text(target)}", percent(tally.mean), "; ".join(notes)))
    rivals = [
        (t.mean, label)
        for label, grid in ev.needle.items()
        if role_of(label) in ZERO_SHOT and (t := grid.by_length.get(target)) and t.mean is not None
    ]
    if rivals:
        best, label = max(rivals)
        tiles.append(
            _tile(
                f"Best zero-shot at {length_text(target)}",
                percent(best),
                f"{short_name(label)}, no training",
            )
        )


def _ppl_headline(ev: Evaluation, clauses: list[Clause], tiles: list[dict[str, str]]) -> None:
    names = first_with_role("after", ev.ppl), first_with_role("before", ev.ppl)
    if names[0] is None or names[1] is None:
        return
    after, before = ev.ppl[names[0]], ev.ppl[names[1]]
    short = ev.before_length
    if short and (new := after.short(short)) and (old := before.short(short)):
        clauses.append(
            [
                (f"perplexity at {length_text(short)} tokens ", False),
                (f"{decimal(old)} {ARROW} {decimal(new)}", True),
            ]
        )
        note = f"before {decimal(old)} ({change(old, new)})"
        tiles.append(_tile(f"Perplexity at {length_text(short)}", decimal(new), note))
    last, old_last = after.last(), before.last()
    if last and old_last and last[0] == old_last[0] and last[1]:
        (start, end), value = last
        name = f"Perplexity at positions {length_text(start)}\u2013{length_text(end)}"
        tiles.append(_tile(name, decimal(value), f"before {decimal(old_last[1])}"))


def _short_headline(ev: Evaluation, tiles: list[dict[str, str]]) -> None:
    """Add what the extension changed on MMLU, or on the first benchmark that has no such name."""
    rows = [row for row in dataset_differences(ev) if role_of(row.label) == "after"]
    row = next((row for row in rows if "mmlu" in row.dataset.lower()), rows[0] if rows else None)
    if row is None:
        return
    low, high = row.difference.interval or (row.difference.value, row.difference.value)
    note = (
        f"{percent(row.difference.before)} {ARROW} {percent(row.difference.after)}; "
        f"95% interval {points(low)} to {points(high)}"
    )
    tiles.append(_tile(f"{row.dataset}, change in points", points(row.difference.value), note))


def models_section(ev: Evaluation) -> Section:
    """Return the models side by side: effective context for every task that has lengths."""
    section = Section("models", "Effective context")
    grids = effective_grids(ev)
    if not grids:
        return section
    labels = [label for label in ev.labels if any(label in by_label for by_label in grids.values())]
    section.intro = (
        "The longest context up to which the lower bound of the 95% interval of accuracy, pooled over depths, "
        f"stays above {EFFECTIVE_THRESHOLD:.0%}, at that length and at every shorter one that was measured."
    )
    rows: list[list[str | Cell]] = []
    for label in labels:
        trained = ev.trained_length(label)
        cells = [
            Cell(effective_text(grid), "num strong", _measured(grid))
            if (grid := by_label.get(label)) is not None
            else Cell(MISSING, "num muted")
            for by_label in grids.values()
        ]
        rows.append([short_name(label), Cell(length_text(trained) if trained else MISSING, "num"), *cells])
    section.parts["table"] = Table(
        "Effective context in tokens, by model and task",
        ["model", "trained length", *(_EFFECTIVE_TASKS[task] for task in grids)],
        rows,
    )
    return section


def _measured(grid: Grid) -> str:
    if not grid.lengths:
        return "nothing was scored"
    return f"measured up to {length_text(grid.lengths[-1])} tokens, {grid.total.scored:,} samples"
