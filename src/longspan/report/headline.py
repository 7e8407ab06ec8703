"""The result in one sentence, the key-figure tiles, and the models side by side with their effective context."""

from __future__ import annotations

from longspan.core.intervals import EFFECTIVE_THRESHOLD, samples_needed
from longspan.core.units import format_count, format_seconds
from longspan.report.charts import cut_name, cut_names
from longspan.report.comparison import differ_text
from longspan.report.effective import effective_note, effective_text
from longspan.report.evaluation import Evaluation, first_with_role
from longspan.report.layouts import length_text
from longspan.report.pairs_view import interval_words
from longspan.report.perplexity_view import common_reach, ppl_measure
from longspan.report.tables import Grid, Tally, difference
from longspan.report.view import (
    ARROW,
    MISSING,
    ZERO_SHOT,
    Clause,
    Section,
    Table,
    TableCell,
    change,
    decimal,
    interval_text,
    percent,
    points,
    role_of,
    short_name,
    tile,
    unscored_text,
)

_MOST_NAMED = 3
_MOST_ACROSS = 6
"""Tasks that have a column each; of more each has a row."""


def headline(ev: Evaluation, training: dict[str, float]) -> tuple[Clause, list[dict[str, str]]]:
    """Return the result as one sentence (text, is a number) and the key-figure tiles.

    `training` may hold tokens, seconds and steps.
    """
    clauses: list[Clause] = []
    tiles: list[dict[str, str]] = []
    opening: Clause = []
    old, new = ev.before_length, ev.after_length
    if old and new and old != new:
        extended, length_tile = extension(old, new)
        opening = [*extended, (": ", False)]
        tiles.append(length_tile)
    _effective_headline(ev, clauses, tiles)
    _lead_headline(ev, clauses, tiles)
    _ppl_headline(ev, clauses, tiles)
    _short_headline(ev, tiles)
    if training:
        parts = [format_seconds(training["seconds"])] if "seconds" in training else []
        parts.append(f"{training['steps']:,.0f} steps")
        tiles.append(tile("Training tokens", format_count(training["tokens"]), ", ".join(parts)))
        if not clauses:
            clauses.append(
                [("trained on ", False), (format_count(training["tokens"]), True), (" tokens", False)]
            )
    after = ev.after
    if opening and after is not None and role_of(after) != after:
        # Several runs have a model of this name: the sentence is about the first.
        opening = [(f"{cut_name(after.removeprefix('after (').removesuffix(')'))}: ", False), *opening]
    sentence = list(opening)
    for number, clause in enumerate(clauses):
        sentence += ([("; ", False)] if number else []) + clause
    return [*sentence, (".", False)] if clauses else [], tiles


def extension(old: int, new: int) -> tuple[Clause, dict[str, str]]:
    """Return from which context length to which, as the sentence begins, and as a tile."""
    factor = f"{new / old:.3g}\u00d7"
    words = [(f"{length_text(old)} {ARROW} {length_text(new)} tokens", True), (f" ({factor})", False)]
    return words, tile(
        "Context length, tokens", length_text(new), f"{factor} the original {length_text(old)}"
    )


def effective_grids(ev: Evaluation) -> dict[str, dict[str, Grid]]:
    """Return task -> label -> grid of everything that has an effective context; controls are left out."""
    # The most distractors: the hardest of what was asked.
    hardest = {label: by[max(by)] for label, by in ev.distractors.items()}
    grids = {**ev.grids, **({"needle_distractors": hardest} if hardest else {})}
    return {
        task: {label: grid for label, grid in grids[task].items() if not label.startswith("ablate_")}
        for task, layout in ev.layouts.items()
        if layout.higher_is_better and task in grids and any(grid.by_length for grid in grids[task].values())
    }


def _effective_headline(ev: Evaluation, clauses: list[Clause], tiles: list[dict[str, str]]) -> None:
    grids = effective_grids(ev)
    if not grids:
        return
    task, by_label = next(iter(grids.items()))
    before, after = first_with_role("before", by_label), first_with_role("after", by_label)
    clause: Clause
    what = f"Effective context, {ev.layouts[task].short}"
    rule = f"lower 95% bound above {EFFECTIVE_THRESHOLD:.0%}"
    if after:
        differ = differ_text(ev.differing(task, before, after)) if before else ""
        notes = [effective_note(by_label[after]), differ, rule]
        if before:
            notes.insert(1, f"before {_with_note(by_label[before])}")
        reached = effective_text(by_label[after])
        tiles.append(tile(what, reached, "; ".join(filter(None, notes))))
        if ev.lead is None or task != ev.lead.task:
            clause = [(f"effective context, {ev.layouts[task].short}, ", False)]
            clause += [(f"{effective_text(by_label[before])} {ARROW} ", True)] if before else []
            clauses.append([*clause, (reached, True), (f" tokens{_aside(differ)}", False)])
        return
    named = sorted(by_label, key=lambda label: -(by_label[label].effective.length or 0))
    best = named[0]
    names = cut_names(map(short_name, named))
    notes = [effective_note(by_label[best]), names[short_name(best)], rule]
    tiles.append(tile(what, effective_text(by_label[best]), "; ".join(filter(None, notes))))
    if len(by_label) > 1:
        clause = [("effective context ", False)]
        for number, label in enumerate(named[:_MOST_NAMED]):
            text = f"{', ' if number else ''}{names[short_name(label)]} "
            clause += [(text, False), (effective_text(by_label[label]), True)]
        pairs = [(label, ev.compared_with(label, by_label)) for label in named[:_MOST_NAMED]]
        found = {name for label, other in pairs if other for name in ev.differing(task, label, other)}
        clauses.append([*clause, (f" tokens{_aside(differ_text(sorted(found)))}", False)])


def _with_note(grid: Grid) -> str:
    note = effective_note(grid)
    return effective_text(grid) + (f" ({note})" if note else "")


def _aside(text: str) -> str:
    return f" ({text})" if text else ""


def _lead_headline(ev: Evaluation, clauses: list[Clause], tiles: list[dict[str, str]]) -> None:
    layout, grids = ev.lead, ev.lead_grids
    names = first_with_role("before", grids), first_with_role("after", grids)
    before, after = (grids[name] if name else None for name in names)
    main = after or before or next(iter(grids.values()), None)
    if layout is None or main is None or not main.columns:
        return
    target = max(
        (n for n in main.columns if ev.after_length is None or n <= ev.after_length), default=main.columns[0]
    )
    tally = main.by_column[target]
    first = before.by_column.get(target, Tally()) if before is not None and main is not before else Tally()
    where = f"{layout.short} accuracy at {length_text(target)} tokens"
    differ = ev.differing(layout.task, names[0], names[1]) if names[0] and names[1] else ()
    if first.mean is not None and tally.mean is not None:
        from_to = [(" to ", False), (percent(tally.mean), True), (_aside(differ_text(differ)), False)]
        clauses.append([(f"{where} from ", False), (percent(first.mean), True), *from_to])
    elif tally.mean is None:
        clauses.append([(f"{where} not measured: {unscored_text(tally)}", False)])
    elif len(grids) == 1 or after is not None:
        clauses.append([(f"{where} ", False), (percent(tally.mean), True)])
    if after is None and len(grids) > 1:
        return
    notes = [f"before {percent(first.mean)}"] if first.mean is not None else []
    notes += [differ_text(differ)] if differ and first.mean is not None else []
    notes.append(
        unscored_text(tally)
        if tally.mean is None
        else f"95% interval {interval_text(tally)}, n = {tally.scored}"
    )
    if before is not None and main is not before and names[0] and names[1]:
        same = ev.same_questions(layout.task, names[0], names[1])
        old, new = (grid.at(target) for grid in (before, main))
        found = difference(old, new, same_questions=same)
        if found is not None and found.interval is not None:
            notes.append(f"change {points(found.value)} points, {interval_words(found)}")
    value = "not measured" if tally.mean is None else percent(tally.mean)
    tiles.append(tile(f"{layout.capital} accuracy at {length_text(target)}", value, "; ".join(notes)))
    rivals = [
        (t.mean, label)
        for label, grid in grids.items()
        if role_of(label) in ZERO_SHOT and (t := grid.by_column.get(target)) and t.mean is not None
    ]
    if rivals:
        best, label = (max if layout.higher_is_better else min)(rivals)
        reference = names[1] or names[0]
        apart = ev.differing(layout.task, label, reference) if reference else ()
        note = f"{short_name(label)}, no training" + _aside(differ_text(apart))
        tiles.append(tile(f"Best zero-shot at {length_text(target)}", percent(best), note))


def _ppl_headline(ev: Evaluation, clauses: list[Clause], tiles: list[dict[str, str]]) -> None:
    names = first_with_role("after", ev.ppl), first_with_role("before", ev.ppl)
    if names[0] is None or names[1] is None:
        return
    after, before = ev.ppl[names[0]], ev.ppl[names[1]]
    measure = ppl_measure(ev, names[:2])  # type: ignore[arg-type]
    differ = differ_text(ev.differing("ppl", names[0], names[1]))
    short = common_reach(before, after, ev.before_length)
    new = measure.of(after.short(short)) if short else None
    old = measure.of(before.short(short)) if short else None
    if short and new is not None and old is not None:
        where = f"{measure.name} at {length_text(short)} tokens"
        claim = [(f"{decimal(old)} {ARROW} {decimal(new)}", True), (_aside(differ), False)]
        clauses.append([(f"{where} ", False), *claim])
        note = f"before {decimal(old)} ({change(old, new)})" + (f"; {differ}" if differ else "")
        tiles.append(tile(f"{measure.title} at {length_text(short)}", decimal(new), note))
    last, old_last = after.last(), before.last()
    if last and old_last and last[0] == old_last[0]:
        (start, end), value = last[0], measure.of(last[1])
        earlier = measure.of(old_last[1])
        if value is not None and earlier is not None:
            name = f"{measure.title} at positions {length_text(start)}\u2013{length_text(end)}"
            tiles.append(
                tile(name, decimal(value), f"before {decimal(earlier)}" + (f"; {differ}" if differ else ""))
            )


def _short_headline(ev: Evaluation, tiles: list[dict[str, str]]) -> None:
    """Add what the extension changed on MMLU, or on the first benchmark that has no such name."""
    rows = [row for row in ev.dataset_differences if role_of(row.label) == "after"]
    row = next((row for row in rows if "mmlu" in row.dataset.lower()), rows[0] if rows else None)
    if row is None:
        return
    low, high = row.difference.interval or (row.difference.value, row.difference.value)
    note = (
        f"{percent(row.difference.before)} {ARROW} {percent(row.difference.after)}; "
        f"95% interval {points(low)} to {points(high)}"
        + (f"; {differ_text(row.differ)}" if row.differ else "")
    )
    tiles.append(tile(f"{row.dataset}, change in points", points(row.difference.value), note))


def models_section(ev: Evaluation) -> Section:
    """Return the models side by side: effective context for every task that has lengths."""
    section = Section("models", "Effective context")
    grids = effective_grids(ev)
    if not grids:
        return section
    labels = [label for label in ev.labels if any(label in by_label for by_label in grids.values())]
    section.intro = (
        "The longest context up to which the lower bound of the 95% interval of accuracy, pooled over depths or "
        "whatever else a task has rows of, "
        f"stays above {EFFECTIVE_THRESHOLD:.0%}, at that length and at every shorter one that was measured. "
        f"{samples_needed()} right answers of {samples_needed()} at a length are the fewest that show it."
    )
    differ = [
        f"{ev.layouts[task].short}: {words}"
        for task, by_label in grids.items()
        if (words := ev.not_comparable(task, by_label))
    ]
    section.intro = " ".join([section.intro, *differ])
    rows: list[list[str | TableCell]] = []
    for label in labels:
        trained = ev.trained_length(label)
        cells = [
            TableCell(effective_text(grid), "num strong", _measured(grid))
            if (grid := by_label.get(label)) is not None
            else TableCell(MISSING, "num muted")
            for by_label in grids.values()
        ]
        rows.append(
            [short_name(label), TableCell(length_text(trained) if trained else MISSING, "num"), *cells]
        )
    columns = ["model", "trained length", *(ev.layouts[task].short for task in grids)]
    table = Table("Effective context in tokens, by model and task", columns, rows)
    section.parts["table"] = table.turned("task") if len(grids) > _MOST_ACROSS else table
    return section


def _measured(grid: Grid) -> str:
    note = effective_note(grid)
    if not grid.columns or not grid.total.scored:
        return note or "nothing was scored"
    text = f"measured up to {length_text(grid.columns[-1])} tokens, {grid.total.scored:,} samples"
    return f"{text}; {note}" if note else text
