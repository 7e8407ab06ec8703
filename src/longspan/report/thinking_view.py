"""One model with thinking off and on, on the same questions: what thoughts change, and what they cost."""

from __future__ import annotations

import json

from longspan.report.comparison import differ_text
from longspan.report.evaluation import Evaluation
from longspan.report.load import RecordFile
from longspan.report.pairs_view import change_columns, corrected_p
from longspan.report.samples import ScoredSample
from longspan.report.tables import Difference, difference, tally_of
from longspan.report.view import (
    MISSING,
    Section,
    Table,
    TableCell,
    cells,
    interval_of,
    percent,
    short_name,
)

_EXPECTED = ("thinking", "answer prefix", "chat template", "max new tokens", "template args")
"""What differs, in the words of `comparison.differing`, because one thinks and the other does not."""


def thinks(file: RecordFile) -> bool:
    """Return whether the model thought first: as the header says, else as the samples show."""
    params = file.params
    if params.get("thinking") in ("on", "off"):
        return bool(params["thinking"] == "on")
    return bool(params.get("thinks")) or any(sample.thoughts for sample in file.samples)


def thinking_section(ev: Evaluation) -> Section:
    """Return the evaluations of one model and task that were made with thinking off and with thinking on."""
    section = Section("thinking", "Thinking off and on")
    found = _pairs(ev)
    if not found:
        return section
    section.intro = (
        "The same questions to the same model, without and with thoughts before its answer; thoughts are never scored. "
        "An answer that was cut while the model thought, or thoughts that no answer followed, count as wrong. The "
        "change is on the questions that both have a score for, those on one text taken together; bold where it stands "
        "(p < 5%) after Holm's correction for the number of changes here."
    )
    rows: list[list[str | TableCell]] = []
    changes = [
        difference(
            _samples(off),
            _samples(on),
            same_questions=ev.same_questions(off[0].task, off[0].label, on[0].label),
        )
        for off, on in found
    ]
    for (off, on), change, corrected in zip(found, changes, corrected_p(changes)):
        differ = [
            name for name in ev.differing(off[0].task, off[0].label, on[0].label) if name not in _EXPECTED
        ]
        rows.append(_row(ev, off, "off", None, None))
        rows.append(_row(ev, on, "on", change, corrected, differ_text(differ)))
    columns = [
        "task",
        "model",
        "thinking",
        "n",
        "score",
        "95% interval",
        "change, points",
        "95% interval",
        "pairs",
        "cut while thinking",
        "thoughts without an answer",
        "other empty answers",
        "tokens of thoughts per answer",
        "the longest",
    ]
    section.parts["table"] = Table("Thinking off and on: score, change and cost of thoughts", columns, rows)
    return section


_Files = list[RecordFile]


def _pairs(ev: Evaluation) -> list[tuple[_Files, _Files]]:
    """Return the files of (off, on) for every task and model that has both; files of one label belong together."""
    groups: dict[tuple[str, str, str], dict[str, _Files]] = {}
    for file in ev.files:
        model = file.header.get("model", {})
        name = str(model.get("fingerprint") or model.get("path") or "")
        if file.task != "ppl" and not file.rescored and name:
            key = (file.task, name, json.dumps(model.get("rope"), sort_keys=True))
            groups.setdefault(key, {}).setdefault(file.label, []).append(file)
    found = []
    for labels in groups.values():
        sides: tuple[list[_Files], list[_Files]] = ([], [])
        for files in labels.values():
            if len({thinks(file) for file in files}) == 1:
                sides[thinks(files[0])].append(files)
        found += [(off, on) for off in sides[0] for on in sides[1]]
    order = list(ev.layouts)
    return sorted(found, key=lambda pair: order.index(pair[0][0].task))


def _samples(files: _Files) -> list[ScoredSample]:
    return [sample for file in files for sample in file.samples]


def _row(
    ev: Evaluation,
    files: _Files,
    how: str,
    change: Difference | None,
    corrected: float | None,
    differ: str = "",
) -> list[str | TableCell]:
    tally = tally_of(_samples(files))
    named = ("cut while thinking", "thoughts without an answer")
    other = sum(count for reason, count in tally.no_answer.items() if reason not in named)
    empty = [*(tally.no_answer[name] for name in named), other]
    task = ev.layouts[files[0].task].short
    first = TableCell(task) if how == "off" else TableCell("", title=task)
    model = short_name(files[0].label) + (f" ({differ})" if differ else "")
    return [
        first,
        *cells(model, how, cls="left"),
        *cells(
            f"{tally.scored:,}", percent(tally.mean), interval_of(tally.interval_by_cluster or tally.interval)
        ),
        *_change_cells(change, corrected),
        *cells(*(f"{count:,}" if count else MISSING for count in empty)),
        *cells(f"{tally.thought_tokens / tally.scored:,.0f}" if tally.thought_tokens else MISSING),
        *cells(f"{tally.longest_thought:,}" if tally.longest_thought else MISSING),
    ]


def _change_cells(change: Difference | None, corrected: float | None) -> list[TableCell]:
    if change is None or change.interval is None:
        return cells(*[MISSING] * 3)
    return change_columns(change, corrected)
