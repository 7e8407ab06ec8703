"""All evaluations of a report, grouped by label: what the evaluation sections draw from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.report.charts import (
    Mark,
)
from longspan.report.load import RecordFile
from longspan.report.tables import (
    NeedleTable,
    PplTable,
    tabulate,
)


@dataclass
class Evaluation:
    """All evaluations of a report by label, and the two trained lengths they speak of."""

    files: list[RecordFile]
    needle: dict[str, NeedleTable]
    ppl: dict[str, PplTable]
    distractors: dict[str, dict[int, NeedleTable]]

    @classmethod
    def from_records(cls, records: Sequence[RecordFile]) -> Evaluation:
        """Group the samples of every record file."""
        tables = tabulate(records)
        return cls(list(records), tables.needle, tables.ppl, tables.distractors)

    @property
    def before_length(self) -> int | None:
        """Context length the model was trained for before the extension, in tokens."""
        return self.trained_length("before")

    @property
    def after_length(self) -> int | None:
        """Context length the model was trained for by the extension, in tokens."""
        return self.trained_length("after")

    def rope(self, label: str) -> object:
        """Return the RoPE parameters a label was evaluated with, as recorded."""
        return next((f.header.get("model", {}).get("rope") for f in self.files if f.label == label), None)

    def trained_length(self, label: str) -> int | None:
        """Return the trained length of the model behind a label."""
        return next((f.trained_length for f in self.files if f.label == label and f.trained_length), None)

    def note(self, label: str) -> str | None:
        """Return the note that came with a label, from whichever task has one."""
        return next((f.note for f in self.files if f.label == label and f.note), None)

    @property
    def main_labels(self) -> list[str]:
        """Labels for the needle maps and curves: all but the controls."""
        return [label for label in self.needle if not label.startswith("ablate_")]


def trained_marks(ev: Evaluation, lengths: Sequence[int]) -> list[Mark]:
    """Return vertical lines at the trained lengths that lie inside the measured ones."""
    wanted = [(ev.before_length, "trained before"), (ev.after_length, "trained after")]
    if ev.before_length == ev.after_length:
        wanted = [(ev.after_length, "trained length")]
    return [Mark(n, text) for n, text in wanted if n and min(lengths) <= n <= max(lengths)]
