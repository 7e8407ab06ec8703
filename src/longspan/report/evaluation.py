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
    needle_samples,
    needle_table,
    ppl_table,
)


@dataclass
class Evaluation:
    """All evaluations of a report by label, and the two trained lengths they speak of."""

    files: dict[tuple[str, str], RecordFile]
    needle: dict[str, NeedleTable]
    ppl: dict[str, PplTable]
    distractors: dict[str, dict[int, NeedleTable]]
    before_length: int | None
    after_length: int | None

    @classmethod
    def from_records(cls, records: Sequence[RecordFile]) -> Evaluation:
        """Group the samples of every record file."""
        needle: dict[str, NeedleTable] = {}
        distractors: dict[str, dict[int, NeedleTable]] = {}
        for file in records:
            if single := needle_samples(file, distractors=False):
                needle[file.label] = needle_table(single)
            several = needle_samples(file, distractors=True)
            for count in sorted({sample.distractors for sample in several}):
                group = needle_table(sample for sample in several if sample.distractors == count)
                distractors.setdefault(file.label, {})[count] = group
        files = {(file.task, file.label): file for file in records}
        trained = {file.label: file.trained_length for file in records if file.trained_length}
        return cls(
            files=files,
            needle=needle,
            ppl={file.label: ppl_table(file.samples) for file in records if file.task == "ppl"},
            distractors=distractors,
            before_length=trained.get("before"),
            after_length=trained.get("after"),
        )

    def trained_length(self, label: str) -> int | None:
        """Return the trained length of the model behind a label."""
        return next((f.trained_length for (_, name), f in self.files.items() if name == label), None)

    def note(self, label: str) -> str | None:
        """Return the note that came with a label, from whichever task has one."""
        return next((f.note for (_, name), f in self.files.items() if name == label and f.note), None)

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
