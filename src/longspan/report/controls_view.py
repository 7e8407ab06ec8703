"""Control runs beside the main ones."""

from __future__ import annotations

from collections.abc import Mapping

from longspan.report.evaluation import Evaluation
from longspan.report.layouts import length_text
from longspan.report.pairs_view import change_cell
from longspan.report.perplexity_view import ppl_measure
from longspan.report.ppl_tables import PplTable
from longspan.report.tables import Grid, all_columns, difference
from longspan.report.view import MISSING, Section, Table, TableCell, decimal, heat_cell, percent, short_name


def _against_after(ev: Evaluation, grids: Mapping[str, Grid], label: str) -> TableCell:
    """Return the change of all that both models were asked, from the model after training to a control."""
    assert ev.lead is not None and ev.after is not None
    if label == ev.after:
        return TableCell(MISSING, "num muted")
    old, new = grids[ev.after].at(), grids[label].at()
    same = ev.same_questions(ev.lead.task, label, ev.after)
    return change_cell(difference(old, new, same_questions=same))


def controls_section(ev: Evaluation) -> Section:
    """Return the ablation runs beside before and after, with their notes."""
    section = Section("controls", "Controls", "controls")
    ablations = [label for label in {**ev.lead_grids, **ev.ppl} if label.startswith("ablate_")]
    if not ablations:
        section.missing.append("No control runs (labels that start with ablate_) were recorded.")
        return section
    section.intro = (
        "The same evaluation for runs that change one thing, so that the gain can be told from its causes."
    )
    labels = [label for label in (ev.before, ev.after) if label in ev.lead_grids] + ablations
    controlled = {label: ev.lead_grids.get(label, Grid()) for label in labels}
    lengths = all_columns(controlled.values())
    measure = ppl_measure(ev, labels)
    if ev.lead is not None:
        differ = ev.not_comparable(ev.lead.task, controlled)
        section.intro = " ".join(filter(None, (section.intro, differ)))
    rows: list[list[str | TableCell]] = []
    for label in labels:
        table, ppl = controlled[label], ev.ppl.get(label, PplTable())
        last = ppl.last()
        rows.append(
            [
                TableCell(short_name(label), "reference" if label in (ev.before, ev.after) else ""),
                TableCell(percent(table.total.mean), "num"),
                *(heat_cell(table.by_column.get(n)) for n in lengths),
                *([_against_after(ev, controlled, label)] if ev.lead and ev.after in controlled else []),
                TableCell(decimal(measure.of(last[1])) if last else "\u2013", "num"),
            ]
        )
    buckets = [last[0] for label in labels if label in ev.ppl and (last := ev.ppl[label].last())]
    where = "last bucket"
    if len(set(buckets)) == 1:
        where = f"{buckets[0][0]:,}\u2013{buckets[0][1]:,}"
    section.parts["table"] = Table(
        f"{ev.lead.capital} accuracy by length and {measure.name}" if ev.lead else measure.title,
        [
            "run",
            "mean",
            *(length_text(n) for n in lengths),
            *(["change from after, points"] if ev.lead and ev.after in controlled else []),
            f"{measure.name}, {where}",
        ],
        rows,
    )
    section.parts["notes"] = [(short_name(label), note) for label in ablations if (note := ev.note(label))]
    return section
