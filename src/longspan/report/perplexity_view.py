"""The perplexity section: by position, by window length, by source, and the short-context change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from longspan.report.charts import Axis, LineChart, Series, length_axis, number_axis
from longspan.report.comparison import differ_text, listed
from longspan.report.evaluation import Evaluation, first_with_role, trained_marks
from longspan.report.layouts import length_text
from longspan.report.pairs_view import bracketed, changes_table, corrected_cells, emphasis, pairs_of
from longspan.report.palette import line_index
from longspan.report.ppl_tables import PplChange, PplTable, Sums, bits_per_byte, perplexity, perplexity_change
from longspan.report.view import (
    ARROW,
    MISSING,
    Chart,
    Section,
    Table,
    TableCell,
    change,
    decimal,
    line_view,
    role_of,
    share,
    short_name,
    tokens_text,
)


class PplMeasure(NamedTuple):
    """What is shown of the loss: perplexity, or bits per byte where labels have tokens of different tokenizers."""

    name: str
    of: Callable[[Sums], float | None]

    @property
    def title(self) -> str:
        """Its name at the beginning of a line."""
        return self.name[0].upper() + self.name[1:]


_MOST_ACROSS = 8
"""Sources that have a column each; of more each has a row."""
PERPLEXITY = PplMeasure("perplexity", perplexity)
BITS = PplMeasure("bits per byte", bits_per_byte)


def ppl_measure(ev: Evaluation, labels: Sequence[str]) -> PplMeasure:
    """Return perplexity where all labels have one tokenizer; a token of another is other text."""
    tokenizers = {f.header.get("tokenizer") for f in ev.files if f.task == "ppl" and f.label in labels}
    return PERPLEXITY if len(tokenizers) == 1 else BITS


def ppl_section(ev: Evaluation) -> Section:
    """Return perplexity by position and by length, the short-context change and the table by source."""
    section = Section("perplexity", "Perplexity", "perplexity")
    labels = [label for label in ev.ppl if not label.startswith("ablate_") and ev.ppl[label].by_length]
    if not labels:
        section.missing.append("Perplexity was not measured: no records/ppl-*.jsonl.")
        return section
    measure = ppl_measure(ev, labels)
    section.intro = "Held-out text, each token weighted alike; lower is better. The axes are logarithmic."
    if measure is BITS:
        section.intro += (
            " The tokens are those of different tokenizers, so bits per byte of the text stand in the place of "
            "perplexities, which cannot be compared."
        )
        old = [label for label in labels if all(BITS.of(s) is None for s in ev.ppl[label].by_length.values())]
        if old:
            section.missing.append(
                f"Bits per byte of {listed([short_name(label) for label in old])} are not known: the records hold "
                "no bytes. Evaluate again to compare across tokenizers."
            )
    section.intro = " ".join(filter(None, (section.intro, ev.not_comparable("ppl", ev.ppl))))
    section.parts["callout"] = _short_context(ev)
    section.parts["changes"] = _changes(ev, labels) if measure is PERPLEXITY else None
    several_buckets = max(len(ev.ppl[label].by_position) for label in labels) > 1
    several_lengths = len({length for label in labels for length in ev.ppl[label].by_length}) > 1
    section.parts["position"] = _position_chart(ev, labels, measure) if several_buckets else None
    section.parts["length"] = _length_chart(ev, labels, measure) if several_lengths else None
    sources = sorted({source for label in labels for source in ev.ppl[label].by_source})
    by_source = {label: ev.ppl[label].by_source for label in labels}
    title = f"{measure.title} by source, longest windows"
    table = _table(title, measure, by_source, {source: source for source in sources})
    section.parts["sources"] = table.turned("source") if len(sources) > _MOST_ACROSS else table
    known = [b for b in labels if any(BITS.of(sums) is not None for sums in ev.ppl[b].by_length.values())]
    section.parts["bits"] = None
    if known and measure is not BITS:
        lengths = sorted({length for b in known for length in ev.ppl[b].by_length})
        by_length = {label: ev.ppl[label].by_length for label in known}
        columns = {n: length_text(n) for n in lengths}
        section.parts["bits"] = _table("Bits per byte by window length", BITS, by_length, columns)
    unscored = sum(ev.ppl[label].unscored for label in labels)
    if unscored:
        reasons = sum((ev.ppl[label].reasons for label in labels), Counter())
        named = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(3))
        section.missing.append(
            f"{unscored} perplexity windows could not be scored and are left out of the means ({named})."
        )
    return section


def _table(
    title: str, measure: PplMeasure, of_label: Mapping[str, Mapping[Any, Sums]], columns: Mapping[Any, str]
) -> Table:
    rows: list[list[str | TableCell]] = [
        [short_name(b), *(TableCell(decimal(measure.of(of.get(key, Sums()))), "num") for key in columns)]
        for b, of in of_label.items()
    ]
    return Table(title, ["", *columns.values()], rows)


def common_reach(before: PplTable, after: PplTable, trained: int | None) -> int | None:
    """Return the trained length, or how far below it both models were measured; None where that differs."""
    if not trained:
        return None
    reach = before.reach(trained)
    return reach if reach == after.reach(trained) else None


def _short_context(ev: Evaluation) -> dict[str, str]:
    names = first_with_role("before", ev.ppl), first_with_role("after", ev.ppl)
    trained = ev.before_length
    if names[0] is None or names[1] is None or not trained:
        return {}
    before, after = ev.ppl[names[0]], ev.ppl[names[1]]
    length = common_reach(before, after, trained)
    if length is None:
        return {}
    measure = ppl_measure(ev, [names[0], names[1]])
    old, new = measure.of(before.short(length)), measure.of(after.short(length))
    if old is None or new is None:
        return {}
    differ = ev.differing("ppl", names[1], names[0])
    found = perplexity_change(before, after, length) if measure is PERPLEXITY else None
    low, high = found.interval if found else (0.0, 0.0)
    sure = f" (95% interval {share(low)} to {share(high)}, {found.windows:,} windows)" if found else ""
    verdict = (
        f"{differ_text(differ).capitalize()}."
        if differ
        else "The interval holds zero: no change is shown."
        if found and low <= 0 <= high
        else "Short contexts did not get worse."
        if new <= old
        else "This is what the longer context cost on short ones."
    )
    return {
        "value": change(old, new),
        "text": f"Short-context change: {measure.name} at {tokens_text(length)}, "
        f"{'the original length' if length == trained else f'of the original {length_text(trained)}'}, "
        f"{decimal(old)} {ARROW} {decimal(new)}{sure}. {verdict}",
    }


def _changes(ev: Evaluation, labels: Sequence[str]) -> Table | None:
    """Return the change of perplexity by window length, on the windows that both models were given."""
    lengths = sorted({length for label in labels for length in ev.ppl[label].by_length})
    pairs = pairs_of(ev, "ppl", {label: ev.ppl[label] for label in labels})
    found = [[perplexity_change(ev.ppl[p.old], ev.ppl[p.new], n) for n in lengths] for p in pairs]
    rows: list[list[str | TableCell]] = [
        [pair.name, *cells] for pair, cells in zip(pairs, corrected_cells(found, _change_cell))
    ]
    columns = ["change", *map(length_text, lengths)]
    return changes_table("Perplexity: relative change by window length [95% interval]", columns, rows)


def _change_cell(change: PplChange | None, corrected: float | None) -> TableCell:
    if change is None or corrected is None:
        return TableCell(MISSING, "num muted")
    low, high = change.interval
    words = f"{change.windows:,} windows, p = {change.p:.2g}, corrected {corrected:.2g}"
    text = bracketed(*map(share, (change.value, low, high)))
    return TableCell(text, f"num change {emphasis(change, corrected)}", words)


def _ppl_series(
    labels: Sequence[str], rows: dict[str, list[tuple[float, str, Sums]]], measure: PplMeasure
) -> list[Series]:
    series = []
    for position, label in enumerate(labels):
        known = [
            (x, where, sums, value)
            for x, where, sums in rows[label]
            if (value := measure.of(sums)) is not None
        ]
        tips = [
            f"{short_name(label)}, {where}: {decimal(value)} ({sums.tokens:,} tokens)"
            for _, where, sums, value in known
        ]
        points = [(x, value) for x, _, _, value in known]
        strong = role_of(label) == "after"
        series.append(Series(short_name(label), line_index(label, position), points, (), tips, strong=strong))
    return series


def _position_chart(ev: Evaluation, labels: Sequence[str], measure: PplMeasure) -> Chart:
    buckets = sorted({bucket for label in labels for bucket in ev.ppl[label].by_position})
    rows = {
        label: [
            ((a + b) / 2, f"positions {a:,} to {b:,}", sums)
            for (a, b), sums in ev.ppl[label].by_position.items()
        ]
        for label in labels
    }
    series = _ppl_series(labels, rows, measure)
    ends = sorted({end for _, end in buckets})
    x = Axis(
        (buckets[0][0] + buckets[0][1]) / 2 / 1.1,
        ends[-1],
        [(float(e), length_text(e)) for e in ends],
        "position in the window, tokens",
        log=True,
    )
    y = number_axis([v for s in series for _, v in s.points] or [1.0], measure.name, log=True)
    chart = LineChart(
        f"{measure.title} by position in the window",
        x,
        y,
        series,
        trained_marks(ev, [int(x.lo) + 1, ends[-1]]),
        height=300,
    )
    by_position = {label: ev.ppl[label].by_position for label in labels}
    columns = {(a, b): f"{a:,}\u2013{b:,}" for a, b in buckets}
    table = _table(f"{measure.title} by position", measure, by_position, columns)
    return line_view(chart, title="By position, longest windows", table=table, half=True)


def _length_chart(ev: Evaluation, labels: Sequence[str], measure: PplMeasure) -> Chart:
    lengths = sorted({length for label in labels for length in ev.ppl[label].by_length})
    rows = {
        label: [(float(n), f"windows of {n:,} tokens", s) for n, s in ev.ppl[label].by_length.items()]
        for label in labels
    }
    series = _ppl_series(labels, rows, measure)
    y = number_axis([v for s in series for _, v in s.points] or [1.0], measure.name, log=True)
    x = length_axis(lengths, "window length in tokens", air=1.08)
    title = f"{measure.title} by window length"
    chart = LineChart(title, x, y, series, trained_marks(ev, lengths), height=300)
    by_length = {label: ev.ppl[label].by_length for label in labels}
    table = _table(title, measure, by_length, {n: length_text(n) for n in lengths})
    return line_view(chart, title="By window length", table=table, half=True)
