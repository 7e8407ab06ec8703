"""The result in one sentence, and the key-figure tiles."""

from __future__ import annotations

from longspan.core.units import format_count, format_seconds
from longspan.report.charts import (
    length_text,
)
from longspan.report.evaluation import Evaluation
from longspan.report.tables import (
    Tally,
)
from longspan.report.view import (
    ARROW,
    ZERO_SHOT,
    change,
    decimal,
    interval_text,
    percent,
    short_name,
)


def headline(
    ev: Evaluation, training: dict[str, float]
) -> tuple[list[tuple[str, bool]], list[dict[str, str]]]:
    """Return the result as one sentence (text, is a number) and the key-figure tiles.

    `training` may hold tokens, seconds and steps.
    """
    clauses: list[list[tuple[str, bool]]] = []
    tiles: list[dict[str, str]] = []
    opening: list[tuple[str, bool]] = []
    old, new = ev.before_length, ev.after_length
    if old and new and old != new:
        factor = f"{new / old:.3g}\u00d7"
        opening = [(f"{length_text(old)} {ARROW} {length_text(new)} tokens", True), (f" ({factor}): ", False)]
        tiles.append(
            {
                "name": "Context length, tokens",
                "value": length_text(new),
                "note": f"{factor} the original {length_text(old)}",
            }
        )
    _needle_headline(ev, clauses, tiles)
    _ppl_headline(ev, clauses, tiles)
    if training:
        parts = [format_seconds(training["seconds"])] if "seconds" in training else []
        parts.append(f"{training['steps']:,.0f} steps")
        tiles.append(
            {
                "name": "Training tokens",
                "value": format_count(training["tokens"]),
                "note": ", ".join(parts),
            }
        )
        if not clauses:
            clauses.append(
                [("trained on ", False), (format_count(training["tokens"]), True), (" tokens", False)]
            )
    sentence = list(opening)
    for number, clause in enumerate(clauses):
        sentence += ([("; ", False)] if number else []) + clause
    return [*sentence, (".", False)] if clauses else [], tiles


def _needle_headline(
    ev: Evaluation, clauses: list[list[tuple[str, bool]]], tiles: list[dict[str, str]]
) -> None:
    after, before = ev.needle.get("after"), ev.needle.get("before")
    main = after or before or next(iter(ev.needle.values()), None)
    if main is None:
        return
    target = max(
        (n for n in main.lengths if ev.after_length is None or n <= ev.after_length), default=main.lengths[0]
    )
    tally = main.by_length[target]
    first = before.by_length.get(target, Tally()) if before is not None and main is not before else Tally()
    where = f"needle accuracy at {length_text(target)} tokens"
    if first.mean is not None and tally.mean is not None:
        clauses.append(
            [
                (f"{where} from ", False),
                (percent(first.mean), True),
                (" to ", False),
                (percent(tally.mean), True),
            ]
        )
    else:
        clauses.append([(f"{where} ", False), (percent(tally.mean), True)])
    notes = [f"before {percent(first.mean)}"] if first.mean is not None else []
    notes.append(f"95% interval {interval_text(tally)}, n = {tally.scored}")
    tiles.append(
        {
            "name": f"Needle accuracy at {length_text(target)}",
            "value": percent(tally.mean),
            "note": "; ".join(notes),
        }
    )
    rivals = [
        (t.mean, label)
        for label in ZERO_SHOT
        if label in ev.needle and (t := ev.needle[label].by_length.get(target)) and t.mean is not None
    ]
    if rivals:
        best, label = max(rivals)
        tiles.append(
            {
                "name": f"Best zero-shot at {length_text(target)}",
                "value": percent(best),
                "note": f"{short_name(label)}, no training",
            }
        )


def _ppl_headline(ev: Evaluation, clauses: list[list[tuple[str, bool]]], tiles: list[dict[str, str]]) -> None:
    after, before = ev.ppl.get("after"), ev.ppl.get("before")
    if after is None or before is None:
        return
    short = ev.before_length
    if short and (new := after.short(short)) and (old := before.short(short)):
        clauses.append(
            [
                (f"perplexity at {length_text(short)} tokens ", False),
                (f"{decimal(old)} {ARROW} {decimal(new)}", True),
            ]
        )
        tiles.append(
            {
                "name": f"Perplexity at {length_text(short)}",
                "value": decimal(new),
                "note": f"before {decimal(old)} ({change(old, new)})",
            }
        )
    last, old_last = after.last(), before.last()
    if last and old_last and last[0] == old_last[0] and last[1]:
        (start, end), value = last
        tiles.append(
            {
                "name": f"Perplexity at positions {length_text(start)}\u2013{length_text(end)}",
                "value": decimal(value),
                "note": f"before {decimal(old_last[1])}",
            }
        )
